"""Networks that classify an image from one band or block of it (de-randomized smoothing).

Levine and Feizi (2020) show the network one band of the image at a time and count votes. A network
that is made for ablated images sees which pixels are hidden, or runs on the kept ones alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.models.small import PooledResidualBlock, SmallResNet

AblationKind = Literal["column", "row", "block"]


@dataclass(frozen=True)
class Ablation:
    """Which block of pixels an ablated image keeps (Levine and Feizi, 2020, Section 3).

    Blocks may be anywhere and wrap around the borders, so that every pixel is in equally many.

    Attributes:
        kind: ``"column"`` keeps a band of columns, ``"row"`` of rows, ``"block"`` a square.
        size: width of the band, or side of the square, in pixels.

    Raises:
        PatchproofError: another kind, or a size below 1.
    """

    kind: AblationKind
    size: int

    def __post_init__(self) -> None:
        if self.kind not in (known := get_args(AblationKind)):
            raise PatchproofError(f"ablation: expected one of {known}, got {self.kind!r}")
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < 1:
            raise PatchproofError(f"ablation: expected a size from 1 pixel, got {self.size!r}")

    def block(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) of the kept block in pixels.

        Raises:
            PatchproofError: a block larger than the image.
        """
        height, width = image_size
        match self.kind:
            case "column":
                block = (height, self.size)
            case "row":
                block = (self.size, width)
            case "block":
                block = (self.size, self.size)
        if block[0] > height or block[1] > width:
            raise PatchproofError(
                f"ablation: expected a {self.kind} inside the {height}x{width} image, "
                f"got {self.size} pixels"
            )
        return block

    def corners(self, image_size: tuple[int, int]) -> Tensor:
        """Return the top left pixel of each position, (V, 2) int64, row by row.

        V is the width of the image for columns, its height for rows, and its pixels for blocks.
        """
        self.block(image_size)  # is there room for one?
        tops = 1 if self.kind == "column" else image_size[0]
        lefts = 1 if self.kind == "row" else image_size[1]
        return torch.cartesian_prod(torch.arange(tops), torch.arange(lefts))

    def to_dict(self) -> dict[str, Any]:
        """Return the ablation as JSON values."""
        return {"kind": self.kind, "size": self.size}


