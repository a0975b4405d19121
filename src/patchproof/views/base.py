"""The protocol of a set of views."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from patchproof.results import Corruption
from patchproof.threat import Threat


class Views(Protocol):
    """Parts of an image that the model looks at, numbered 0 to V - 1.

    One model forward yields ``per_forward`` consecutive views: 1 for masks, bands and crops, all of
    them for a network whose local features are the views.
    """

    count: int
    per_forward: int

    def corruption(self, threat: Threat) -> Corruption:
        """Enumerate which views each patch region corrupts: those that see a pixel of it."""
        ...

    def evaluate(self, model: nn.Module, images: Tensor, forwards: Tensor) -> Tensor:
        """Run one forward pass for each image.

        Args:
            model: from images to logits.
            images: (B, C, H, W) float32 in [0, 1].
            forwards: (B,) int64, forward f yields the views from f * per_forward on.

        Returns:
            (B, per_forward, classes) float32 scores.
        """
        ...
