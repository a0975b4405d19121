"""One patch of any of several kinds, and squares that are stretched or turned."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from patchproof import (
    AnyPatch,
    AnyRectangle,
    Box,
    MaskSet,
    MultiplePatches,
    PatchproofError,
    RectanglePatch,
    RectanglePatches,
    SparsePixels,
    SquarePatch,
    StencilPatch,
    Threat,
    transformations,
)
from patchproof.threat import threat_from_dict
from patchproof.threat.shapes import pixels_of

SIZE = (7, 9)
DOTS = StencilPatch(["#.", ".#"])
KINDS: dict[str, list[Threat]] = {
    "rectangles": [RectanglePatch(2, 3), RectanglePatch(3, 2)],
    "stencils": [DOTS, StencilPatch(["##", "#."])],
    "mixed": [SquarePatch(2), DOTS, RectanglePatch(1, 4)],
    "with regions in common": [
        SquarePatch(2),
        StencilPatch(["##", "##"]),
        RectanglePatches([(2, 2), (1, 3)]),
        AnyRectangle(4, Box(1, 1, 4, 4)),
        SquarePatch(2, "corners"),
    ],
    "in other places": [SquarePatch(3, "corners"), StencilPatch(["#.#"], "gap", Box(2, 2, 3, 4))],
}

NO_THREAT: Any = (2, 3)


def pixel_sets(threat: Threat) -> list[tuple[bool, ...]]:
    """Return the pixels of every region."""
    regions = threat.regions(SIZE).parts.tolist()
    return [tuple(pixels_of(boxes, SIZE).flatten().tolist()) for boxes in regions]


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_the_regions_are_those_of_all_kinds_each_once(kinds: list[Threat]) -> None:
    of_any = pixel_sets(AnyPatch(kinds))
    assert len(set(of_any)) == len(of_any)
    assert set(of_any) == {pixels for kind in kinds for pixels in pixel_sets(kind)}


def test_regions_keep_the_order_of_the_kinds() -> None:
    either = AnyPatch([RectanglePatch(3, 2), SquarePatch(2)]).regions(SIZE)
    first = RectanglePatch(3, 2).regions(SIZE)
    assert torch.equal(either.parts[: len(first)], first.parts)


@pytest.mark.parametrize("layout", ["paper", "balanced"])
@pytest.mark.parametrize("budget", [1, 2, (3, 2)])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_masks_cover_every_kind_at_every_place(
    kinds: list[Threat], budget: Any, layout: Any
) -> None:
    masked = MaskSet.for_threat(AnyPatch(kinds), SIZE, budget, layout=layout).masked().flatten(1)
    for kind in kinds:
        for pixels in pixel_sets(kind):
            assert masked[:, torch.tensor(pixels)].all(1).any()


def test_masks_that_miss_a_kind_are_refused() -> None:
    masks = MaskSet.for_threat(SquarePatch(2), SIZE, 2).masks
    with pytest.raises(PatchproofError, match="none that covers"):
        MaskSet(SIZE, masks, AnyPatch([SquarePatch(2), RectanglePatch(6, 1)]))


def test_a_shape_is_left_out_if_a_rectangle_holds_it_and_not_if_a_stencil_does() -> None:
    """A dot in the corner of the image is in no cross that is inside the image."""
    cross = StencilPatch([".#.", "###", ".#."])
    dot, rectangle = SquarePatch(1), RectanglePatch(3, 4)
    assert len(AnyPatch([dot, cross]).shapes(SIZE)) == 2
    assert AnyPatch([dot, cross, rectangle]).shapes(SIZE) == rectangle.shapes(SIZE)


def test_any_rectangle_among_others_is_covered_by_as_many_shapes_as_asked() -> None:
    either = AnyPatch([AnyRectangle(6), DOTS])
    few, many = (MaskSet.for_threat(either, SIZE, 2, shapes=shapes) for shapes in (1, 3))
    assert len(few) == 4 < len(many)
    with pytest.raises(PatchproofError, match="for any rectangle only"):
        MaskSet.for_threat(AnyPatch([SquarePatch(2), DOTS]), SIZE, 1, shapes=1)


def test_kinds_within_kinds_are_kinds() -> None:
    inner = AnyPatch([SquarePatch(2), DOTS])
    assert AnyPatch([SquarePatch(2), inner, SquarePatch(3)]).threats == (
        SquarePatch(2),
        DOTS,
        SquarePatch(3),
    )


def test_it_names_its_kinds_or_itself() -> None:
    kinds = [SquarePatch(2), RectanglePatch(1, 3, "corners")]
    assert AnyPatch(kinds).label() == "2x2 square or 1x3 rectangle in a corner"
    assert AnyPatch(kinds, "small").label() == "small"
    assert MultiplePatches(2, AnyPatch(kinds, "small")).label() == "2 patches: small"
    said = AnyPatch(kinds, "small").describe()
    assert said.endswith("said): 2x2 square; 1x3 rectangle in a corner")


@pytest.mark.parametrize(
    "threat",
    [
        AnyPatch(KINDS["with regions in common"]),
        AnyPatch(KINDS["in other places"], "elsewhere"),
        MultiplePatches(2, AnyPatch(KINDS["mixed"])),
        transformations(5, "corners")["worst case"],
    ],
)
def test_it_survives_being_saved(threat: Threat) -> None:
    assert threat_from_dict(threat.to_dict()) == threat


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnyPatch([]), "at least one, got none"),
        (lambda: AnyPatch([SquarePatch(2), MultiplePatches(2, SquarePatch(2))]), "one patch"),
        (lambda: AnyPatch([SparsePixels(2)]), "one patch"),
        (lambda: AnyPatch([SquarePatch(2), NO_THREAT]), "one patch"),
        (lambda: AnyPatch([SquarePatch(2), SquarePatch(8)]).regions(SIZE), "got 8x8"),
        (lambda: threat_from_dict({"type": "any", "threats": [5], "name": ""}), "to_dict"),
        (lambda: threat_from_dict({"type": "any", "threats": [], "name": ""}), "got none"),
        (lambda: RectanglePatch.of_aspect(0, 1.0), "pixels: expected at least 1, got 0"),
        (lambda: RectanglePatch.of_aspect(25, 0.0), "aspect ratio: .* got 0.0"),
        (lambda: RectanglePatch.of_aspect(25, float("nan")), "aspect ratio: .* got nan"),
        (lambda: RectanglePatch.of_aspect(25, 5e-324), "half a pixel"),
        (lambda: RectanglePatch.of_aspect(4, 17.0), "8.25 high and 0.485 wide"),
        (lambda: transformations(1), "half a pixel"),
        (lambda: transformations(5, Box(0, 0, 10, 12)), "holds a 12x2 patch"),
        (lambda: StencilPatch.rectangle(0, 3, 10), "positive lengths"),
    ],
)
def test_mistakes_say_what_was_expected(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PatchproofError, match=message):
        make()


@pytest.mark.parametrize(
    ("ratio", "sides"),
    [(1.0, (5, 5)), (2.7, (8, 3)), (6.0, (12, 2)), (1 / 2.7, (3, 8)), (1 / 6, (2, 12))],
)
def test_rectangles_of_an_aspect_ratio_have_the_nearest_sides(
    ratio: float, sides: tuple[int, int]
) -> None:
    patch = RectanglePatch.of_aspect(25, ratio)
    assert (patch.height, patch.width) == sides
    assert patch == RectanglePatch.of_aspect(25, ratio, "anywhere")
    assert RectanglePatch.of_aspect(25, ratio, "corners").locations == "corners"


def clipped_area(corners: Tensor, row: int, column: int) -> float:
    """Return the area of a convex polygon (n, 2) inside one pixel, cut off side by side."""
    points = corners.tolist()
    for axis, edge, keep in ((0, row, 1), (0, row + 1, -1), (1, column, 1), (1, column + 1, -1)):
        kept = []
        for here, there in zip(points, points[1:] + points[:1], strict=True):
            in_here, in_there = keep * (here[axis] - edge), keep * (there[axis] - edge)
            if in_here >= 0:
                kept.append(here)
            if in_here * in_there < 0:
                part = in_here / (in_here - in_there)
                kept.append([a + part * (b - a) for a, b in zip(here, there, strict=True)])
        points = kept
    ahead = points[1:] + points[:1]
    twice = sum(a[0] * b[1] - a[1] * b[0] for a, b in zip(points, ahead, strict=True))
    return abs(float(twice)) / 2


@pytest.mark.parametrize(("height", "width"), [(5, 5), (12, 2), (1.5, 4), (3, 8)])
@pytest.mark.parametrize("degrees", [0, 10, 30, 45, 60, 89, 90, 120, -45, 200])
def test_a_turned_rectangle_is_every_pixel_that_it_shares_some_area_with(
    height: float, width: float, degrees: float
) -> None:
    """Turned as a complex number is, with rows as the negative imaginary part."""
    flat = torch.tensor([0, width, width - 1j * height, -1j * height], dtype=torch.complex128)
    turned = flat * cmath.rect(1.0, math.radians(degrees))
    corners = torch.stack([-turned.imag, turned.real], 1)
    corners -= corners.amin(0)
    high, wide = (int(side) for side in (corners.amax(0) - 1e-9).ceil())
    touched = [[clipped_area(corners, r, c) > 1e-9 for c in range(wide)] for r in range(high)]
    stencil = StencilPatch.rectangle(height, width, degrees)
    assert stencil.shape.pixels.tolist() == touched
    bounds = stencil.bounding_rectangle()
    assert (bounds.height, bounds.width) == (high, wide)


def test_squares_and_lines_are_rectangles() -> None:
    assert StencilPatch.square(5, 30) == StencilPatch.rectangle(5, 5, 30)
    assert StencilPatch.line(12, 2, 30).rows == StencilPatch.rectangle(2, 12, 30).rows
    subpixel = StencilPatch.rectangle(2, 12, 30, subpixel=True)
    assert StencilPatch.line(12, 2, 30, subpixel=True).rows == subpixel.rows
    assert StencilPatch.square(5, 30).name == "5x5 square at 30 degrees"
    assert StencilPatch.rectangle(2, 5, 30).name == "2x5 rectangle at 30 degrees"


@pytest.mark.parametrize("locations", ["anywhere", "corners", Box(1, 0, 6, 8)])
def test_the_bounding_rectangle_holds_the_patch_at_each_of_its_places(locations: Any) -> None:
    patch = StencilPatch.rectangle(4, 2, 30).at(locations)
    bounds = patch.bounding_rectangle()
    assert bounds.locations == patch.locations == locations
    inner, outer = (torch.tensor(pixel_sets(threat)) for threat in (patch, bounds))
    assert len(inner) == len(outer)
    assert not (inner & ~outer).any()


def test_the_transformations_of_the_paper() -> None:
    """In the order of Table 4; turned by 45 degrees the square is 7.07 pixels high and wide."""
    threats = transformations(5)
    assert list(threats) == [
        "1:1", "2.7:1", "6:1", "1:2.7", "1:6", "rotated, bounding", "rotated", "worst case",
    ]  # fmt: skip
    assert [threat.label() for threat in threats.values()] == [
        "5x5 square",
        "8x3 rectangle",
        "12x2 rectangle",
        "3x8 rectangle",
        "2x12 rectangle",
        "8x8 square",
        "5x5 square at 45 degrees (39 pixels in 8x8)",
        "transformed 5x5 square",
    ]
    worst = threats.pop("worst case")
    assert isinstance(worst, AnyPatch)
    del threats["rotated, bounding"]
    assert worst.threats == tuple(threats.values())


def test_transformations_stay_in_their_place() -> None:
    threats = transformations(3, Box(0, 0, 7, 9))
    for threat in threats.values():
        regions = threat.regions((20, 20))
        assert (regions.parts[..., 0] + regions.parts[..., 2]).max() == 7
        assert (regions.parts[..., 1] + regions.parts[..., 3]).max() == 9
    assert threats["worst case"].label() == "transformed 3x3 square in a box"