@dataclass(frozen=True, eq=False)
class Kept:
    """What ablated views keep of a batch of images.

    Attributes:
        corners: (N, K, 2) int64, the top left pixel of each of the K blocks kept of each image.
        size: (height, width) of every block in pixels; blocks wrap around the borders.
    """

    corners: Tensor
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if self.corners.ndim != 3 or self.corners.shape[2] != 2:
            raise PatchproofError(
                f"kept: expected corners of shape (N, K, 2), got {tuple(self.corners.shape)}"
            )

    def pixels(self, image_size: tuple[int, int]) -> Tensor:
        """Return the pixels that are in some block, (N, H, W) bool."""
        inside = [
            (torch.arange(length, device=start.device) - start[..., None]) % length < size
            for start, size, length in zip(
                self.corners.unbind(2), self.size, image_size, strict=True
            )
        ]
        return (inside[0][..., :, None] & inside[1][..., None, :]).any(1)

    def crop(self, images: Tensor) -> Tensor:
        """Cut the blocks out of images (N, C, H, W), wrapping around the borders.

        Returns:
            (N * K, C, height, width), the blocks of the first image first; in channels-last order.
        """
        rows, columns = (
            (start.reshape(-1, 1) + torch.arange(size, device=start.device)) % length
            for start, size, length in zip(
                self.corners.unbind(2), self.size, images.shape[2:], strict=True
            )
        )
        count, blocks = self.corners.shape[:2]
        image = torch.arange(count, device=images.device).repeat_interleave(blocks)
        cut = images[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return cut.permute(0, 3, 1, 2)


class AblatedNetwork(Protocol):
    """A network that is made for ablated images."""

    def ablated(self, images: Tensor, kept: Kept) -> Tensor:
        """Return logits (N, classes) of what is kept of images (N, C, H, W) in [0, 1]."""
        ...


class BandBlock(PooledResidualBlock):
    """A ``PooledResidualBlock`` for bands: kernels and pooling end where a side is one pixel.

    Args:
        inputs: channels before.
        outputs: channels after.
        kind: of the ablation.
        side: the short side of the band (both of a block) before, in pixels.
    """

    def __init__(self, inputs: int, outputs: int, kind: AblationKind, side: int) -> None:
        super().__init__(inputs, outputs)
        self.widen = _convolution(inputs, outputs, kind, side)
        self.pool = nn.MaxPool2d(_sides(kind, min(side, 2), 2), ceil_mode=True)
        self.residual = _convolution(outputs, outputs, kind, -(-side // 2))


def _convolution(inputs: int, outputs: int, kind: AblationKind, side: int) -> nn.Conv2d:
    """Return a 3x3 convolution, or 3 along the long side alone where the short one is 1 pixel."""
    short = 3 if side > 1 else 1
    kernel, padding = _sides(kind, short, 3), _sides(kind, short // 2, 1)
    return nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False)


def _sides(kind: AblationKind, short: int, long: int) -> tuple[int, int]:
    """Return (height, width) of something with this short and long side, like the band."""
    return {"column": (long, short), "row": (short, long), "block": (short, short)}[kind]


class BandResNet(SmallResNet):
    """A ``SmallResNet`` that runs on the kept band or block alone.

    Hidden pixels cost nothing and cannot leak. Four constant planes beside the image's channels,
    the sine and cosine of where the band begins, tell the network where it looks. Several bands
    share the global max pooling.

    Args:
        classes: number of classes.
        channels: channels of the image.
        ablation: ``"column"``, ``"row"`` or ``"block"``.
        size: of the band or block, in pixels.
        widths: channels of the stem and of each block.

    Attributes:
        ablation: what the network was made for.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        ablation: AblationKind = "column",
        size: int = 4,
        widths: Sequence[int] = (48, 64, 192, 256),
    ) -> None:
        super().__init__(classes, channels + 4, widths)
        self.ablation = Ablation(ablation, size)
        sides = [-(-size // 2**halvings) for halvings in range(len(widths) - 1)]
        self.blocks = nn.Sequential(
            *(
                BandBlock(*pair, ablation, side)
                for pair, side in zip(pairwise(widths), sides, strict=True)
            )
        )

    def ablated(self, images: Tensor, kept: Kept) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1] of which parts are kept.

        Raises:
            PatchproofError: parts of another shape than the network was made for.
        """
        image_size = (images.shape[2], images.shape[3])
        check_kept(self.ablation, kept, image_size)
        cut = kept.crop(images)
        angles = kept.corners.reshape(-1, 2) * (
            2 * math.pi / torch.tensor(image_size, device=images.device)
        )
        place = torch.cat([angles.sin(), angles.cos()], 1).to(cut.dtype)
        planes = place[:, :, None, None].expand(-1, -1, *kept.size)
        pixels = torch.cat([cut, planes], 1).contiguous(memory_format=torch.channels_last)
        features = self.blocks(self.stem(pixels)).amax((2, 3))
        together = features.view(len(images), -1, features.shape[1]).amax(1)
        logits: Tensor = self.head(together)
        return logits * self.logit_scale

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to the mean of the logits of adjacent bands."""
        image_size = (images.shape[2], images.shape[3])
        block = self.ablation.block(image_size)
        corners = torch.cartesian_prod(
            *(
                torch.arange(0, length, size, device=images.device)
                for length, size in zip(image_size, block, strict=True)
            )
        )
        kept = Kept(corners.repeat(len(images), 1)[:, None], block)
        logits = self.ablated(images.repeat_interleave(len(corners), 0), kept)
        return logits.view(len(images), len(corners), -1).mean(1)


class AblationResNet(SmallResNet):
    """A ``SmallResNet`` that is told which pixels are hidden (Levine and Feizi, 2020, Section 4).

    A pixel x goes in as (x, 1 - x), a hidden one as (0, 0), which no pixel is.

    Args:
        classes: number of classes.
        channels: channels of the image.
        ablation: ``"column"``, ``"row"`` or ``"block"``.
        size: of the band or block, in pixels.
        widths: as of ``SmallResNet``.
        stem_stride: as of ``SmallResNet``.

    Attributes:
        ablation: what the network was made for.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        ablation: AblationKind = "column",
        size: int = 4,
        widths: Sequence[int] = (48, 48, 192, 192),
        stem_stride: int = 1,
    ) -> None:
        super().__init__(classes, 2 * channels, widths, stem_stride)
        self.ablation = Ablation(ablation, size)

    def ablated(self, images: Tensor, kept: Kept) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1] of which parts are kept.

        Raises:
            PatchproofError: parts of another shape than the network was made for.
        """
        image_size = (images.shape[2], images.shape[3])
        check_kept(self.ablation, kept, image_size)
        hidden = ~kept.pixels(image_size)[:, None]
        return super().forward(torch.cat([images, 1 - images], 1).masked_fill(hidden, 0.0))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1], nothing hidden, to logits (N, classes)."""
        return super().forward(torch.cat([images, 1 - images], 1))


def check_kept(ablation: Ablation, kept: Kept, image_size: tuple[int, int]) -> None:
    """Raise ``PatchproofError`` for blocks of another shape than an ablation's."""
    if (block := ablation.block(image_size)) != kept.size:
        raise PatchproofError(
            f"ablation: expected blocks of {block} pixels, which the network was made for, "
            f"got {kept.size}"
        )
