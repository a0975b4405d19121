"""A small patch attack, enough to see what patches do to local logits (PatchGuard, Section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.threat import Threat


@dataclass(frozen=True)
class RandomPlaceAttack:
    """Projected gradient ascent on the loss of the undefended model, at one random place.

    The pixels of one patch region of each image, drawn with the seed and the image's index, start
    at random values and follow the sign of the gradient of the cross-entropy. The undefended model
    is a mean of local logits, so the attack knows of no defense: its failure proves nothing.

    Attributes:
        threat: one patch.
        steps: of the ascent.
        step_size: how far a step moves each pixel, in [0, 1].
        seed: of the places and the first values.

    Raises:
        PatchproofError: several patches, or numbers out of range.
    """

    threat: Threat
    steps: int = 60
    step_size: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threat.patches != 1:
            raise PatchproofError(f"threat: expected one patch, got {self.threat.label()}")
        if self.steps < 1 or not 0.0 < self.step_size <= 1.0:
            raise PatchproofError(
                "expected at least one step of a size in (0, 1], got "
                f"{self.steps} of {self.step_size}"
            )
        if self.seed < 0:
            raise PatchproofError(f"seed: expected a number from 0, got {self.seed}")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Return the attacked images, (N, C, H, W): equal to ``images`` outside of the patch."""
        inside, content = self._start(images, indices)
        inside = inside[:, None].to(images.device)
        content = content.to(images.device)
        with torch.enable_grad():
            for _ in range(self.steps):
                content.requires_grad_(True)
                loss = functional.cross_entropy(
                    model(torch.where(inside, content, images)), labels, reduction="sum"
                )
                (gradient,) = torch.autograd.grad(loss, content)
                content = (content.detach() + self.step_size * gradient.sign()).clamp(0.0, 1.0)
        return torch.where(inside, content, images)

    def _start(self, images: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pixels of the patches, (N, H, W) bool, and random images."""
        regions = self.threat.regions((images.shape[2], images.shape[3]))
        inside = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool)
        content = torch.empty(images.shape)
        for image, index in enumerate(indices.tolist()):
            random = np.random.default_rng((self.seed, index))
            region = int(random.integers(len(regions)))
            for top, left, height, width in regions.parts[region].tolist():
                inside[image, top : top + height, left : left + width] = True
            drawn = random.random(tuple(images.shape[1:]), dtype=np.float32)
            content[image] = torch.from_numpy(drawn)
        return inside, content

    def to_dict(self) -> dict[str, Any]:
        """Return all that decides the attacked images, as JSON values."""
        return {
            "type": type(self).__name__,
            "threat": self.threat.to_dict(),
            "steps": self.steps,
            "step_size": self.step_size,
            "seed": self.seed,
        }
