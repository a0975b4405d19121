"""Bags of local features: networks whose every output sees a small part of the image.

BagNet (Brendel and Bethge, 2019) is a ResNet with most 3x3 kernels replaced by 1x1; PatchGuard
(Section 3.3, "Using small convolution kernels") builds on it. ``BagNet`` is the small one for
images of 28 to 32 pixels a side, so that they need no resize.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError


class LocalNetwork(Protocol):
    """A network whose outputs each see a part of the image."""

    def local_logits(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to the logits of every place, (N, classes, h, w)."""
        ...


def local_logits(network: nn.Module, images: Tensor) -> Tensor:
    """Return the local logits of a network that has some, (N, classes, h, w)."""
    return cast(LocalNetwork, network).local_logits(images)


class PointwiseBlock(nn.Module):
    """Two 1x1 convolutions with a residual connection: no pixel more is seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, width, h, w) to the same shape."""
        inner = torch.relu(self.first_norm(self.first(features)))
        return features + torch.relu(self.second_norm(self.second(inner)))


class BagNet(nn.Module):
    """A bag of local features for images of about 28 to 32 pixels a side.

    3x3 convolutions that make up the receptive field, then 1x1 convolutions alone, then a linear
    layer at every place. The logits of an image are the mean of its local logits. Convolutions are
    padded, so that there is a local feature for every ``stride`` pixels; those at the border see
    less of the image.

    Args:
        classes: number of classes.
        channels: channels of the image.
        receptive_field: pixels a side that a local feature sees, an odd number.
        stride: pixels between neighbouring local features, 1, 2 or 4.
        widths: channels after the first 3x3 convolution, after the others, and of the 1x1 blocks.
        depth: 1x1 blocks, each of two convolutions.

    Raises:
        PatchproofError: a receptive field that no 3x3 convolutions with this stride have, or other
            numbers out of range.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        receptive_field: int = 9,
        stride: int = 2,
        widths: Sequence[int] = (64, 128, 256),
        depth: int = 2,
    ) -> None:
        super().__init__()
        if len(widths) != 3 or min(widths) < 1 or depth < 0:
            raise PatchproofError(
                f"expected three positive widths and a depth from 0, got {list(widths)} and {depth}"
            )
        strides = kernel_strides(receptive_field, stride)
        outputs = [widths[0]] + [widths[1]] * (len(strides) - 1)
        layers: list[nn.Module] = []
        for (inputs, width), step in zip(pairwise([channels, *outputs]), strides, strict=True):
            layers += [
                nn.Conv2d(inputs, width, 3, step, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        layers += [
            nn.Conv2d(outputs[-1], widths[2], 1, bias=False),
            nn.BatchNorm2d(widths[2]),
            nn.ReLU(),
        ]
        self.trunk = nn.Sequential(*layers, *(PointwiseBlock(widths[2]) for _ in range(depth)))
        self.head = nn.Conv2d(widths[2], classes, 1)

    def local_logits(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to the logits of every place, (N, classes, h, w)."""
        features = self.trunk(images.contiguous(memory_format=torch.channels_last))
        logits: Tensor = self.head(features)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, classes)."""
        return self.local_logits(images).mean((2, 3))


def kernel_strides(receptive_field: int, stride: int) -> list[int]:
    """Return the strides of the fewest 3x3 convolutions with this receptive field and stride.

    A convolution widens the receptive field by twice the stride of its input, so few are needed
    where the stride comes early.

    Raises:
        PatchproofError: there are none.
    """
    if stride in (1, 2, 4):
        halvings = stride.bit_length() - 1
        for before in range(1, receptive_field):
            for between in range(1, receptive_field) if halvings == 2 else [0]:
                # ``before`` at stride 1, ``between`` at stride 2, the rest at the last stride.
                seen = 1 + 2 * before + 4 * between
                rest, odd = divmod(receptive_field - seen, 2 * stride)
                if rest < 0 or odd or (halvings == 0 and before > 1):
                    continue
                strides = [1] * (before + between + rest)
                for place in [before - 1, before + between - 1][:halvings]:
                    strides[place] = 2
                return strides
    raise PatchproofError(
        "expected a receptive field of 3x3 convolutions with stride 1, 2 or 4 (odd, from 3), got "
        f"{receptive_field} with stride {stride}"
    )
