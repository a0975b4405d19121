"""Patch regions, the sets of pixels where a patch may be, and which pixel sets meet them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.results import distinct_rows

ImageSize = tuple[int, int]
"""Height and width in pixels."""


class Box(NamedTuple):
    """A half-open box of pixels: rows [top, top + height), columns [left, left + width)."""

    top: int
    left: int
    height: int
    width: int

    def shifted(self, rows: int, columns: int) -> Box:
        """Return the box moved down and to the right."""
        return Box(self.top + rows, self.left + columns, self.height, self.width)


def check_image_size(image_size: object) -> ImageSize:
    """Return (height, width) as given, or raise ``PatchproofError``."""
    match image_size:
        case (int(height), int(width)) if height >= 1 and width >= 1:
            return height, width
    raise PatchproofError(f"image_size: expected (height, width) >= 1, got {image_size!r}")


@dataclass(frozen=True, eq=False)
class PixelSets:
    """Sets of pixels, kept by cells: rows and columns that no set tells apart are stored once.

    Attributes:
        rows: (H,) int64, the cell row of each row of pixels, ascending from 0.
        columns: (W,) int64, the cell column of each column of pixels.
        cells: (S, h, w) bool, the cells in each set.
    """

    rows: Tensor
    columns: Tensor
    cells: Tensor

    @classmethod
    def of(cls, pixels: Tensor) -> PixelSets:
        """Compress (S, H, W) bool pixels."""
        rows = _groups((pixels[:, 1:] != pixels[:, :-1]).any(2).any(0))
        columns = _groups((pixels[:, :, 1:] != pixels[:, :, :-1]).any(1).any(0))
        first_row, first_column = (
            torch.searchsorted(groups, torch.arange(int(groups[-1]) + 1))
            for groups in (rows, columns)
        )
        return cls(rows, columns, pixels[:, first_row][:, :, first_column])

    def __len__(self) -> int:
        return len(self.cells)

    def with_cells(self, cells: Tensor) -> PixelSets:
        """Return other sets over the same rows and columns."""
        return PixelSets(self.rows, self.columns, cells)

    def complements(self) -> PixelSets:
        """Return the pixels that are not in each set."""
        return self.with_cells(~self.cells)

    def choose(self, sets: Tensor) -> PixelSets:
        """Return some of the sets, by (n,) indices."""
        return self.with_cells(self.cells[sets])

    def to(self, device: torch.device) -> PixelSets:
        """Return the sets on a device."""
        return PixelSets(*(part.to(device) for part in (self.rows, self.columns, self.cells)))

    def pixels(self) -> Tensor:
        """Return the sets, (S, H, W) bool."""
        return self.cells[:, self.rows][:, :, self.columns]


@dataclass(frozen=True, eq=False)
class Regions:
    """Distinct patch regions on images of one size.

    Attributes:
        image_size: (H, W) in pixels.
        parts: (R, B, 4) int64: each region is the union of up to B disjoint boxes (top, left,
            height, width) inside the image; boxes that it does not need are all 0.
    """

    image_size: ImageSize
    parts: Tensor

    @classmethod
    def join(cls, image_size: ImageSize, groups: list[Tensor]) -> Regions:
        """Join groups of distinct regions, (R, B, 4) int64 each.

        Raises:
            PatchproofError: no region at all.
        """
        if not sum(map(len, groups)):
            raise PatchproofError("expected at least one patch region, got none")
        boxes = max(group.shape[1] for group in groups)
        padded = [functional.pad(group, (0, 0, 0, boxes - group.shape[1])) for group in groups]
        return cls(image_size, torch.cat(padded))

    def __len__(self) -> int:
        return len(self.parts)

    def distinct(self) -> Regions:
        """Return the regions without those whose boxes an earlier one has."""
        first = _distinct_spans(self.parts, max(self.image_size) + 1)[0]
        return Regions(self.image_size, self.parts[first.sort().values])

    def box(self, index: int) -> Box:
        """Return the smallest box that holds region ``index``."""
        parts = [Box(*part) for part in self.parts[index].tolist() if part[2]]
        top, left = min(part.top for part in parts), min(part.left for part in parts)
        bottom = max(part.top + part.height for part in parts)
        right = max(part.left + part.width for part in parts)
        return Box(top, left, bottom - top, right - left)

    def unions(self, members: Tensor) -> Regions:
        """Return the unions of some of the regions, as disjoint boxes.

        Args:
            members: (U, K) int64, the K regions of each union.
        """
        parts = self.parts[members[:, 0]]
        for column in members[:, 1:].T:
            added = [parts]
            for part in self.parts[column].unbind(1):
                pieces = part[:, None]
                for box in parts.unbind(1):
                    pieces = _compact(_without(pieces, box[:, None]))
                added.append(pieces)
            parts = _compact(torch.cat(added, 1))
        return Regions(self.image_size, parts)

    def patterns(self, visible: PixelSets) -> tuple[Tensor, Tensor]:
        """Group the regions by the views that see at least one of their pixels.

        Regions that meet the same cells are counted once.

        Args:
            visible: the pixels of the image that each of V views shows the model.

        Returns:
            The distinct sets of views, (P, V) bool, and which is each region's, (R,) int64.
        """
        ends = self.parts[..., :2] + self.parts[..., 2:]
        used = self.parts[..., 2] > 0
        first = torch.stack(
            [visible.rows[self.parts[..., 0]], visible.columns[self.parts[..., 1]]], 2
        )
        last = torch.stack(
            [
                visible.rows[(ends[..., 0] - 1).clamp(min=0)],
                visible.columns[(ends[..., 1] - 1).clamp(min=0)],
            ],
            2,
        )
        spans = torch.cat([first, last + 1], 2) * used[..., None]
        representative, place = _distinct_spans(spans, max(visible.cells.shape[1:]) + 1)
        spans = spans[representative]
        parts = [
            distinct_rows(_meet(spans[start : start + _REGIONS_AT_ONCE], visible.cells))
            for start in range(0, len(spans), _REGIONS_AT_ONCE)
        ]
        if len(parts) == 1:
            patterns, pattern = parts[0]
        else:
            patterns, joined = distinct_rows(torch.cat([found for found, _ in parts]))
            starts = np.cumsum([0, *(len(found) for found, _ in parts)]).tolist()
            pattern = torch.cat(
                [joined[which + start] for (_, which), start in zip(parts, starts, strict=False)]
            )
        return patterns, pattern[place]

    def accumulate(self, values: Tensor) -> Tensor:
        """Add each region's value to every pixel of the region.

        Args:
            values: (N, R) float.

        Returns:
            (N, H, W) float, at a pixel the sum of the values of the regions containing it.
        """
        height, width = self.image_size
        grid = torch.zeros(len(values), (height + 1) * (width + 1), dtype=torch.float64)
        for part in self.parts.unbind(1):
            top, left, box_height, box_width = part.unbind(1)
            for rows, row_sign in ((top, 1.0), (top + box_height, -1.0)):
                for columns, sign in ((left, row_sign), (left + box_width, -row_sign)):
                    grid.index_add_(1, rows * (width + 1) + columns, sign * values.double())
        sums = grid.view(-1, height + 1, width + 1).cumsum(1).cumsum(2)
        return sums[:, :height, :width].round(decimals=9).float()


def _without(pieces: Tensor, box: Tensor) -> Tensor:
    """Cut a box out of others: what is above it, below it, and beside it.

    Args:
        pieces: (U, B, 4) int64 boxes (top, left, height, width).
        box: (U, 1, 4) int64.

    Returns:
        (U, 4 B, 4) disjoint boxes, all 0 where there is nothing.
    """
    start, end = pieces[..., :2], pieces[..., :2] + pieces[..., 2:]
    inner_start = torch.maximum(start, box[..., :2])
    inner_end = torch.minimum(end, box[..., :2] + box[..., 2:])
    apart = (inner_start >= inner_end).any(-1, keepdim=True)
    inner_start = torch.where(apart, end, inner_start)  # then all of the piece is above
    inner_end = torch.where(apart, end, inner_end)
    top, left = start.unbind(-1)
    bottom, right = end.unbind(-1)
    inner_top, inner_left = inner_start.unbind(-1)
    inner_bottom, inner_right = inner_end.unbind(-1)
    cut = torch.stack(
        [
            torch.stack([top, left, inner_top - top, right - left], -1),
            torch.stack([inner_bottom, left, bottom - inner_bottom, right - left], -1),
            torch.stack([inner_top, left, inner_bottom - inner_top, inner_left - left], -1),
            torch.stack(
                [inner_top, inner_right, inner_bottom - inner_top, right - inner_right], -1
            ),
        ],
        2,
    ).flatten(1, 2)
    return torch.where((cut[..., 2:] > 0).all(-1, keepdim=True), cut, 0)


def _compact(parts: Tensor) -> Tensor:
    """Return (U, B, 4) boxes with those that are all 0 last, and none that all rows spare."""
    used = parts[..., 2] > 0
    order = used.int().argsort(dim=1, descending=True, stable=True)
    parts = parts.gather(1, order[..., None].expand_as(parts))
    return parts[:, : max(1, int(used.sum(1).max()))]


def _groups(changes: Tensor) -> Tensor:
    """Return the group of each of n lines, where (n - 1,) bool says which differ from the last."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), changes.long().cumsum(0)])


