"""Interval bound propagation: recovery by a lower bound of the margins over all patch contents."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn

from patchproof.aggregation.base import Stop
from patchproof.bounds import BoundedNetwork
from patchproof.defenses.batched import BatchedDefense, either
from patchproof.defenses.checks import check_images, check_label_range, check_model
from patchproof.defenses.inference import (
    check_batch_size,
    default_batch_size,
    fastest_batch_size,
)
from patchproof.defenses.surrogate import NetworkScores, Surrogate
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec
from patchproof.precision import direct_inference
from patchproof.results import Case, Certification, Corruption, Kind, Paper, Prediction, Verdict
from patchproof.threat import Regions, SparsePixels, Threat, threat_from_dict
from patchproof.threat.regions import ImageSize, check_image_size

Method = Literal["interval", "backward"]
"""How the margins are bounded: by intervals, or with linear bounds back through the last layers."""

DEFAULT_MEMORY = 2**28
"""Bytes that the bounds of a batch may take."""

_IMAGES = 64
"""Images that are bounded together by default."""
_TIMED_IMAGES, _TIMED_PLACES = 128, 32
"""The most images, and places of the patch, that ``tune_batch_size`` bounds at once."""
_FEW_IMAGES = 8
_SLOW = 0.5
"""Seconds for ``_FEW_IMAGES`` at these places, from which the batch size is of little matter."""
_MOST_UNIONS = 20_000
"""Places of several patches together that are bounded one by one."""


class IntervalBoundPropagation(BatchedDefense[Certification]):
    """A network whose margins are bounded over all contents of a patch (Chiang et al., 2020).

    ``predict`` is the network's own: the class of the highest logit, the lowest of equal ones. For
    a patch region, ``certify`` takes each pixel of it as the interval [0, 1] and all others as they
    are, and computes intervals that contain every activation (Equations 5 to 8). The last layer is
    merged with the differences of the logits, and what comes out is a lower bound of logit_y -
    logit_j over all contents, for each class j other than the label y. The region holds if it is
    positive for every j: then the label's logit is the highest whatever the patch shows. It is
    sufficient, not necessary, since intervals forget which activations go together.

    The bounds are rounded outwards, so that they contain what any order of summation in float32
    gives. ``paper_condition`` is Equation 3, lower bounds of at least 0: sound but for ties, which
    it lets pass.

    One model forward an image is counted. The bounds, which are most of the work, are propagations
    of their own and no forwards: one for each image and patch region, of the window that the patch
    can reach.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode, of
            layers that have bounds.
        threat: what the attacker may do, in the pixels of ``image_size``. Several patches are taken
            at all places together, up to 20,000; ``SparsePixels`` at once.
        image_size: (H, W) in pixels.
        channels: C. None for that of the first images: a network without bounds is refused only
            then.
        method: ``"interval"``, or ``"backward"`` for linear bounds back through the last layers,
            which are tighter and take longer: of regions that do not hold by intervals.
            ``SparsePixels`` has intervals only.
        screen: of ``screen`` x ``screen`` adjacent places of the patch, first bound the box around
            all of them: where that holds, each does. The verdicts are the same; the smallest margin
            is then that of the box. 1 bounds each place by itself.
        tolerance: lower bounds must be larger than this (logits). The default is enough for the
            device that certifies; more allows for another device that rounds in other ways.
        batch_size: images that are bounded together; None for 64.
        memory_budget: bytes that the bounds of a batch may take; None for 256 MiB.

    Raises:
        PatchproofError: a model in training mode or with a layer that has no bounds, more places of
            several patches than can be listed, or numbers out of range.
    """

    kind: ClassVar[Kind] = "recovery"
    paper: ClassVar[Paper | None] = "sound"

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        channels: int | None = None,
        method: Method = "interval",
        screen: int = 1,
        tolerance: float = 0.0,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if method not in get_args(Method):
            raise PatchproofError(f"method: expected {either(get_args(Method))}, got {method!r}")
        if method == "backward" and isinstance(threat, SparsePixels):
            raise PatchproofError("method: expected 'interval' for sparse pixels, got 'backward'")
        if not isinstance(screen, int) or screen < 1:
            raise PatchproofError(f"screen: expected places a side >= 1, got {screen!r}")
        if screen > 1 and tolerance > 0:  # a box that holds by less settles nothing
            raise PatchproofError(f"screen: expected 1 with a tolerance, got {screen}")
        if memory_budget is not None and memory_budget < 1:
            raise PatchproofError(f"memory_budget: expected bytes >= 1, got {memory_budget!r}")
        self._take_tolerance(tolerance)
        self.model = check_model(model)
        self.threat = threat
        self.image_size = check_image_size(image_size)
        self.method: Method = method
        self.screen = screen
        self.batch_size = check_batch_size(batch_size)
        self.memory_budget = memory_budget
        self.regions = threat.regions(self.image_size)
        self.corruption = _each_by_itself(threat, self.regions)
        combinations = self.corruption.combinations
        self._places = self.regions if combinations is None else self.regions.unions(combinations)
        self._network: BoundedNetwork | None = None
        if channels is not None:
            self._bounded(channels)

    def describe(self) -> str:
        """Say which bounds there are, and of what."""
        bounds = "interval bounds"
        if self.method == "backward":
            bounds += " with backward bounds of the last layers"
        if isinstance(self.threat, SparsePixels):
            return f"{bounds} of {self.threat.label()} anywhere"
        patches = "patch" if self.threat.patches == 1 else "patches"
        places = len(self._places)
        return f"{bounds} of the {patches} at {places:,} place{'' if places == 1 else 's'}"

    def to_dict(self) -> dict[str, Any]:
        """Return all that decides the labels and certificates, but the model, as JSON values."""
        return {
            "type": type(self).__name__,
            "threat": self.threat.to_dict(),
            "image_size": list(self.image_size),
            "method": self.method,
            "tolerance": self.tolerance,
        }

    @classmethod
    def from_dict(cls, model: nn.Module, values: dict[str, Any]) -> Self:
        """Return the defense of ``model`` that ``to_dict`` described."""
        height, width = values["image_size"]
        return cls(
            model,
            threat_from_dict(values["threat"]),
            image_size=(height, width),
            method=values["method"],
            tolerance=values["tolerance"],
        )

    def save(
        self, path: Path | str, spec: ModelSpec, made: Mapping[str, Any] | None = None
    ) -> None:
        """Write the defense and its model, as every defense does, if the model has bounds.

        Raises:
            PatchproofError: a model without bounds.
            RunError: the file cannot be written.
        """
        self._bounded(spec.channels)
        super().save(path, spec, made)

    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""
        return {"logits": NetworkScores(self.model)}

    def infer(self, images: Tensor) -> Prediction:
        """Return what ``predict`` does, with the case and the model forwards of each image."""
        check_images(images, self.image_size)
        check_model(self.model)
        labels, cases = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        if len(images):
            at_once = self.batch_size or default_batch_size(images[0], self.device)
            for batch in torch.split(images, at_once):
                label, case = _decide(self._logits(batch.to(self.device)))
                labels.append(label)
                cases.append(case)
        label = torch.cat(labels)
        return Prediction(label, torch.cat(cases), torch.ones_like(label))

    def tune_batch_size(self, image: Tensor, images: int | None = None) -> int:
        """Measure how many images like ``image`` (C, H, W) are best bounded together, and keep it.

        Up to 128 images, or as many as there are, are bounded at a few places of the patch. A
        network for which that takes long gets 8, so that a run which is stopped loses little.
        """
        check_images(image[None], self.image_size)
        most = _TIMED_IMAGES if images is None else max(1, min(_TIMED_IMAGES, images))
        if most <= _FEW_IMAGES:
            self.batch_size = most
            return most
        batch = image.to(self.device).expand(most, -1, -1, -1)
        labels = torch.zeros(most, dtype=torch.int64)
        some = torch.linspace(0, len(self._places) - 1, min(_TIMED_PLACES, len(self._places)))
        places = Regions(self.image_size, self._places.parts[some.long()])

        def bound(size: int) -> Tensor:
            return self._margins(batch[:size], labels[:size], "never", places)

        start = time.perf_counter()
        bound(_FEW_IMAGES)
        slow = time.perf_counter() - start > _SLOW
        self.batch_size = _FEW_IMAGES if slow else fastest_batch_size(bound, most, self.device)
        return self.batch_size

    @property
    def _images_at_once(self) -> int:
        return self.batch_size or _IMAGES

    def _certify(self, images: Tensor, labels: Tensor, stop: Stop) -> Certification:
        logits = self._logits(images)
        check_label_range(labels, logits.shape[1])
        prediction, case = _decide(logits)
        margins = torch.full((len(images), len(self._places)), -torch.inf)
        clean = _clean_margin(logits, labels)
        hopeful = (clean > 0).nonzero().squeeze(1)  # others lose at every region, by the image
        if len(hopeful):
            margins[hopeful] = self._margins(
                images[hopeful.to(images.device)], labels[hopeful], stop, self._places
            )
            _check_below(margins[hopeful], clean[hopeful])
        bounded = ~margins.isnan()
        holds = (margins > self.tolerance) & margins.isfinite()
        verdicts = torch.where(holds, int(Verdict.HOLDS), int(Verdict.LOST)).to(torch.int8)
        lowest = margins[hopeful].masked_fill(~bounded[hopeful], torch.inf).amin(1)
        return Certification(
            prediction=prediction,
            case=case,
            forwards=torch.ones_like(prediction),
            smallest_margin=clean.index_copy(0, hopeful, torch.minimum(clean[hopeful], lowest)),
            verdicts=verdicts.masked_fill(~bounded, Verdict.UNKNOWN),
            corruption=self.corruption,
            regions=self.regions,
            threat=self.threat,
            certified=holds.all(1) & (prediction == labels),
            paper_condition=(margins >= 0).all(1) & (prediction == labels),
        )

    def _margins(self, images: Tensor, labels: Tensor, stop: Stop, places: Regions) -> Tensor:
        """Return lower bounds of the margins, (N, P) float32 on the CPU; NaN where not computed."""
        network = self._bounded(images.shape[1])
        labels = labels.to(images.device)
        stops = stop == "first_lost_region"
        if isinstance(self.threat, SparsePixels):
            bounds = network.sparse_margins(images, labels, self.threat.count)[:, None]
            stops = False
        else:
            bounds = network.lowest_margins(
                images,
                labels,
                places,
                method=self.method,
                stop=stops,
                screen=self.screen,
                memory_budget=self.memory_budget or DEFAULT_MEMORY,
            )
        bounds = bounds.float().cpu()
        return bounds if stops else bounds.nan_to_num(nan=-torch.inf, posinf=torch.inf)

    def _bounded(self, channels: int) -> BoundedNetwork:
        """Return the network with its bounds for images of so many channels."""
        network = self._network
        shape = (channels, *self.image_size)
        if network is None or network.model is not self.model or network.image_shape != shape:
            network = self._network = BoundedNetwork(self.model, shape)
            image = torch.zeros(1, *shape, device=self.device)
            place = Regions(self.image_size, self._places.parts[:1])
            self._margins(image, torch.zeros(1, dtype=torch.int64), "never", place)  # or raises
        return network

    def _logits(self, images: Tensor) -> Tensor:
        """Return what the network says, (N, classes) on the CPU."""
        with direct_inference(images.device):
            logits: Tensor = self.model(images.clone()).cpu()  # it may change its input in place
        if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
            raise PatchproofError(
                f"model: expected logits of shape ({len(images)}, classes >= 2), "
                f"got {tuple(logits.shape)}"
            )
        return logits


def _decide(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels and the cases, (N,) int64 each.

    Logits that are not all finite say nothing for any class: all are equal, and the lowest wins.
    """
    finite = logits.isfinite().all(1)
    if not finite.all():
        warnings.warn(
            "the model's output is not finite for some images: they are never certified",
            stacklevel=2,
        )
    label = torch.where(finite, logits.argmax(1), 0)
    return label, torch.where(finite, int(Case.AGREED), int(Case.MAJORITY))


