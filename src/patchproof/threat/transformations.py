"""What a square becomes when it is stretched or turned (randomized cropping, Section 4.3)."""

from __future__ import annotations

from patchproof.threat.patches import (
    AnyPatch,
    Locations,
    RectanglePatch,
    SquarePatch,
    StencilPatch,
    Threat,
)

_RATIOS = {"1:1": 1.0, "2.7:1": 2.7, "6:1": 6.0, "1:2.7": 1 / 2.7, "1:6": 1 / 6}
"""Height over width, in the order of Table 4."""


def transformations(side: int, locations: Locations = "anywhere") -> dict[str, Threat]:
    """Return the patches of Table 4 by name, for a square of ``side`` x ``side`` pixels.

    Stretched: ``"2.7:1"`` is a rectangle of as many pixels, 2.7 times as high as wide, in whole
    pixels. Turned by 45 degrees: ``"rotated"`` is every pixel whose area the square touches,
    ``"rotated, bounding"`` the upright rectangle around them, as in the paper. ``"worst case"``
    is a patch of any of these; the bounding rectangle is none, since it is not what the square
    becomes.

    Raises:
        PatchproofError: a side below 2, which has no such rectangles, or a place too small.
    """
    square = SquarePatch(side, locations)
    threats: dict[str, Threat] = {
        name: RectanglePatch.of_aspect(side**2, ratio, locations) for name, ratio in _RATIOS.items()
    }
    turned = StencilPatch.square(side, 45).at(locations)
    worst = AnyPatch([*threats.values(), turned], f"transformed {square.label()}")
    threats["rotated, bounding"] = turned.bounding_rectangle()
    return {**threats, "rotated": turned, "worst case": worst}
