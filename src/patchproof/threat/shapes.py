"""Patch shapes: the pixels of a patch, as disjoint boxes, and what they sweep when they move."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchproof.errors import PatchproofError
from patchproof.threat.regions import Box

Point = tuple[float, float]
"""(row, column) in pixels; pixel (i, j) is the square from (i, j) to (i + 1, j + 1)."""

_LONGEST = 4096
"""Longest side of a drawn patch in pixels."""

_SLIVER = 1e-9
"""A polygon that reaches no deeper than this into a pixel does not touch it (rounding)."""


@dataclass(frozen=True)
class Shape:
    """The pixels of a patch relative to its top left corner.

    Attributes:
        height: rows of the smallest box that holds the patch.
        width: columns of that box.
        parts: disjoint boxes whose union is the patch.
    """

    height: int
    width: int
    parts: tuple[Box, ...]

    @classmethod
    def rectangle(cls, height: int, width: int) -> Shape:
        """Return a full rectangle."""
        return cls(height, width, (Box(0, 0, height, width),))

    @classmethod
    def of(cls, pixels: Tensor) -> Shape:
        """Return the shape of (h, w) bool pixels, without empty rows and columns around it."""
        top, left = (int(pixels.any(axis).nonzero()[0]) for axis in (1, 0))
        parts = tuple(box.shifted(-top, -left) for box in boxes_of(pixels))
        return cls(
            max(box.top + box.height for box in parts),
            max(box.left + box.width for box in parts),
            parts,
        )

    @cached_property
    def pixels(self) -> Tensor:
        """The patch as (height, width) bool."""
        return pixels_of(self.parts, (self.height, self.width))

    @property
    def area(self) -> int:
        """Number of pixels."""
        return sum(box.height * box.width for box in self.parts)

    def swept(self, rows: int, columns: int) -> tuple[Box, ...]:
        """Return what the patch hides at all of ``rows`` x ``columns`` adjacent places."""
        if len(self.parts) == 1:
            return (Box(0, 0, self.height + rows - 1, self.width + columns - 1),)
        swept = torch.zeros(self.height + rows - 1, self.width + columns - 1, dtype=torch.bool)
        for top in range(rows):
            for left in range(columns):
                swept[top : top + self.height, left : left + self.width] |= self.pixels
        return boxes_of(swept)


def largest(shapes: Iterable[Shape]) -> tuple[Shape, ...]:
    """Return the distinct shapes that are not part of a rectangle among them wherever they are.

    A rectangle as high and as wide contains a shape at all its places inside the image. A stencil
    does not, even if all pixels of the shape are in it: it does not reach every place.
    """
    distinct = tuple(dict.fromkeys(shapes))
    return tuple(
        shape
        for shape in distinct
        if not any(
            shape != other
            and len(other.parts) == 1
            and shape.height <= other.height
            and shape.width <= other.width
            for other in distinct
        )
    )


def pixels_of(boxes: Iterable[Box], size: tuple[int, int]) -> Tensor:
    """Return the pixels in a union of boxes, (H, W) bool."""
    inside = torch.zeros(size, dtype=torch.bool)
    for top, left, height, width in boxes:
        inside[top : top + height, left : left + width] = True
    return inside


def boxes_of(pixels: Tensor) -> tuple[Box, ...]:
    """Return disjoint boxes whose union is (h, w) bool ``pixels``: runs, joined over equal rows."""
    boxes: list[Box] = []
    growing: dict[tuple[int, int], Box] = {}
    for top, row in enumerate(pixels.int().tolist()):
        before_and_after = zip([0, *row], [*row, 0], strict=True)
        edges = [at for at, (before, after) in enumerate(before_and_after) if before != after]
        runs = list(zip(edges[::2], edges[1::2], strict=True))
        boxes += [box for run, box in growing.items() if run not in runs]
        growing = {
            run: growing[run]._replace(height=growing[run].height + 1)
            if run in growing
            else Box(top, run[0], 1, run[1] - run[0])
            for run in runs
        }
    return tuple(sorted([*boxes, *growing.values()]))


def touched_pixels(corners: list[Point], subpixel: bool = False) -> Tensor:
    """Return every pixel whose area a convex polygon touches.

    Args:
        corners: in order around the polygon.
        subpixel: count what the polygon touches at any offset of less than a pixel down and to the
            right as well, so that the result at the whole pixels above and to the left of any
            placement of the polygon contains it.

    Returns:
        (h, w) bool, with the polygon's top and left at 0.

    Raises:
        PatchproofError: a polygon without area, or too large for any image.
    """
    if not all(abs(number) <= _LONGEST for corner in corners for number in corner):
        raise PatchproofError(f"expected a patch within {_LONGEST:,} pixels, got corners {corners}")
    top, left = (min(corner[axis] for corner in corners) for axis in (0, 1))
    bottom, right = (max(corner[axis] for corner in corners) for axis in (0, 1))
    extra = 1 if subpixel else 0
    if min(bottom - top, right - left) <= _SLIVER:
        raise PatchproofError("expected a patch with some area, got a polygon without any")
    height = math.ceil(bottom - top + extra - _SLIVER)
    width = math.ceil(right - left + extra - _SLIVER)
    rows = torch.arange(height, dtype=torch.float64)[:, None]
    columns = torch.arange(width, dtype=torch.float64)
    touched = torch.ones(height, width, dtype=torch.bool)
    following = corners[1:] + corners[:1]
    for (row, column), (next_row, next_column) in zip(corners, following, strict=True):
        length = math.hypot(next_row - row, next_column - column)
        if length <= _SLIVER:
            continue
        # An axis across this edge: the polygon and the pixel touch only if their shadows overlap.
        down, across = (next_column - column) / length, -(next_row - row) / length
        shadow = [(r - top) * down + (c - left) * across for r, c in corners]
        reach = extra * torch.tensor([0.0, down, across, down + across], dtype=torch.float64)
        pixel = rows * down + columns * across
        square = torch.tensor([0.0, down, across, down + across], dtype=torch.float64)
        touched &= pixel + float(square.max()) > min(shadow) + float(reach.min()) + _SLIVER
        touched &= pixel + float(square.min()) < max(shadow) + float(reach.max()) - _SLIVER
    return touched
