"""A model and images small enough to know what must come out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from patchproof import MinorityReports, PatchCleanser, SquarePatch
from patchproof.datasets import ImageDataset
from patchproof.datasets.images import ArrayPictures


class BrighterHalf(nn.Module):
    """Class 0 if the left half is brighter, class 1 if the right half is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images: Tensor) -> Tensor:
        left, right = images.chunk(2, dim=3)
        return self.scale * torch.stack([left.mean((1, 2, 3)), right.mean((1, 2, 3))], dim=1)


@dataclass(frozen=True)
class BreakablePictures(ArrayPictures):
    """Pictures of which some cannot be decoded; it counts what is opened."""

    broken: frozenset[int] = frozenset()
    opened: list[int] = field(default_factory=list)

    def open(self, index: int) -> Image.Image:
        self.opened.append(index)
        if index in self.broken:
            raise OSError("truncated")
        return super().open(index)


def make_halves(count: int = 20, broken: frozenset[int] = frozenset()) -> ImageDataset:
    """Return 8x8 images whose halves differ, from hardly (the first) to clearly (the last)."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, count)
    pixels = random.integers(0, 100, (count, 8, 8))
    for image, label, strength in zip(pixels, labels, np.linspace(-10, 150, count), strict=True):
        image[:, 4 * label : 4 * label + 4] += int(strength)
    return ImageDataset(
        name="halves",
        split="test",
        class_names=("left", "right"),
        image_size=(8, 8),
        channels=1,
        labels=torch.from_numpy(labels),
        indices=torch.arange(count),
        pictures=BreakablePictures(pixels.clip(0, 255).astype(np.uint8), "halves", broken),
    )


def make_defense(**options: Any) -> PatchCleanser:
    """Return PatchCleanser against 2x2 patches around the model above."""
    model = options.pop("model", None) or BrighterHalf().eval()
    settings = {"image_size": (8, 8), "masks_per_side": 3, "batch_size": 16} | options
    return PatchCleanser(model, settings.pop("threat", SquarePatch(2)), **settings)


def make_detector(**options: Any) -> MinorityReports:
    """Return Minority Reports against the same patches, around the same model."""
    settings = {"image_size": (8, 8), "masks_per_side": 3, "batch_size": 16} | options
    return MinorityReports(BrighterHalf().eval(), SquarePatch(2), **settings)
