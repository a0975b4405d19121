"""Few rectangles that together contain every rectangle of an area (PatchCleanser, Appendix B)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from patchproof.errors import PatchproofError
from patchproof.threat.regions import ImageSize
from patchproof.threat.shapes import Shape

Cost = Callable[[Shape], int]


def staircase(max_pixels: int, image_size: ImageSize, heights: Sequence[int]) -> tuple[Shape, ...]:
    """Return the covering rectangles that end at these heights.

    A patch of at most A pixels that is higher than the step before is at least that height + 1
    high, so it is at most floor(A / (height + 1)) wide: one rectangle for each step contains all
    patches up to its height, and all steps together every patch, if the last is as high as a patch
    can be. Six steps at 5, 12, 23, 39, 84 and 224 for 502 pixels of 224x224 are the paper's.

    Args:
        max_pixels: A, the largest area of a patch.
        image_size: (H, W) in pixels.
        heights: of the rectangles, ascending; the last at least min(A, H).

    Raises:
        PatchproofError: no heights, or heights that do not ascend to the highest patch.
    """
    rows, columns = image_size
    highest = min(max_pixels, rows)
    steps = [0, *heights]
    if (
        len(steps) < 2
        or steps[-1] < highest
        or any(height <= below for below, height in pairwise(steps))
    ):
        raise PatchproofError(
            f"covering shapes: expected heights that ascend to {highest}, got {list(heights)}"
        )
    return tuple(
        Shape.rectangle(min(height, rows), min(columns, max_pixels // (below + 1)))
        for below, height in pairwise(steps)
        if below < highest
    )


def least_staircase(
    max_pixels: int, image_size: ImageSize, count: int, cost: Cost
) -> tuple[Shape, ...]:
    """Return the staircase of ``count`` rectangles of the least total cost, among all of them.

    Where fewer rectangles contain every patch without gaining from more, there are fewer.

    Args:
        max_pixels: the largest area of a patch.
        image_size: (H, W) in pixels.
        count: how many rectangles, at least 1.
        cost: of one rectangle.

    Raises:
        PatchproofError: no rectangle asked for.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise PatchproofError(f"shapes: expected at least 1, got {count!r}")
    rows, columns = image_size
    highest = min(max_pixels, rows)
    width_above = [min(columns, max_pixels // (below + 1)) for below in range(highest)]
    # A step ends where the width above it falls, else it could be higher at no cost in width.
    stops = [0] + [h for h in range(1, highest) if width_above[h] < width_above[h - 1]] + [highest]
    count = min(count, len(stops) - 1)
    costs = {
        (below, height): cost(Shape.rectangle(height, width_above[below]))
        for place, below in enumerate(stops[:-1])
        for height in stops[place + 1 :]
    }
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for _ in range(count):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for (below, height), price in costs.items():
            if below in best:
                total, heights = best[below]
                candidate = (total + price, (*heights, height))
                longer[height] = min(longer.get(height, (math.inf, ())), candidate)
        best = longer
    return staircase(max_pixels, image_size, best[highest][1])
