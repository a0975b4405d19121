"""Randomized cropping: recovery by the votes of crops, all of them or a random draw."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from patchproof.aggregation.base import Stop
from patchproof.aggregation.crop_draws import (
    LARGEST_TABLE,
    Chance,
    ChanceTable,
    hit_shares,
    hit_tail,
    overtaking,
    success_by_shares,
    success_probability,
)
from patchproof.aggregation.crop_votes import (
    Votes,
    count_votes,
    counting_condition,
    leads,
    majority,
    votes_to_turn,
)
from patchproof.aggregation.soft import expected_votes
from patchproof.defenses.batched import BatchedDefense, either
from patchproof.defenses.checks import check_images, check_label_range, check_model
from patchproof.defenses.inference import (
    bytes_per_image,
    check_batch_size,
    default_batch_size,
    fastest_batch_size,
    in_fitting_batches,
)
from patchproof.defenses.saved import DEFAULT_TOLERANCE
from patchproof.defenses.surrogate import Surrogate
from patchproof.defenses.view_scores import ViewScores
from patchproof.errors import PatchproofError
from patchproof.models.crops import CropSize
from patchproof.precision import exact_inference
from patchproof.probability import ProbableCertification
from patchproof.results import (
    Case,
    Certification,
    Corruption,
    Kind,
    Outputs,
    Paper,
    Prediction,
    Verdict,
)
from patchproof.threat import SparsePixels, Threat, threat_from_dict
from patchproof.threat.regions import ImageSize, check_image_size
from patchproof.views.crops import CropPlaces, CropViews, box_sums, check_local, crop_scores

Mode = Literal["all-crops", "fixed-crops", "random-crops"]
"""Which crops vote: all, a public draw that is the same for every image, or a secret fresh one."""

DEFAULT_CROPS = 128
"""Crops of a draw, as the paper takes for CIFAR-10."""
PAPER_PROBABILITY = 0.95
"""p_c from which the paper counts an image as certified (Section 4)."""

_VOTES_AT_ONCE = 2**14
"""Crops of the images of one batch; they go through the network in smaller batches."""
_REGION_VALUES = 2**23
"""Votes of classes at regions that are counted at once."""
_TIMED_CROPS = 2048

AnyCropCertification = Certification | ProbableCertification


@dataclass(frozen=True, eq=False)
class CropLabels:
    """What crops of N images vote for.

    Attributes:
        labels: (N, n) int64, the class of each crop; ``INVALID_LABEL`` where its scores are not
            finite.
        margins: (N, n) float32, by how much the class leads (logits); see ``Outputs``.
        forwards: (N,) int64, crops that were classified: a place that is drawn twice counts once.
        classes: C.
    """

    labels: Tensor
    margins: Tensor
    forwards: Tensor
    classes: int

    def select(self, images: Tensor) -> CropLabels:
        """Return those of some images, by (n,) indices."""
        return CropLabels(
            self.labels[images], self.margins[images], self.forwards[images], self.classes
        )

    def sure(self, tolerance: float) -> Tensor:
        """Return the labels, negative where rounding may change them."""
        return torch.where(self.margins > tolerance, self.labels, -1)


class RandomizedCropping(BatchedDefense[AnyCropCertification]):
    """The class that most crops of the image vote for (randomized cropping, Section 3).

    What a certificate promises depends on which crops vote, ``mode``:

    - ``"all-crops"``: the crops at all places. Deterministic recovery: at each patch region, the
      label stays ahead if all crops that meet the region vote for any one other class.
    - ``"fixed-crops"``: ``crops`` places, drawn once by ``seed``, which is public. Deterministic
      too: the patch may stand where it meets most of these very crops.
    - ``"random-crops"``: ``crops`` places, drawn secretly for every prediction, after the patch is
      there. Certified with a probability (``ProbableCertification``): a prediction is right at
      least so often, whatever the patch shows, at the worst region. With ``samples``, from the
      votes of so many crops instead of all places; then the probability itself holds with
      ``confidence``.

    ``paper_condition`` is the criterion of the paper and not sound: votes to turn (Equation 5) more
    than a patch meets crops for all crops; otherwise p_c of at least 0.95 (Equation 6, and of
    independent draws with the p_a^i of Equation 9 without replacement) for the votes of one draw.

    Args:
        model: from float32 crops (B, C, height, width) in [0, 1] to logits (B, classes), or with a
            method ``cropped`` that is told where they are; in eval mode.
        threat: what the attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        crop_size: side of the crops, or (height, width), in pixels; None for what the model was
            made for.
        mode: which crops vote.
        crops: n, the crops of a draw; of no matter for all crops.
        replacement: whether a draw may hold a place twice.
        seed: of the fixed crops, and of the draws that ``certify`` records (``prediction``,
            ``paper_condition``); random crops are otherwise secret.
        probability: with which a prediction from random crops is to be right, in (0, 1).
        samples: crops of an image, drawn with replacement, from which random crops bound the vote
            shares; None to count the votes of all places.
        confidence: with which the bounds from ``samples`` hold for an image, in (0, 1).
        tolerance: a crop whose class leads by no more (logits) counts as corrupted.
        batch_size: crops in one forward pass; None picks one by their size.
        memory_budget: bytes that the activations of one batch may take; None for no limit.

    Raises:
        PatchproofError: a model in training mode or for crops of another size, a threat whose
            regions cannot be listed, or numbers out of range.
    """

    paper: Paper | None = "unsound"
    generator: np.random.Generator | None = None
    """Draws the random crops of predictions; None for secret draws. A certificate does not hold
    against somebody who knows how it was seeded."""

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        crop_size: int | CropSize | None = None,
        mode: Mode = "all-crops",
        crops: int = DEFAULT_CROPS,
        replacement: bool = True,
        seed: int = 0,
        probability: float = 0.95,
        samples: int | None = None,
        confidence: float = 0.99,
        tolerance: float = DEFAULT_TOLERANCE,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if mode not in (known := get_args(Mode)):
            raise PatchproofError(f"mode: expected {either(known)}, got {mode!r}")
        if isinstance(threat, SparsePixels):
            raise PatchproofError(
                f"threat: expected patches, whose places can be listed, got {threat.describe()}: "
                "take IntervalBoundPropagation (--defense interval-bounds)"
            )
        if samples is not None and mode != "random-crops":
            raise PatchproofError(f"samples: expected with mode 'random-crops' only, got {mode!r}")
        for name, share in (("probability", probability), ("confidence", confidence)):
            if not 0.0 < share < 1.0:
                raise PatchproofError(f"{name}: expected a number in (0, 1), got {share!r}")
        self._take_tolerance(tolerance)
        self.model = check_model(model)
        self.threat = threat
        self.image_size = check_image_size(image_size)
        made_for = getattr(model, "crop_size", None)
        size = made_for if crop_size is None else crop_size
        if size is None:
            raise PatchproofError("crop_size: expected the size of the crops, got none")
        self.places = CropPlaces(self.image_size, size)
        if made_for not in (None, self.places.crop_size):
            raise PatchproofError(
                f"crop_size: expected {made_for}, which the model was made for, "
                f"got {self.places.crop_size}"
            )
        self.mode: Mode = mode
        self.kind: Kind = "probable" if mode == "random-crops" else "recovery"
        self.crops = self.places.count
        if mode != "all-crops":
            self.crops = self.places.check_number("crops", crops, replacement)
        self.replacement = replacement and mode != "all-crops"
        if not isinstance(seed, int) or seed < 0:
            raise PatchproofError(f"seed: expected a whole number >= 0, got {seed!r}")
        self.seed = seed
        self.probability = probability
        self.samples = samples
        if samples is not None:
            self.samples = self.places.check_number("samples", samples, replacement=True)
        elif mode == "random-crops" and self.places.count > LARGEST_TABLE:
            raise PatchproofError(
                f"samples: expected a number for crops at more than {LARGEST_TABLE:,} places, got "
                f"none for {self.places.count:,}"
            )
        self.confidence = confidence
        self.batch_size = check_batch_size(batch_size)
        if memory_budget is not None and memory_budget < 1:
            raise PatchproofError(f"memory_budget: expected bytes >= 1, got {memory_budget!r}")
        self.memory_budget = memory_budget
        self.regions = threat.regions(self.image_size)
        self._checked: nn.Module | None = None
        self._meeting = self.places.meeting(self.regions).parts

    @property
    def fixed(self) -> Tensor:
        """The places that vote where they are the same for every image, (n,) int64."""
        if self.mode == "all-crops":
            return torch.arange(self.places.count)
        generator = np.random.default_rng(self.seed)
        return self.places.draw(1, self.crops, self.replacement, generator)[0]

    @cached_property
    def overlapping(self) -> int:
        """n_adv, the most places whose crops meet a patch, wherever it is (Equations 2 and 7)."""
        met = (self._meeting[..., 2] * self._meeting[..., 3]).sum(1)
        each = met.topk(min(self.threat.patches, len(met))).values
        return min(int(each.sum()), self.places.count)

    def describe(self) -> str:
        """Say which crops vote."""
        height, width = self.places.crop_size
        crops = f"crops of {height}x{width} pixels"
        if self.mode == "all-crops":
            return f"all {self.places.count:,} {crops}"
        how = "with" if self.replacement else "without"
        if self.mode == "fixed-crops":
            return f"{self.crops} fixed {crops} of {self.places.count:,}, drawn {how} replacement"
        known = ""
        if self.samples is not None:
            known = f" (vote shares from {self.samples:,} crops, confidence {self.confidence:g})"
        return (
            f"{self.crops} random {crops} of {self.places.count:,}, drawn {how} replacement, for a "
            f"probability of {self.probability:g}{known}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all that decides the labels and certificates, but the model, as JSON values."""
        values: dict[str, Any] = {
            "type": type(self).__name__,
            "threat": self.threat.to_dict(),
            "image_size": list(self.image_size),
            "crop_size": list(self.places.crop_size),
            "mode": self.mode,
            "tolerance": self.tolerance,
        }
        if self.mode != "all-crops":
            values |= {"crops": self.crops, "replacement": self.replacement, "seed": self.seed}
        if self.mode == "random-crops":
            values["probability"] = self.probability
        if self.samples is not None:
            values |= {"samples": self.samples, "confidence": self.confidence}
        return values

    @classmethod
    def from_dict(cls, model: nn.Module, values: dict[str, Any]) -> Self:
        """Return the defense of ``model`` that ``to_dict`` described."""
        given = {name: value for name, value in values.items() if name not in ("type", "threat")}
        for name in ("image_size", "crop_size"):
            given[name] = tuple(given[name])
        return cls(model, threat_from_dict(values["threat"]), **given)

    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""
        views = CropViews(self.image_size, self.places.crop_size)
        places = None if self.mode == "random-crops" else self.fixed
        return {"expected-votes": ViewScores(self.model, views, expected_votes, among=places)}

    def infer(self, images: Tensor) -> Prediction:
        """Return what ``predict`` does, with the case and the model forwards of each image."""
        check_images(images, self.image_size)
        check_model(self.model)
        labels = [torch.empty(0, dtype=torch.int64)]
        forwards = [torch.empty(0, dtype=torch.int64)]
        for batch in torch.split(images, self._images_at_once) if len(images) else ():
            if self.mode == "random-crops":
                generator = np.random.default_rng() if self.generator is None else self.generator
                places = self.places.draw(len(batch), self.crops, self.replacement, generator)
            else:
                places = self.fixed.expand(len(batch), -1)
            found = self.crop_labels(batch.to(self.device), places)
            labels.append(majority(found.labels, found.classes))
            forwards.append(found.forwards)
        label = torch.cat(labels)
        case = torch.full_like(label, int(Case.MAJORITY))
        return Prediction(label, case, torch.cat(forwards))

    def repeated_predictions(self, images: Tensor, repeats: int) -> Tensor:
        """Return what so many predictions of each image are, (N, repeats) int64.

        They are as independent as those of ``predict``, but every place is classified only once.
        The draws follow ``generator``, or ``seed`` where that is None.

        Args:
            images: (N, C, H, W) float32 in [0, 1].
            repeats: from 1.
        """
        check_images(images, self.image_size)
        check_model(self.model)
        generator = np.random.default_rng(self.seed) if self.generator is None else self.generator
        predictions = [torch.empty(0, repeats, dtype=torch.int64)]
        for batch in torch.split(images, self._images_at_once) if len(images) else ():
            every = torch.arange(self.places.count).expand(len(batch), -1)
            found = self.crop_labels(batch.to(self.device), every)
            for labels in found.labels:
                drawn = self.fixed.expand(repeats, -1)
                if self.mode == "random-crops":
                    drawn = self.places.draw(repeats, self.crops, self.replacement, generator)
                predictions.append(majority(labels[drawn], found.classes)[None])
        return torch.cat(predictions)

    def crop_labels(self, images: Tensor, places: Tensor) -> CropLabels:
        """Classify crops of images.

        Args:
            images: (N, C, H, W) float32 in [0, 1], on the model's device.
            places: (N, n) int64; a place that is asked for twice is classified once.

        Returns:
            What each crop votes for, on the CPU.
        """
        if self._checked is not self.model:
            check_local(self.model, self.places, images)
            self._checked = self.model
        codes = places + self.places.count * torch.arange(len(images))[:, None]
        distinct, inverse = torch.unique(codes, return_inverse=True)
        image = distinct // self.places.count
        corners = self.places.corners(distinct % self.places.count)
        crop = torch.empty(images.shape[1], *self.places.crop_size)
        with exact_inference(images.device):
            size = self.batch_size or default_batch_size(crop, images.device)
            at_once = self._largest_batch(images, size)
            parts = []
            for start in range(0, len(distinct), at_once):
                batch = slice(start, start + at_once)
                part, fitting = in_fitting_batches(
                    lambda i, c: self._logits(images, i, c), image[batch], corners[batch]
                )
                parts.append(part.cpu())
                if fitting < len(part):
                    self.batch_size = fitting
            scores = torch.cat(parts)
        classes = scores.shape[1]
        outputs = Outputs.empty(1, len(distinct), classes)
        outputs.record(torch.tensor(0), torch.arange(len(distinct)), scores)
        labels, margins = outputs.labels[0], outputs.margins[0]
        if (labels < 0).any():
            warnings.warn(
                "the model's output is not finite for some crops: they vote for no class",
                stacklevel=2,
            )
        forwards = torch.bincount(image, minlength=len(images))
        return CropLabels(labels[inverse], margins[inverse], forwards, classes)

    def votes(self, labels: Tensor, classes: int, places: Tensor) -> Votes:
        """Count votes in all, and among the crops that each patch region meets.

        Args:
            labels: (N, n) int64, what each crop votes for; negative where rounding may change it.
            classes: C.
            places: (n,) int64, where the crops are, the same for each image.
        """
        counts = count_votes(labels, classes)
        height, width = self.places.grid
        grid = torch.zeros(len(labels), classes + 1, height * width, dtype=torch.int32)
        votes = torch.where(labels < 0, classes, labels)
        cells = (votes * height * width + places).view(len(labels), -1)
        ones = torch.ones_like(cells, dtype=torch.int32)
        grid.view(len(labels), -1).scatter_add_(1, cells, ones)
        known = grid[:, :classes].view(len(labels), classes, height, width)
        return Votes(counts[:, :classes], counts[:, classes], box_sums(known, self._meeting))

    def certify_votes(
        self, found: CropLabels, labels: Tensor, drawn: Tensor | None = None
    ) -> AnyCropCertification:
        """Certify images from the votes of their crops, without the model.

        Args:
            found: of the crops at ``fixed`` for fixed crops; of all places otherwise.
            labels: (N,) int64, the right classes.
            drawn: (N, n) int64, for random crops: the places that a prediction draws.
        """
        check_label_range(labels, found.classes)
        parts: list[Any] = []  # of one of the two kinds
        for part in self._parts(found):
            some = found.select(part)
            if drawn is None:
                parts.append(self._deterministic(some, labels[part]))
            else:
                success = self._success(some, labels[part])
                voting = some.labels.gather(1, drawn[part])
                parts.append(self._probable(success, some, voting, labels[part]))
        joined: AnyCropCertification = parts[0].concatenate(parts, torch.arange(len(labels)))
        return joined

    def paper_condition(self, votes: Tensor, classes: int, labels: Tensor) -> Tensor:
        """Return where the paper's criterion is met, (N,) bool.

        Args:
            votes: (N, n) int64, what each crop votes for.
            classes: C.
            labels: (N,) int64.
        """
        counts = count_votes(votes, classes)[:, :classes]
        if self.mode == "all-crops":
            return counting_condition(counts, labels, self.overlapping)
        chance = self.paper_chances[votes_to_turn(counts) - 1]
        return (chance >= PAPER_PROBABILITY) & (counts.argmax(1) == labels)

    @property
    def paper_chances(self) -> Tensor:
        """p_c (Equation 6) by the votes to turn less one, (n + 1,) float64."""
        return _paper_chances(self.overlapping, self.places.count, self.crops, self.replacement)

    def success_by_number(
        self, found: CropLabels, labels: Tensor, numbers: Sequence[int]
    ) -> Tensor:
        """Return ``success_probability`` with other numbers of random crops, (len(numbers), N).

        More crops are not always better: an even number allows ties, which count against the
        label, and where the patch decides more than the label's lead, every crop more does harm.

        Args:
            found: of all places.
            labels: (N,) int64, the right classes.
            numbers: of crops.
        """
        success = torch.zeros(len(numbers), len(labels), dtype=torch.float64)
        for row, number in zip(success, numbers, strict=True):
            other = type(self).from_dict(self.model, self.to_dict() | {"crops": number})
            for part in self._parts(found):
                row[part] = other._success(found.select(part), labels[part])[0].amin(1)
        return success

    def crops_needed(self, found: CropLabels, labels: Tensor, numbers: Sequence[int]) -> Tensor:
        """Return the least of some numbers of random crops that certify an image, (N,) int64.

        Args:
            found: of all places.
            labels: (N,) int64, the right classes.
            numbers: of crops, in ascending order.

        Returns:
            0 where none is enough for ``probability``.
        """
        enough = self.success_by_number(found, labels, numbers) >= self.probability
        least = torch.tensor(numbers)[enough.int().argmax(0)]
        return torch.where(enough.any(0), least, 0)

    def tune_batch_size(self, image: Tensor, images: int | None = None) -> int:
        """Measure which number of crops of images (C, H, W) like this is fastest, and keep it.

        How many ``images`` there are changes nothing: there are many crops of each.
        """
        check_images(image[None], self.image_size)
        given = image.to(self.device)[None]
        corners = self.places.corners(torch.arange(_TIMED_CROPS) % self.places.count)
        first = torch.zeros(_TIMED_CROPS, dtype=torch.int64)
        with exact_inference(self.device):
            self.batch_size = fastest_batch_size(
                lambda size: self._logits(given, first[:size], corners[:size]),
                self._largest_batch(given, _TIMED_CROPS),
                self.device,
            )
        return self.batch_size

    def _parts(self, found: CropLabels) -> Iterator[Tensor]:
        """Yield which images to certify at once, so that the votes at regions fit into memory."""
        each = found.classes * max(len(self.regions), self.places.count)
        at_once = max(1, _REGION_VALUES // each)
        yield from torch.split(torch.arange(len(found.labels)), at_once)

    @property
    def _images_at_once(self) -> int:
        return max(1, _VOTES_AT_ONCE // (self.samples or len(self._recorded)))

    @property
    def _recorded(self) -> Tensor:
        """The places whose votes a certificate needs, where they are the same for each image."""
        return self.fixed if self.mode == "fixed-crops" else torch.arange(self.places.count)

    def _certify(self, images: Tensor, labels: Tensor, stop: Stop) -> AnyCropCertification:
        if self.mode != "random-crops":
            found = self.crop_labels(images, self._recorded.expand(len(images), -1))
            return self.certify_votes(found, labels)
        generators = [_generator(self.seed, image) for image in images]
        drawn = torch.cat(
            [self.places.draw(1, self.crops, self.replacement, own) for own in generators]
        )
        if self.samples is None:
            found = self.crop_labels(images, self._recorded.expand(len(images), -1))
            return self.certify_votes(found, labels, drawn)
        sampled = torch.cat([self.places.draw(1, self.samples, True, own) for own in generators])
        found = self.crop_labels(images, torch.cat([drawn, sampled], 1))
        check_label_range(labels, found.classes)
        votes = found.sure(self.tolerance)[:, self.crops :]
        own, rivals = self._bounded_votes(votes, found.classes, labels)
        chance = partial(
            overtaking,
            places=self.places.count,
            draws=self.crops,
            replacement=self.replacement,
        )
        worst, clean = (
            success_by_shares(own, rivals, attacked, self.places.count, chance)
            for attacked in (self.overlapping, 0)
        )
        success = worst[:, None].expand(-1, len(self.regions)), clean
        return self._probable(success, found, found.labels[:, : self.crops], labels)

    def _deterministic(self, found: CropLabels, labels: Tensor) -> Certification:
        votes = self.votes(found.sure(self.tolerance), found.classes, self._recorded)
        holds = leads(votes, labels, self.threat.patches) >= 0
        shared = self._shared(found, found.labels, holds)
        return Certification(
            **shared,
            certified=holds.all(1) & (shared["prediction"] == labels),
            paper_condition=self.paper_condition(found.labels, found.classes, labels),
        )

    def _probable(
        self, success: tuple[Tensor, Tensor], found: CropLabels, voting: Tensor, labels: Tensor
    ) -> ProbableCertification:
        """Certify from probabilities of success: at each region, (N, R), and without a patch."""
        at_regions, clean = success
        worst = at_regions.amin(1)
        return ProbableCertification(
            **self._shared(found, voting, at_regions >= self.probability),
            certified_with_probability=worst >= self.probability,
            success_probability=worst,
            clean_probability=clean,
            paper_condition=self.paper_condition(voting, found.classes, labels),
        )

    def _shared(self, found: CropLabels, voting: Tensor, holds: Tensor) -> dict[str, Any]:
        """Return the values of ``Certificates``, for votes (N, n) and regions that hold (N, R)."""
        label = majority(voting, found.classes)
        verdicts = torch.where(holds, int(Verdict.HOLDS), int(Verdict.LOST)).to(torch.int8)
        return {
            "prediction": label,
            "case": torch.full_like(label, int(Case.MAJORITY)),
            "forwards": found.forwards,
            "smallest_margin": found.margins.amin(1),
            "verdicts": verdicts,
            "corruption": Corruption.one_by_one(len(self.regions)),
            "regions": self.regions,
            "threat": self.threat,
        }

    def _success(self, found: CropLabels, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return lower bounds of the probability of success at each region, and without a patch."""
        votes = self.votes(found.sure(self.tolerance), found.classes, self._recorded)
        nowhere = votes.corrupted.new_zeros(*votes.counts.shape, 1)
        clean = Votes(votes.counts, votes.unsure, nowhere)
        count, chance = self.places.count, self._chance
        at_regions = success_probability(votes, labels, count, chance, self.threat.patches)
        return at_regions, success_probability(clean, labels, count, chance).squeeze(1)

    @property
    def _chance(self) -> Chance:
        return _chance_table(self.places.count, self.crops, self.replacement)

    def _bounded_votes(self, votes: Tensor, classes: int, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Bound from samples how many places vote for the label, (N,), and for others, (N, C).

        Clopper-Pearson bounds for every class together (Bonferroni): all hold with ``confidence``.

        Args:
            votes: (N, samples) int64, negative where rounding may change them.
            classes: C.
            labels: (N,) int64.
        """
        from scipy.special import betaincinv

        number, share = votes.shape[1], (1 - self.confidence) / classes
        counts = count_votes(votes, classes)
        sure, unsure = counts[:, :classes], counts[:, classes:]
        hits = sure.gather(1, labels[:, None]).squeeze(1).double()
        lowest = betaincinv(hits.clamp(min=1).numpy(), (number - hits + 1).numpy(), share)
        own = torch.where(hits > 0, torch.from_numpy(lowest), 0.0) * self.places.count
        hits = (sure + unsure).double()
        highest = betaincinv((hits + 1).numpy(), (number - hits).clamp(min=1).numpy(), 1 - share)
        most = torch.where(hits < number, torch.from_numpy(highest), 1.0) * self.places.count
        # A whole number of places is within the bound if it is but for rounding.
        rivals = (most + 1e-6).floor().long().scatter(1, labels[:, None], -1)
        return (own - 1e-6).ceil().long().clamp(min=0), rivals

    def _logits(self, images: Tensor, image: Tensor, corners: Tensor) -> Tensor:
        """Return the logits of a batch of crops, (B, classes)."""
        image, corners = image.to(images.device), corners.to(images.device)
        return crop_scores(self.model, images, image, corners, self.places.crop_size)

    def _largest_batch(self, images: Tensor, size: int) -> int:
        """Return ``size`` crops, or what the memory budget allows if that is less."""
        if self.memory_budget is None:
            return size
        one = torch.zeros(1, dtype=torch.int64)
        corner = torch.zeros(1, 2, dtype=torch.int64)
        needed = bytes_per_image(self.model, lambda: self._logits(images[:1], one, corner))
        if needed > self.memory_budget:
            raise PatchproofError(
                f"memory_budget: expected at least the {needed:,} bytes of one crop, "
                f"got {self.memory_budget:,}"
            )
        return min(size, self.memory_budget // needed)


def _generator(seed: int, image: Tensor) -> np.random.Generator:
    """Return a generator by a seed and the pixels of an image, wherever it stands in a run."""
    pixels = image.detach().cpu().contiguous().numpy().tobytes()
    digest = hashlib.sha256(pixels).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype=np.uint32).tolist()])


@lru_cache(maxsize=2)
def _chance_table(places: int, crops: int, replacement: bool) -> ChanceTable:
    return ChanceTable(places, crops, replacement)


@lru_cache(maxsize=64)
def _paper_chances(overlapping: int, places: int, crops: int, replacement: bool) -> Tensor:
    return hit_tail(hit_shares(overlapping, places, crops, replacement))
