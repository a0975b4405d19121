"""How large the windows of robust masking must be (PatchGuard, Section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from patchproof.aggregation.windows import Windows
from patchproof.defenses.over_features import FeatureViews
from patchproof.errors import PatchproofError
from patchproof.results import Corruption
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize
from patchproof.views import LocalFeatureViews


def choose_windows(
    views: FeatureViews,
    corruption: Corruption,
    threat: Threat,
    image_size: ImageSize,
    window: int | tuple[int, int] | None = None,
    mask_for: Threat | None = None,
) -> Windows:
    """Return windows each of which can hold all that a patch corrupts.

    Args:
        views: on a grid.
        corruption: which of them ``threat`` corrupts.
        threat: what the attacker may do.
        image_size: (H, W) in pixels.
        window: views a side, or (rows, columns); None for those of Equation 1.
        mask_for: choose them by Equation 1 for this larger patch (Section 5.3.2).

    Raises:
        PatchproofError: views that are not on a grid, several patches, windows larger than the
            grid, or windows that cannot hold the views that some region corrupts.
    """
    if views.grid is None:
        raise PatchproofError(
            "windows: expected views on a grid, got combinations of several bands: take another "
            "defense for them, such as derandomized-smoothing, or bands=1"
        )
    if threat.patches > 1 or (mask_for is not None and mask_for.patches > 1):
        raise PatchproofError(
            f"windows: expected one patch, which corrupts one window, got {threat.label()}: for "
            "several patches take a defense without windows, such as RobustStatistics with "
            "top-masking"
        )
    if window is not None and mask_for is not None:
        raise PatchproofError("expected one of window and mask_for, got both")
    spans = corrupted_spans(corruption.patterns, views.grid, views.wraps)
    needed = tuple(spans.amax(0).tolist())
    size: tuple[int, ...]
    if window is not None:
        size = _both(window)
    else:
        equation = window_by_equation(views, mask_for or threat, image_size)
        size = equation if mask_for else tuple(map(max, equation, needed))
    if size == views.grid or any(
        part > whole for part, whole in zip(size, views.grid, strict=True)
    ):
        raise PatchproofError(
            f"windows: expected less than the {_by(views.grid)} features of the image, got "
            f"{_by(size)}, which would leave nothing: take a smaller patch, or a network whose "
            "features see less"
        )
    too_large = (spans > torch.tensor(size)).any(1)
    if too_large.any():
        worst = (spans.prod(1) * too_large)[corruption.region_to_pattern].argmax()
        corrupted = spans[corruption.region_to_pattern[worst]].tolist()
        top, left, height, width = threat.regions(image_size).box(int(worst))
        raise PatchproofError(
            f"windows: expected at least {_by(needed)} features, got {_by(size)}, which cannot "
            f"hold the {_by(corrupted)} features that a patch in the {height}x{width} pixels from "
            f"row {top}, column {left} corrupts"
        )
    return Windows(views.grid, (size[0], size[1]), views.wraps)


def window_by_equation(
    views: FeatureViews, threat: Threat, image_size: ImageSize
) -> tuple[int, int]:
    """Return (rows, columns) by Equation 1, ceil((p + r - 1) / s), but no more than there are.

    For patches of p pixels, receptive fields of r and strides of s. Bands and blocks of r pixels
    have a stride of 1.
    """
    shapes = threat.shapes(image_size)
    patch = (max(shape.height for shape in shapes), max(shape.width for shape in shapes))
    if isinstance(views, LocalFeatureViews):
        return views.fields.window(patch)
    assert views.grid is not None, "checked before"
    rows, columns = (
        min(p + r - 1, places)
        for p, r, places in zip(patch, views.ablation.block(image_size), views.grid, strict=True)
    )
    return rows, columns


def corrupted_spans(patterns: Tensor, grid: tuple[int, int], wraps: tuple[bool, bool]) -> Tensor:
    """Return the rows and columns of the smallest window that holds each pattern, (P, 2) int64.

    Args:
        patterns: (P, h * w) bool.
        grid: (h, w).
        wraps: whether windows go on at the other border, along (rows, columns).
    """
    cells = patterns.view(-1, *grid)
    return torch.stack(
        [
            _span(along, around)
            for along, around in zip((cells.any(2), cells.any(1)), wraps, strict=True)
        ],
        1,
    )


def _span(used: Tensor, around: bool) -> Tensor:
    """Return the least number of neighbouring places that hold all used ones, (P,), of (P, n)."""
    places = used.shape[1]
    if not around:
        first = used.int().argmax(1)
        last = places - 1 - used.flip(1).int().argmax(1)
        return torch.where(used.any(1), last - first + 1, 0)
    # On the circle: all but the longest run of unused places, which ends furthest from a used one.
    twice = torch.cat([used, used], 1)
    place = torch.arange(2 * places)
    latest = torch.where(twice, place, -1).cummax(1).values
    gap = torch.where(latest >= 0, place - latest, 0).amax(1)
    return torch.where(used.any(1), places - gap.clamp(max=places), 0)


def _both(window: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """Return (rows, columns) of at least 1 each."""
    match window:
        case bool():
            pass
        case int(side) if side >= 1:
            return side, side
        case (int(rows), int(columns)) | [int(rows), int(columns)] if min(rows, columns) >= 1:
            return rows, columns
    raise PatchproofError(
        f"window: expected features a side, or (rows, columns), from 1, got {window!r}"
    )


def _by(lengths: tuple[int, ...] | list[int]) -> str:
    return "x".join(map(str, lengths))
