"""Defenses that certify whole images, batch after batch, in order."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Generic, TypeVar, get_args

import torch
from torch import Tensor

from patchproof.aggregation.base import Stop
from patchproof.defenses.checks import check_images, check_model, checked_examples
from patchproof.defenses.inference import model_device
from patchproof.defenses.saved import SavedDefense
from patchproof.errors import PatchproofError
from patchproof.results import Certificates, Prediction

C = TypeVar("C", bound=Certificates)


class BatchedDefense(SavedDefense, Generic[C]):
    """A defense whose images have nothing to share: each batch is decided and then forgotten."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return model_device(self.model)

    def predict(self, images: Tensor) -> Tensor:
        """Return the label of each image.

        Args:
            images: (N, C, H, W) float32 in [0, 1].

        Returns:
            (N,) int64.

        Raises:
            PatchproofError: images of another shape, type or range, or a model in training mode.
        """
        return self.infer(images).label

    @abstractmethod
    def infer(self, images: Tensor) -> Prediction:
        """Return what ``predict`` does, with the case and the model forwards of each image."""

    def certify(self, images: Tensor, labels: Tensor, stop: Stop = "first_lost_region") -> C:
        """Certify each image for its label.

        Args:
            images: (N, C, H, W) float32 in [0, 1].
            labels: (N,) integers, the right classes.
            stop: ``"first_lost_region"`` may leave an image when it cannot be certified any more,
                which is enough for accuracies; ``"never"`` settles every region, for maps.

        Returns:
            The certificates, in the order of ``images``.

        Raises:
            PatchproofError: images or labels of another shape, type or range, no image at all, or a
                model in training mode.
        """
        examples = checked_examples(images, labels, self.image_size)
        parts = [part for _, part in self.certify_stream(examples, stop)]
        return parts[0].concatenate(parts, torch.arange(len(images)))

    def certify_stream(
        self, examples: Iterable[tuple[int, Tensor, int]], stop: Stop = "first_lost_region"
    ) -> Iterator[tuple[list[int], C]]:
        """Certify images as they come, and yield them batch after batch, in order.

        Args:
            examples: (key, image (C, H, W), label) triples, taken a batch at a time.
            stop: as for ``certify``.

        Yields:
            The keys of some images, and their certificates in the same order.
        """
        if stop not in (known := get_args(Stop)):
            raise PatchproofError(f"stop: expected {either(known)}, got {stop!r}")
        check_model(self.model)
        waiting = iter(examples)
        while taken := list(islice(waiting, self._images_at_once)):
            for _, image, _ in taken:
                check_images(image[None], self.image_size)
            keys, images, labels = zip(*taken, strict=True)
            stacked = torch.stack(images).to(self.device)
            yield list(keys), self._certify(stacked, torch.tensor(labels), stop)

    @property
    @abstractmethod
    def _images_at_once(self) -> int:
        """The images of a batch."""

    @abstractmethod
    def _certify(self, images: Tensor, labels: Tensor, stop: Stop) -> C:
        """Certify a batch of images (N, C, H, W) on the model's device, for labels (N,)."""


def either(names: tuple[str, ...]) -> str:
    """Return the names for a message: ``"'a' or 'b'"``."""
    return " or ".join(repr(name) for name in names)
