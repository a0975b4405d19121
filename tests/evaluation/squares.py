"""A model with local features, and images, small enough to know what must come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from halves import BreakablePictures
from torch import Tensor, nn

from patchproof.datasets import ImageDataset
from patchproof.evaluation.feature_analyses import Subject
from patchproof.evaluation.feature_recording import Attack, FeatureArchive, FeatureRecording
from patchproof.views import LocalFeatureViews

SIZE = (10, 10)
TOLERANCE = 1e-4


class Squares(nn.Module):
    """Local logits of three classes over 2x2 pixels, stride 2: a random linear map."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.local = nn.Conv2d(1, 3, 2, stride=2)
        with torch.no_grad():
            self.local.weight.copy_(20 * torch.randn(3, 1, 2, 2, generator=generator))
            self.local.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))

    def local_logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.local(images - 0.5)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.local_logits(images).mean((2, 3))


def make_squares(
    count: int = 24, model: nn.Module | None = None, broken: frozenset[int] = frozenset()
) -> ImageDataset:
    """Return images of which the model gets all but every fifth right."""
    random = np.random.default_rng(0)
    level = random.integers(60, 190, (count, 1, 1))
    pixels = (level + random.integers(-60, 60, (count, *SIZE))).astype(np.uint8)
    with torch.no_grad():
        images = torch.from_numpy(pixels).float()[:, None] / 255
        labels = (model or Squares())(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 3
    return ImageDataset(
        name="squares",
        split="test",
        class_names=("a", "b", "c"),
        image_size=SIZE,
        channels=1,
        labels=labels,
        indices=torch.arange(count),
        pictures=BreakablePictures(pixels, "squares", broken),
    )


def make_archive(folder: Path, **options: Any) -> FeatureArchive:
    """Return an archive of the model and the images above; it counts its forwards."""
    model = options.pop("model") if "model" in options else Squares().eval()
    dataset = options.pop("dataset") if "dataset" in options else make_squares()
    views = options.pop("views") if "views" in options else LocalFeatureViews(model, SIZE)
    return FeatureArchive(folder, model, dataset, views, **({"batch_size": 4} | options))


def make_subject(folder: Path, name: str = "squares", **options: Any) -> Subject:
    """Return the model above as it is analysed."""
    archive = make_archive(folder, **options)

    def record(attack: Attack | None) -> FeatureRecording:
        return archive.record(attack=attack)

    return Subject(name, archive.views, record, SIZE, TOLERANCE, {"made": {"recipe": "plain"}})
