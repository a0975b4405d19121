"""Small victims whose best patches are known, and threats to attack them with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.attacks import Victim
from patchproof.results import ALERT
from patchproof.threat import Box

SIZE = (7, 9)
CHANNELS = 2
CLASSES = 3
THREATS: dict[str, pp.Threat] = {
    "square": pp.SquarePatch(3),
    "corners": pp.RectanglePatch(2, 4, "corners"),
    "in a box": pp.SquarePatch(2, Box(1, 3, 5, 4)),
    "two sizes": pp.RectanglePatches([(1, 5), (4, 2)]),
    "diamond": pp.StencilPatch.diamond(3),
    "two dots": pp.StencilPatch([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]),
    "ring": pp.StencilPatch(["####", "#..#", "#..#", "####"]),
    "either": pp.AnyPatch([pp.SquarePatch(2), pp.StencilPatch.diamond(3)]),
    "any rectangle": pp.AnyRectangle(4),
    "two squares": pp.MultiplePatches(2, pp.SquarePatch(2)),
    "three dots": pp.MultiplePatches(3, pp.SquarePatch(1)),
    "any four pixels": pp.SparsePixels(4),
}


class Linear(nn.Module):
    """Scores that are sums of weighted pixels: weights (classes, C, H, W) and biases (classes,)."""

    def __init__(self, weights: Tensor, biases: Tensor) -> None:
        super().__init__()
        self.weights, self.biases = nn.Parameter(weights), nn.Parameter(biases)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights.flatten(1).T + self.biases


def linear(seed: int = 0, classes: int = CLASSES) -> Linear:
    """Return one with whole weights from -3 to 3, none of them equal for two classes."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(classes, CHANNELS, *SIZE, generator=generator).argsort(0)
    sign = torch.randint(2, (CHANNELS, *SIZE), generator=generator) * 2 - 1
    return Linear(((order + 1) * sign).float(), torch.zeros(classes)).eval()


def convolutional(seed: int = 0) -> nn.Module:
    """Return a small network with random weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * SIZE[0] * SIZE[1], CLASSES),
    ).eval()


def labels_alone(model: nn.Module) -> Victim:
    """Return a victim that gives labels and no scores."""
    return Victim(Victim.of_model(model).predict)


def alarmed_by_white(model: nn.Module) -> Victim:
    """Return a victim that raises an alert at any pixel above 0.9, of which its scores say none."""
    plain = Victim.of_model(model)

    def predict(images: Tensor) -> Tensor:
        return torch.where(images.flatten(1).amax(1) > 0.9, ALERT, plain.predict(images))

    return Victim(predict, plain.surrogates)


def examples(count: int, model: nn.Module, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return dim images, and the model's labels for all but every fifth.

    Pixels are multiples of 1/64, so that a linear model rounds nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(52, (count, CHANNELS, *SIZE), generator=generator) / 64
    labels = Victim.of_model(model).predict(images)
    labels[::5] = (labels[::5] + 1) % CLASSES
    return images, labels


def region_masks(threat: pp.Threat) -> Tensor:
    """Return the pixels of every region, (R, H, W) bool."""
    regions = threat.regions(SIZE)
    return regions.accumulate(torch.eye(len(regions))) > 0
