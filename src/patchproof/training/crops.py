"""Recipe ``crops``: train on random crops, as randomized cropping classifies by them.

Randomized cropping classifies many crops of an image and counts their votes. Algorithm 1 of its
paper trains the network on what it will see: of every image in every step one crop, drawn uniformly
over all places. Nothing in it depends on the patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec
from patchproof.models.crops import CropNetwork, CropSize, check_crop_size, cut
from patchproof.training.voting import VotingRecipe

VALIDATION_CROPS = 49
"""Crops that vote in a validation, on a grid of 7 by 7 places."""


@dataclass(frozen=True, kw_only=True)
class CropRecipe(VotingRecipe):
    """Train on one random crop of each image (Algorithm 1).

    A network with a method ``cropped`` is told where the crop is; any other sees the crop alone.
    The epoch is chosen by the accuracy of a majority vote of up to 49 evenly spread crops on at
    most 1,000 validation images.

    Attributes:
        crop_size: (height, width) of the crops in pixels.
    """

    crop_size: CropSize

    @property
    def name(self) -> str:
        """Return ``crops``."""
        return "crops"

    def draw(self, spec: ModelSpec, count: int) -> Tensor | None:
        """Return the corners of the crops of a validation, (V, 2) int64."""
        size = check_crop_size(self.crop_size, spec.image_size)
        side = round(VALIDATION_CROPS**0.5)
        rows, columns = (
            torch.unique(torch.linspace(0, length - crop, side).round().long())
            for length, crop in zip(spec.image_size, size, strict=True)
        )
        return torch.cartesian_prod(rows, columns)

    def check(self, network: nn.Module, spec: ModelSpec) -> None:
        """Raise ``PatchproofError`` if the network was made for crops of another size."""
        made_for = getattr(network, "crop_size", self.crop_size)
        if made_for != self.crop_size:
            raise PatchproofError(
                f"expected the crops that the network was made for, {made_for}, "
                f"got {self.crop_size}"
            )
        images = torch.zeros(1, spec.channels, *spec.image_size)
        try:
            with torch.no_grad():
                self.view(network.eval(), images, torch.zeros(1, 2, dtype=torch.int64))
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            raise PatchproofError(
                f"expected a network that classifies crops of {self.crop_size} pixels, got "
                f"{spec.name}, which fails: {first_line}"
            ) from error

    def loss(
        self, network: nn.Module, views: Tensor, labels: Tensor, drawn: Tensor | None
    ) -> Tensor:
        """Return the cross-entropy of one random crop of each image."""
        corners = torch.stack(
            [
                torch.randint(0, length - crop + 1, (len(views),))
                for length, crop in zip(views.shape[2:], self.crop_size, strict=True)
            ],
            dim=1,
        )
        logits = self.view(network, views, corners.to(views.device))
        return functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def view(self, network: nn.Module, images: Tensor, places: Tensor) -> Tensor:
        """Return logits (N, classes) of one crop of each image (N, C, H, W), at (N, 2)."""
        each = torch.arange(len(images), device=images.device)
        if hasattr(network, "cropped"):
            return cast(CropNetwork, network).cropped(images, each, places)
        logits: Tensor = network(cut(images, each, places, self.crop_size))
        return logits

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return super().to_dict() | {"crop_size": list(self.crop_size)}