def _distinct_spans(spans: Tensor, base: int) -> tuple[Tensor, Tensor]:
    """Return one of each of the distinct (R, B, 4) spans, by index, and which is each region's.

    Args:
        spans: numbers from 0 to ``base`` - 1.
        base: above all of them.
    """
    keys = np.zeros(len(spans), dtype=np.int64)
    for column in spans.flatten(1).numpy().T:
        if keys.max() > np.iinfo(np.int64).max // base - base:
            keys = np.unique(keys, return_inverse=True)[1].ravel()
        keys = keys * base + column
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    return torch.from_numpy(first), torch.from_numpy(place.ravel())


def _meet(spans: Tensor, cells: Tensor) -> Tensor:
    """Tell which sets of cells, (V, h, w) bool, meet which unions of boxes, (R, V) bool.

    Args:
        spans: (R, B, 4) int64: first row, first column, end row, end column.
        cells: the sets.
    """
    _, height, width = cells.shape
    met = torch.zeros(len(spans), len(cells), dtype=torch.bool)
    for start in range(0, len(cells), _VIEWS_AT_ONCE):
        chunk = cells[start : start + _VIEWS_AT_ONCE].int()
        integral = chunk.new_zeros(len(chunk), height + 1, width + 1)
        integral[:, 1:, 1:] = chunk.cumsum(1).cumsum(2)
        flat = integral.flatten(1).T.contiguous()
        for top, left, bottom, right in (part.unbind(1) for part in spans.unbind(1)):
            a, b, c, d = (
                flat[rows * (width + 1) + columns]
                for rows in (top, bottom)
                for columns in (left, right)
            )
            met[:, start : start + len(chunk)] |= d - b - c + a > 0
    return met


_VIEWS_AT_ONCE = 4096
_REGIONS_AT_ONCE = 4096
"""Bounds of the memory that counting takes."""