def _clean_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the label's logit minus the highest other, (N,); -inf where one is not finite."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return torch.where(logits.isfinite().all(1), own - others, -torch.inf).float()


def _check_below(margins: Tensor, clean: Tensor) -> None:
    """Raise unless lower bounds (N, P) are below the clean margins (N,): a patch may show nothing.

    Bounds that are not belong to another network than the one that predicts.
    """
    above = (margins > clean[:, None]).any(1)
    if above.any():
        raise PatchproofError(
            "bounds: expected no more than the margin of the clean image, got more for "
            f"{int(above.sum())} of {len(clean)} images: the model does not compute what its "
            "layers do, or not the same each time"
        )


def _each_by_itself(threat: Threat, regions: Regions) -> Corruption:
    """Return every place of the patches as a pattern of its own, of the one view there is.

    Raises:
        PatchproofError: more places of several patches than are bounded one by one.
    """
    if threat.patches == 1:
        return Corruption.one_by_one(len(regions))
    count = min(threat.patches, len(regions))
    total = math.comb(len(regions), count)
    if total > _MOST_UNIONS:
        raise PatchproofError(
            f"threat: expected at most {_MOST_UNIONS:,} places of several patches together, got "
            f"{total:,} of {threat.label()}: restrict their locations, or take SparsePixels of as "
            "many pixels as the patches have"
        )
    one_by_one = torch.arange(len(regions))
    combinations = torch.combinations(one_by_one, count)
    patterns = torch.ones(len(combinations), 1, dtype=torch.bool)
    return Corruption(patterns, one_by_one, combinations)
