"""The loop that every defense of views and an aggregation shares."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from patchproof.aggregation import Aggregation, DetectingAggregation, Goal
from patchproof.aggregation.base import CERTAIN, Stop
from patchproof.defenses.checks import (
    check_images,
    check_label_range,
    check_model,
    checked_examples,
)
from patchproof.defenses.inference import (
    bytes_per_image,
    check_batch_size,
    default_batch_size,
    fastest_batch_size,
    in_fitting_batches,
    model_device,
)
from patchproof.defenses.pool import Pool, choose
from patchproof.detection import DetectionCertification
from patchproof.errors import PatchproofError
from patchproof.precision import exact_inference
from patchproof.results import (
    INVALID_LABEL,
    Certificates,
    Certification,
    Corruption,
    Kind,
    Outputs,
    Paper,
    Prediction,
    Verdict,
)
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize, check_image_size
from patchproof.views import Views

Example = tuple[int, Tensor, int]
"""A key of the caller's choice, an image (C, H, W) and its label."""


C = TypeVar("C", bound=Certificates)


class ViewSystem(ABC, Generic[C]):
    """Views of an image, a model that scores each, and an aggregation to one label.

    ``predict`` and ``certify`` share one loop: evaluate the views that are wanted, across images,
    until none is. Batches stay full while images are left to start on, since a batch mixes the
    views of many images.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode. Its
            own resize and normalisation are inside it.
        threat: what the attacker may do, in the pixels of ``image_size``.
        views: what the model sees.
        aggregation: how the scores become a label.
        image_size: (H, W) in pixels.
        batch_size: views in one forward pass; None picks one by the size of the image.
        memory_budget: bytes that the activations of one batch may take, by an estimate from the
            layers' inputs and outputs; None for no limit. A device that runs out of memory halves
            the batch in any case.
        corruption: which views ``threat`` corrupts, where that is known already.

    Raises:
        PatchproofError: a model in training mode, or numbers out of range.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        views: Views,
        aggregation: Aggregation,
        *,
        image_size: ImageSize,
        batch_size: int | None = None,
        memory_budget: int | None = None,
        corruption: Corruption | None = None,
    ) -> None:
        if memory_budget is not None and memory_budget < 1:
            raise PatchproofError(f"memory_budget: expected bytes >= 1, got {memory_budget!r}")
        self.model = check_model(model)
        self.threat = threat
        self.views = views
        self.aggregation = aggregation
        self.image_size = check_image_size(image_size)
        self.batch_size = check_batch_size(batch_size)
        self.memory_budget = memory_budget
        self.regions = threat.regions(self.image_size)
        self.corruption = views.corruption(threat) if corruption is None else corruption
        self._classes = 0

    @abstractmethod
    def _promise(self, outputs: Outputs, labels: Tensor, shared: dict[str, Any]) -> C:
        """Return the certificates of decided images, given the values of ``Certificates``."""

    @property
    def paper(self) -> Paper | None:
        """Whether the criterion of the defense's paper is sound; None where it states none."""
        return self.aggregation.paper

    @property
    def device(self) -> torch.device:
        """Where the model is, and where its views are made."""
        return model_device(self.model)

    def predict(self, images: Tensor) -> Tensor:
        """Return the robust label of each image.

        Args:
            images: (N, C, H, W) float32 in [0, 1].

        Returns:
            (N,) int64; from detectors ``ALERT`` (-1) where a patch is suspected.

        Raises:
            PatchproofError: images of another shape, type or range, or a model in training mode.
        """
        return self.infer(images).label

    def infer(self, images: Tensor) -> Prediction:
        """Return what ``predict`` does, with the case and the model forwards of each image."""
        check_images(images, self.image_size)
        label = torch.empty(len(images), dtype=torch.int64)
        case, forwards = torch.empty_like(label), torch.empty_like(label)
        examples = ((index, image, 0) for index, image in enumerate(images))
        for decided in self._settle(examples, None):
            label[decided.keys], case[decided.keys] = self.aggregation.predict(decided.outputs)
            forwards[decided.keys] = decided.forwards
        return Prediction(label, case, forwards)

    def certify(self, images: Tensor, labels: Tensor, stop: Stop = "first_lost_region") -> C:
        """Certify each image for its label.

        Args:
            images: (N, C, H, W) float32 in [0, 1].
            labels: (N,) integers, the right classes.
            stop: ``"first_lost_region"`` leaves an image when it cannot be certified any more,
                which is enough for accuracies; ``"never"`` settles every region, for maps.

        Returns:
            The certificates, in the order of ``images``.

        Raises:
            PatchproofError: images or labels of another shape, type or range, no image at all, or a
                model in training mode.
        """
        examples = checked_examples(images, labels, self.image_size)
        keys: list[int] = []
        parts: list[C] = []
        for group, part in self.certify_stream(examples, stop):
            keys += group
            parts.append(part)
        return parts[0].concatenate(parts, torch.tensor(keys).argsort())

    def certify_stream(
        self, examples: Iterable[Example], stop: Stop = "first_lost_region"
    ) -> Iterator[tuple[list[int], C]]:
        """Certify images as they come, and yield them as they are done, out of order.

        Args:
            examples: (key, image (C, H, W), label) triples, taken one by one as there is room.
            stop: as for ``certify``.

        Yields:
            The keys of some images, and their certificates in the same order.
        """
        if stop not in ("first_lost_region", "never"):
            raise PatchproofError(f"stop: expected 'first_lost_region' or 'never', got {stop!r}")
        for decided in self._settle(iter(examples), stop):
            outputs, labels = decided.outputs, decided.labels
            prediction, case = self.aggregation.predict(outputs)
            verdicts = self.aggregation.certify(outputs, labels, self.corruption.patterns)
            shared = {
                "prediction": prediction,
                "case": case,
                "forwards": decided.forwards,
                "smallest_margin": outputs.margins.masked_fill(~outputs.known, torch.inf).amin(1),
                "verdicts": verdicts,
                "corruption": self.corruption,
                "regions": self.regions,
                "threat": self.threat,
            }
            yield decided.keys, self._promise(outputs, labels, shared)

    def tune_batch_size(self, image: Tensor, images: int | None = None) -> int:
        """Measure which batch size is fastest for images like ``image`` (C, H, W), and keep it.

        No batch is timed that is larger than all views of so many ``images``.
        """
        check_images(image[None], self.image_size)
        image = image.to(self.device)
        largest = self._largest_batch(image, 4 * default_batch_size(image, self.device))
        if images is not None:
            largest = max(1, min(largest, images * self._forwards))
        batch = image.expand(largest, -1, -1, -1)
        forwards = torch.arange(largest, device=image.device) % self._forwards
        with exact_inference(image.device):
            self.batch_size = fastest_batch_size(
                lambda size: self.views.evaluate(self.model, batch[:size], forwards[:size]),
                largest,
                image.device,
            )
        return self.batch_size

    @property
    def _forwards(self) -> int:
        """The number of model forwards that yield all views of an image."""
        return self.views.count // self.views.per_forward

    def _largest_batch(self, image: Tensor, size: int) -> int:
        """Return ``size``, or what the memory budget allows if that is less."""
        if self.memory_budget is None:
            return size
        with exact_inference(image.device):
            needed = bytes_per_image(self.model, lambda: self.model(image[None].clone()))
        if needed > self.memory_budget:
            raise PatchproofError(
                f"memory_budget: expected at least the {needed:,} bytes of one image, "
                f"got {self.memory_budget:,}"
            )
        return min(size, self.memory_budget // needed)

    def _settle(self, examples: Iterator[Example], stop: Stop | None) -> Iterator[Pool]:
        """Evaluate the views that are wanted until none is, and yield the images that are decided.

        Args:
            examples: the images; their labels are used for certification only.
            stop: when to leave an image that is being certified; None to predict only.
        """
        check_model(self.model)
        pool = self._admit(examples, 1, stop)
        if pool is None:
            return
        priority = self._priority(pool, stop)
        first_wave = max(1, int((priority >= CERTAIN).sum()))
        asked = self.batch_size or default_batch_size(pool.images[0], self.device)
        batch_size = self._largest_batch(pool.images[0], asked)
        while True:
            image, forward = choose(priority, pool.forwards, batch_size)
            while len(image) < batch_size:
                more = self._admit(examples, -(-(batch_size - len(image)) // first_wave), stop)
                if more is None:
                    image, forward = choose(priority, pool.forwards, batch_size, fill=True)
                    break
                pool = Pool.join(pool, more)
                priority = torch.cat([priority, self._priority(more, stop)])
                image, forward = choose(priority, pool.forwards, batch_size)
            if not len(pool):
                return
            if len(image):
                scores = self._evaluate(pool.images[image.to(self.device)], forward.to(self.device))
                pool.record(image, forward, scores.cpu())
                batch_size = min(batch_size, self.batch_size or batch_size)
                news = torch.bincount(image).nonzero().squeeze(1)  # others want what they wanted
                priority[news] = self._priority(pool.select(news), stop)
            decided = priority.amax(1) == 0
            if decided.any():
                done = pool.select(decided.nonzero().squeeze(1))
                if (done.outputs.known & (done.outputs.labels == INVALID_LABEL)).any():
                    warnings.warn(
                        "the model's output is not finite for some views: they count as corrupted",
                        stacklevel=2,
                    )
                left = (~decided).nonzero().squeeze(1)
                pool, priority = pool.select(left), priority[left]
                yield done

    def _admit(self, examples: Iterator[Example], count: int, stop: Stop | None) -> Pool | None:
        """Start on the next ``count`` images, or fewer, or return None if there are no more."""
        taken = list(islice(examples, count))
        if not taken:
            return None
        for _, image, _ in taken:
            check_images(image[None], self.image_size)
        keys, images, labels = zip(*taken, strict=True)
        stacked = torch.stack(images).to(self.device)
        if not self._classes:
            none = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._classes = self._evaluate(stacked[:1], none).shape[2]
        numbers = torch.tensor(labels)
        if stop is not None:
            check_label_range(numbers, self._classes)
        outputs = Outputs.empty(
            len(taken), self.views.count, self._classes, self.aggregation.needs_scores
        )
        return Pool(list(keys), stacked, numbers, outputs, torch.zeros_like(numbers))

    def _priority(self, pool: Pool, stop: Stop | None) -> Tensor:
        """Return the priority of each forward of each image, (N, F); 0 where it is not wanted."""
        goal = None if stop is None else Goal(pool.labels, self.corruption.patterns, stop)
        views = self.aggregation.next_views(pool.outputs, goal)
        return views.view(len(views), self._forwards, self.views.per_forward).amax(2)

    def _evaluate(self, images: Tensor, forwards: Tensor) -> Tensor:
        """Return the scores, (B, per_forward, classes); halve the batches where memory runs out."""
        with exact_inference(images.device):
            scores, fitting = in_fitting_batches(
                lambda i, f: self.views.evaluate(self.model, i, f), images, forwards
            )
        if fitting < len(images):
            self.batch_size = fitting
        expected = (len(images), self.views.per_forward)
        if scores.ndim != 3 or tuple(scores.shape[:2]) != expected or scores.shape[2] < 2:
            raise PatchproofError(
                f"model: expected logits of shape ({len(images)}, classes >= 2), "
                f"got {(len(scores), *scores.shape[2:])}"
            )
        if self._classes not in (0, scores.shape[2]):
            raise PatchproofError(
                f"model: expected {self._classes} classes as before, got {scores.shape[2]}: "
                "make a new defense for another model"
            )
        return scores


class ViewDefense(ViewSystem[Certification]):
    """Views, a model and an aggregation that recovers the right label; see ``ViewSystem``."""

    kind = "recovery"

    def _promise(self, outputs: Outputs, labels: Tensor, shared: dict[str, Any]) -> Certification:
        holds = (shared["verdicts"] == Verdict.HOLDS).all(1)
        return Certification(
            **shared,
            certified=holds & (shared["prediction"] == labels),
            paper_condition=self.aggregation.paper_condition(
                outputs, labels, self.corruption.patterns
            ),
        )


class ViewDetector(ViewSystem[DetectionCertification]):
    """Views, a model and an aggregation that returns a label or an alert; see ``ViewSystem``."""

    kind = "detection"
    aggregation: DetectingAggregation

    def _promise(
        self, outputs: Outputs, labels: Tensor, shared: dict[str, Any]
    ) -> DetectionCertification:
        thresholds = self.aggregation.thresholds(outputs, labels, self.corruption.patterns)
        return DetectionCertification(
            **shared,
            certified_detection=thresholds.certified_detection(self.aggregation.tau),
            unmasked=thresholds.unmasked,
            alert_threshold=thresholds.alert,
            certified_above=thresholds.certified_above,
            certified_threshold=thresholds.certified,
        )
