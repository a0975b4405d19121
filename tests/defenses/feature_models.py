"""Networks of small views, small enough for many attacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.models.ablation import Ablation, Kept

SIZE = (8, 8)


class Hostile(nn.Module):
    """Local logits that do as they like where a pixel is darker than 0.25 or brighter than 0.75.

    On images within these bounds they are a random convolution of what differs from grey, so that
    features lean to some class as much as the image is dark or bright. A patch can make any feature
    that sees it say nearly anything.
    """

    def __init__(
        self, seed: int = 0, stride: int = 1, gain: float = 10.0, strength: float = 30.0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.tame = nn.Conv2d(1, 3, 3, stride, padding=1, bias=False)
        self.wild = nn.Conv2d(2, 3, 3, stride, padding=1, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.gain = gain
        self.strength = strength * gain

    def local_logits(self, images: Tensor) -> Tensor:
        outside = torch.cat([functional.relu(images - 0.75), functional.relu(0.25 - images)], 1)
        logits: Tensor = self.gain * self.tame(images - 0.5) + self.strength * self.wild(outside)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.local_logits(images).mean((2, 3))


class HostileBands(nn.Module):
    """The same for ablated images: it looks at what is kept, and at nothing else."""

    def __init__(self, ablation: Ablation, seed: int = 0) -> None:
        super().__init__()
        self.ablation = ablation
        self.local = Hostile(seed)

    def ablated(self, images: Tensor, kept: Kept) -> Tensor:
        crop = kept.crop(images).unflatten(0, (len(images), -1)).mean(1)
        return 3.0 * self.local(crop)

    def forward(self, images: Tensor) -> Tensor:
        return self.local(images)


def mild_images(count: int, seed: int = 0) -> Tensor:
    """Return (N, 1, 8, 8) images within [0.25, 0.75], from hardly to clearly dark or bright."""
    generator = torch.Generator().manual_seed(seed)
    level = 0.2 * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1)
    texture = 0.4 * (torch.rand(count, 1, *SIZE, generator=generator) - 0.5)
    return (0.5 + level + texture).clamp(0.25, 0.75)
