"""Defenses without a certificate: a network behind a step that is meant to take a patch away."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from patchproof.defenses.checks import check_images, check_model
from patchproof.defenses.inference import (
    bytes_per_image,
    check_batch_size,
    default_batch_size,
    in_fitting_batches,
    model_device,
)
from patchproof.defenses.saved import SavedDefense
from patchproof.defenses.surrogate import NetworkScores, Surrogate
from patchproof.errors import PatchproofError
from patchproof.precision import exact_inference
from patchproof.results import Case, Prediction
from patchproof.threat import Threat, threat_from_dict
from patchproof.threat.regions import ImageSize, check_image_size


class PreprocessedDefense(SavedDefense):
    """A defense that nothing is proved about: it predicts, and certifies nothing.

    What it withstands is known from attacks alone, and a better attack may find less.

    Attributes:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what an attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        network: the step and the model after it, from images to logits.
        batch_size: images in one forward pass; None picks one by the size of the image.
        memory_budget: bytes that the activations of one batch may take, by an estimate from the
            layers' inputs and outputs; None for no limit.
    """

    _FORWARDS: ClassVar[int] = 1
    """Model forwards that an image takes."""

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if memory_budget is not None and memory_budget < 1:
            raise PatchproofError(f"memory_budget: expected bytes >= 1, got {memory_budget!r}")
        self.model = check_model(model)
        self.threat = threat
        self.image_size = check_image_size(image_size)
        threat.regions(self.image_size)  # or raises
        self.batch_size = check_batch_size(batch_size)
        self.memory_budget = memory_budget
        self.network = model

    def _check_sides(self, **sides: int) -> None:
        """Raise ``PatchproofError`` for squares that are larger than the image."""
        for name, side in sides.items():
            if side > min(self.image_size):
                height, width = self.image_size
                raise PatchproofError(
                    f"{name}: expected at most the image's {height}x{width} pixels, got {side}"
                )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return model_device(self.model)

    def settings(self) -> dict[str, Any]:
        """Return the arguments that say how the step works, by their names, as JSON values."""
        return {name: getattr(self, name) for name in self._OWN}

    def to_dict(self) -> dict[str, Any]:
        """Return all that decides the labels, but the model, as JSON values."""
        return {
            "type": type(self).__name__,
            "threat": self.threat.to_dict(),
            "image_size": list(self.image_size),
            **self.settings(),
        }

    @classmethod
    def from_dict(cls, model: nn.Module, values: dict[str, Any]) -> Self:
        """Return the defense of ``model`` that ``to_dict`` described."""
        height, width = values["image_size"]
        own: dict[str, Any] = {name: values[name] for name in cls._OWN}
        return cls(model, threat_from_dict(values["threat"]), image_size=(height, width), **own)

    def surrogates(self) -> dict[str, Surrogate]:
        """Return the network with the step before it, through which an attacker may see."""
        return {"logits": NetworkScores(self.network)}

    def predict(self, images: Tensor) -> Tensor:
        """Return the label of each image: the class of the highest logit, the lowest of equal ones.

        Args:
            images: (N, C, H, W) float32 in [0, 1].

        Returns:
            (N,) int64.

        Raises:
            PatchproofError: images of another shape, type or range, or a model in training mode.
        """
        return self.infer(images).label

    def infer(self, images: Tensor) -> Prediction:
        """Return what ``predict`` does, with the case and the model forwards of each image."""
        check_images(images, self.image_size)
        check_model(self.model)
        if not len(images):
            none = torch.empty(0, dtype=torch.int64)
            return Prediction(none, none, none)
        size = self._largest_batch(images[0])
        logits = torch.cat([self._logits(batch) for batch in torch.split(images, size)])
        label, case = _decide(logits)
        return Prediction(label, case, torch.full_like(label, self._FORWARDS))

    def _largest_batch(self, image: Tensor) -> int:
        """Return how many images like ``image``, (C, H, W), go into one forward pass."""
        size = self.batch_size or default_batch_size(image, self.device)
        if self.memory_budget is None:
            return size
        one = image[None].to(self.device)
        with exact_inference(self.device):
            needed = bytes_per_image(self.network, lambda: self.network(one.clone()))
        if needed > self.memory_budget:
            raise PatchproofError(
                f"memory_budget: expected at least the {needed:,} bytes of one image, "
                f"got {self.memory_budget:,}"
            )
        return min(size, self.memory_budget // needed)

    def _logits(self, images: Tensor) -> Tensor:
        """Return what the network says of a batch, (N, classes) on the CPU."""

        def run(images: Tensor, _: Tensor) -> Tensor:
            logits: Tensor = self.network(images.clone())  # it may change its input in place
            return logits.cpu()

        with exact_inference(self.device):
            logits, _ = in_fitting_batches(
                run, images.to(self.device), torch.zeros(len(images), dtype=torch.int64)
            )
        if logits.ndim != 2 or logits.shape[1] < 2:
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
        warnings.warn("the model's output is not finite for some images", stacklevel=2)
    label = torch.where(finite, logits.argmax(1), 0)
    return label, torch.where(finite, int(Case.AGREED), int(Case.MAJORITY))
