"""Windows that slide over a grid of views, and sums of evidence inside and outside of them.

Sums are of float64 and of what belongs to them alone, not a total minus a part: an attacker who may
choose the part could otherwise cancel the rest in rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from patchproof.errors import PatchproofError


@dataclass(frozen=True)
class Windows:
    """All windows of one size on a grid of views (PatchGuard, Section 3.4, "Feature windows").

    Attributes:
        grid: (h, w) views, numbered row by row.
        size: (rows, columns) of a window, in views.
        wraps: whether windows go on at the other border, along (rows, columns): those of column and
            row ablations do, since the ablations do.

    Raises:
        PatchproofError: windows larger than the grid, or without any view.
    """

    grid: tuple[int, int]
    size: tuple[int, int]
    wraps: tuple[bool, bool] = (False, False)

    def __post_init__(self) -> None:
        if not all(1 <= part <= whole for part, whole in zip(self.size, self.grid, strict=True)):
            raise PatchproofError(
                f"expected windows of at least one and at most {_by(self.grid)} views, the feature "
                f"map, got {_by(self.size)}"
            )

    @property
    def positions(self) -> tuple[int, int]:
        """How many windows there are along (rows, columns)."""
        down, across = (
            whole if wraps and part < whole else whole - part + 1
            for whole, part, wraps in zip(self.grid, self.size, self.wraps, strict=True)
        )
        return down, across

    def along(self, axis: int) -> Tensor:
        """Return which rows (axis 0) or columns (axis 1) each window holds, (n, length) bool."""
        starts = torch.arange(self.positions[axis])[:, None]
        places = torch.arange(self.grid[axis])
        return (places - starts) % self.grid[axis] < self.size[axis]

    @cached_property
    def members(self) -> Tensor:
        """The views in each window, (W, V) bool, windows row by row of their positions."""
        rows, columns = self.along(0), self.along(1)
        return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)

    def containing(self, patterns: Tensor) -> Tensor:
        """Return which windows hold all views of each pattern, (P, W) bool, from (P, V) bool."""
        outside = (~self.members).float()
        return patterns.float() @ outside.T < 0.5

    def inside(self, values: Tensor) -> Tensor:
        """Return the sums in each window, (N, down, across, C), of (N, V, C) float64."""
        values = self._on_grid(values)
        for axis, (count, length) in enumerate(zip(self.positions, self.size, strict=True)):
            dim, beyond = axis + 1, count + length - 1 - self.grid[axis]
            if beyond > 0:  # windows go on at the other border
                values = torch.cat([values, values.narrow(dim, 0, beyond)], dim)
            values = _runs(values, dim, length)
        return values

    def outside(self, values: Tensor) -> Tensor:
        """Return the sums outside of each window, (N, down, across, C), of finite values.

        Nothing that is inside takes part in them.
        """
        rows, columns = self.along(0).double(), self.along(1).double()
        values = self._on_grid(values)
        beside = _along_rows(rows, (1.0 - columns) @ values)
        return beside + _along_rows(1.0 - rows, values.sum(2, keepdim=True))

    def _on_grid(self, values: Tensor) -> Tensor:
        return values.reshape(len(values), *self.grid, values.shape[2])


def _along_rows(weights: Tensor, values: Tensor) -> Tensor:
    """Return (N, a, w, C) of weights (a, h) and values (N, h, w, C)."""
    return (weights @ values.flatten(2)).view(len(values), -1, *values.shape[2:])


def _runs(values: Tensor, dim: int, length: int) -> Tensor:
    """Return the sums of every ``length`` consecutive entries along ``dim``.

    Runs of 1, 2, 4, ... entries are made of one another, and runs of any length of those.
    """
    count = values.shape[dim] - length + 1
    block, size, done = values, 1, 0
    total: Tensor | None = None
    while size <= length:
        if size > 1:
            places = block.shape[dim] - size // 2
            block = block.narrow(dim, 0, places) + block.narrow(dim, size // 2, places)
        if length & size:
            piece = block.narrow(dim, done, count)
            total = piece if total is None else total + piece
            done += size
        size *= 2
    assert total is not None
    return total


def _by(lengths: tuple[int, int]) -> str:
    return "x".join(str(length) for length in lengths)
