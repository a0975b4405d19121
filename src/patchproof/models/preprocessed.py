"""A model with its own resize and normalisation inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class Preprocessed(nn.Module):
    """Resize and normalise inside the model, so that patches live in the user's pixels.

    A patch of a few pixels touches more pixels after a resize. Masks that act before the resize, as
    here, remove all of it; masks of the resized image would need to be larger.

    Args:
        model: from normalised images of ``input_size`` to logits.
        mean: mean of each channel, in pixel units of [0, 1].
        std: standard deviation of each channel.
        input_size: (H, W) that ``model`` wants; images of another size are resized to it
            (bicubic, antialiased). None leaves the size as it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def extra_repr(self) -> str:
        """Return the size that the model wants."""
        return f"input_size={self.input_size}"

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1], of any size, to logits (N, classes)."""
        if self.input_size is not None and images.shape[2:] != self.input_size:
            images = functional.interpolate(
                images, self.input_size, mode="bicubic", antialias=True, align_corners=False
            ).clamp(0.0, 1.0)
        logits: Tensor = self.model((images - self.mean) / self.std)
        return logits
