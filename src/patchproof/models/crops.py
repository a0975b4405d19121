"""Networks that classify an image from one crop of it (randomized cropping)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError

CropSize = tuple[int, int]
"""Height and width of a crop in pixels."""


class CropNetwork(Protocol):
    """A network that is made for crops of one size, and is told where they are.

    Attributes:
        crop_size: (height, width) in pixels.
    """

    crop_size: CropSize

    def cropped(self, images: Tensor, image: Tensor, corners: Tensor) -> Tensor:
        """Return the logits, (B, classes), of crops of images (N, C, H, W) in [0, 1].

        Args:
            images: those that are cropped.
            image: (B,) int64, which image each crop is of.
            corners: (B, 2) int64, its top left pixel.
        """
        ...


def check_crop_size(crop_size: object, image_size: tuple[int, int]) -> CropSize:
    """Return (height, width) of a crop inside the image, or raise ``PatchproofError``."""
    size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
    match size:
        case (bool(), _) | (_, bool()) | [bool(), _] | [_, bool()]:
            pass
        case (int(height), int(width)) | [int(height), int(width)] if (
            1 <= height <= image_size[0] and 1 <= width <= image_size[1]
        ):
            return height, width
    raise PatchproofError(
        f"crop_size: expected (height, width) from 1 pixel to the {image_size[0]}x{image_size[1]} "
        f"of the image, got {crop_size!r}"
    )


def cut(images: Tensor, image: Tensor, corners: Tensor, size: CropSize) -> Tensor:
    """Return crops, (B, C, height, width), of images (N, C, H, W); see ``CropNetwork.cropped``."""
    windows = images.unfold(2, size[0], 1).unfold(3, size[1], 1)
    return windows[image, :, corners[:, 0], corners[:, 1]]


class PositionMap(nn.Module):
    """Adds a learned value to every pixel of an image, which tells where in it a crop is.

    The learnable positional encoding of randomized cropping (Section 4), bounded to a share of the
    value range so that it cannot replace what the pixel shows.

    Args:
        channels: channels of the image.
        image_size: (H, W) in pixels.
        bound: the values lie within this of 0; pixels lie in [0, 1].
    """

    def __init__(self, channels: int, image_size: tuple[int, int], bound: float = 0.1) -> None:
        super().__init__()
        self.bound = bound
        self.weight = nn.Parameter(torch.zeros(channels, *image_size))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to the same with the map added."""
        shifted: Tensor = images + self.bound * self.weight.tanh()
        return shifted


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, features: Tensor) -> Tensor:
        added: Tensor = features + self.layers(features)
        return added


def _convolution(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    """Return a 3x3 convolution; pooling comes before normalisation, which then costs a quarter."""
    pooling = [nn.MaxPool2d(2, ceil_mode=True)] if pool else []
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        *pooling,
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class CropResNet9(nn.Module):
    """A residual network of nine layers for crops, without a last pooling (Section 4).

    Two poolings take a 10x10 crop to 3x3 positions, all of which the last layer sees.

    Args:
        classes: number of classes.
        channels: channels of the image.
        image_size: (H, W) of the image in pixels.
        crop: side of the crops, or (height, width), in pixels.
        widths: channels of the stem and of three stages.
        positions: add a ``PositionMap`` to the image.

    Attributes:
        crop_size: what the network was made for.
    """

    logit_scale = 0.125
    """Scaled logits start near a uniform distribution."""

    def __init__(
        self,
        classes: int,
        channels: int,
        image_size: tuple[int, int],
        crop: int | Sequence[int] = 10,
        widths: Sequence[int] = (32, 64, 128, 128),
        positions: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) != 4 or min(widths) < 1:
            raise PatchproofError(f"expected four positive widths, got {list(widths)}")
        self.crop_size = check_crop_size(crop, image_size)
        self.image_size = image_size
        self.positions = PositionMap(channels, image_size) if positions else nn.Identity()
        stem, first, second, last = widths
        rows, columns = (-(-side // 4) for side in self.crop_size)
        self.layers = nn.Sequential(
            _convolution(channels, stem),
            _convolution(stem, first, pool=True),
            _Residual(first),
            _convolution(first, second, pool=True),
            _convolution(second, last),
            _Residual(last),
            nn.Flatten(),
            nn.Linear(last * rows * columns, classes),
        )

    def cropped(self, images: Tensor, image: Tensor, corners: Tensor) -> Tensor:
        """Return the logits, (B, classes), of crops; see ``CropNetwork.cropped``."""
        crops = cut(self.positions(images), image, corners, self.crop_size)
        logits: Tensor = self.layers(crops.contiguous(memory_format=torch.channels_last))
        return logits * self.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to the mean logits of crops that cover them."""
        starts = [
            sorted({*range(0, length - side, side), length - side})
            for length, side in zip(self.image_size, self.crop_size, strict=True)
        ]
        corners = torch.cartesian_prod(*(torch.tensor(start) for start in starts))
        image = torch.arange(len(images)).repeat_interleave(len(corners))
        logits = self.cropped(
            images,
            image.to(images.device),
            corners.repeat(len(images), 1).to(images.device),
        )
        return logits.view(len(images), len(corners), -1).mean(1)
