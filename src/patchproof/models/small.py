"""Small residual networks that train from scratch on a processor in minutes.

They take images in [0, 1]: a batch normalisation after the first convolution learns the
normalisation that other models are given as constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError


class PooledResidualBlock(nn.Module):
    """Halve the resolution, change the width, then add one residual convolution.

    The pooling comes before the first normalisation and activation, which then cost a quarter.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm2d(outputs)
        self.residual = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.residual_norm = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H // 2, W // 2)."""
        features = torch.relu(self.norm(self.pool(self.widen(features))))
        return features + torch.relu(self.residual_norm(self.residual(features)))


class SmallResNet(nn.Module):
    """A residual network for images of about 28 to 32 pixels a side.

    A stem, one block per further width, global max pooling, a linear layer. The default has 97
    million multiply-adds at 32x32. Max pooling keeps the strongest evidence of each channel, so
    that a masked area takes away its own evidence but does not dilute the rest.

    Args:
        classes: number of classes.
        channels: channels of the image.
        widths: channels of the stem, then of each block; every block halves the resolution.
        stem_stride: stride of the stem, 1 or 2; its kernel is 2 * stride + 1 wide. With 2, a
            network for MNIST is small enough for tens of thousands of images a second.

    Raises:
        PatchproofError: fewer than two widths, or another stride.
    """

    logit_scale = 0.125
    """Global maxima are large; scaled logits start near a uniform distribution."""

    def __init__(
        self,
        classes: int,
        channels: int,
        widths: Sequence[int] = (48, 48, 192, 192),
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1 or stem_stride not in (1, 2):
            raise PatchproofError(
                "expected two or more positive widths and a stem_stride of 1 or 2, got "
                f"{list(widths)} and {stem_stride}"
            )
        kernel = 2 * stem_stride + 1
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], kernel, stem_stride, stem_stride, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.blocks = nn.Sequential(*(PooledResidualBlock(*pair) for pair in pairwise(widths)))
        self.head = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, classes)."""
        logits: Tensor = self.head(self._features(images).amax((2, 3))) * self.logit_scale
        return logits

    def cell_logits(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to what the classifier says of each place, (N, classes, h, w).

        Each place sees much of the image. Its features are judged as if they were the maxima, so
        the logits of the image are no mean of these.
        """
        features = self._features(images).permute(0, 2, 3, 1)
        logits: Tensor = self.head(features) * self.logit_scale
        return logits.permute(0, 3, 1, 2)

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(
            self.stem(images.contiguous(memory_format=torch.channels_last))
        )
        return features


class TinyResNet(SmallResNet):
    """A residual network for 8x8 images: one block, 32 then 64 channels by default.

    Args:
        classes: number of classes.
        channels: channels of the image.
        widths: channels of the stem and of each block.
    """

    logit_scale = 0.25

    def __init__(self, classes: int, channels: int, widths: Sequence[int] = (32, 64)) -> None:
        super().__init__(classes, channels, widths)
