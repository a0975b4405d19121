"""Patch regions: the places where a patch may be, as half-open boxes of pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from patchproof.results import PatchproofError

ImageSize = tuple[int, int]
"""Height and width in pixels."""


class Box(NamedTuple):
    """A half-open box of pixels: rows [top, top + height), columns [left, left + width)."""

    top: int
    left: int
    height: int
    width: int


def check_image_size(image_size: object) -> ImageSize:
    """Return (height, width) as given, or raise ``PatchproofError``."""
    match image_size:
        case (int(height), int(width)) if height >= 1 and width >= 1:
            return height, width
    raise PatchproofError(f"image_size: expected (height, width) >= 1, got {image_size!r}")


@dataclass(frozen=True, eq=False)
class Regions:
    """Distinct patch regions on images of one size.

    Attributes:
        image_size: (H, W) in pixels.
        boxes: (R, 4) int64: top, left, height, width of each region, inside the image.
    """

    image_size: ImageSize
    boxes: Tensor

    @classmethod
    def of(cls, image_size: ImageSize, boxes: Iterable[Box]) -> Regions:
        """Make regions of ``boxes``, each listed once, in ascending order."""
        distinct = sorted(set(boxes))
        if not distinct:
            raise PatchproofError("expected at least one patch region, got none")
        return cls(image_size, torch.tensor(distinct, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.boxes)

    def box(self, index: int) -> Box:
        """Return region ``index`` as a box."""
        return Box(*self.boxes[index].tolist())

    def seen_by(self, visible: Tensor) -> Tensor:
        """Tell which views see at least one pixel of which regions, by counting pixels.

        Args:
            visible: (V, H, W) bool, the pixels of the image that each view shows the model.

        Returns:
            (R, V) bool.
        """
        height, width = self.image_size
        top, left, box_height, box_width = self.boxes.unbind(1)
        corners = [
            rows * (width + 1) + columns
            for rows in (top, top + box_height)
            for columns in (left, left + box_width)
        ]
        seen = torch.empty(len(self), len(visible), dtype=torch.bool)
        for start in range(0, len(visible), _VIEWS_AT_ONCE):
            chunk = visible[start : start + _VIEWS_AT_ONCE].int()
            integral = chunk.new_zeros(len(chunk), height + 1, width + 1)
            integral[:, 1:, 1:] = chunk.cumsum(1).cumsum(2)
            a, b, c, d = (integral.flatten(1)[:, corner] for corner in corners)
            seen[:, start : start + len(chunk)] = (d - b - c + a > 0).T
        return seen

    def accumulate(self, values: Tensor) -> Tensor:
        """Add each region's value to every pixel of the region.

        Args:
            values: (N, R) float.

        Returns:
            (N, H, W) float, at a pixel the sum of the values of the regions containing it.
        """
        height, width = self.image_size
        top, left, box_height, box_width = self.boxes.unbind(1)
        grid = torch.zeros(len(values), (height + 1) * (width + 1), dtype=torch.float64)
        for rows, row_sign in ((top, 1.0), (top + box_height, -1.0)):
            for columns, sign in ((left, row_sign), (left + box_width, -row_sign)):
                grid.index_add_(1, rows * (width + 1) + columns, sign * values.double())
        sums = grid.view(-1, height + 1, width + 1).cumsum(1).cumsum(2)
        return sums[:, :height, :width].round(decimals=9).float()


_VIEWS_AT_ONCE = 256
