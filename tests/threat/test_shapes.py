"""Shapes, stencils and covering rectangles, against geometry done the slow way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchproof.errors import PatchproofError
from patchproof.threat import (
    AnyRectangle,
    MaskSet,
    MultiplePatches,
    RectanglePatches,
    Shape,
    SquarePatch,
    StencilPatch,
    threat_from_dict,
)
from patchproof.threat.covering import least_staircase, staircase
from patchproof.threat.shapes import boxes_of, touched_pixels

masks = st.integers(1, 5).flatmap(
    lambda width: st.lists(
        st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=5
    )
)


@given(rows=masks)
def test_boxes_are_disjoint_and_make_up_the_pixels(rows):
    pixels = torch.tensor(rows)
    counted = torch.zeros(pixels.shape, dtype=torch.int64)
    for top, left, height, width in boxes_of(pixels):
        counted[top : top + height, left : left + width] += 1
    assert torch.equal(counted, pixels.long())


@given(rows=masks, down=st.integers(1, 3), across=st.integers(1, 3))
def test_what_a_shape_sweeps_is_the_union_of_its_places(rows, down, across):
    pixels = torch.tensor(rows)
    if not pixels.any():
        return
    shape = Shape.of(pixels)
    swept = torch.zeros(shape.height + down - 1, shape.width + across - 1, dtype=torch.bool)
    union = swept.clone()
    for top, left, height, width in shape.swept(down, across):
        swept[top : top + height, left : left + width] = True
    for top in range(down):
        for left in range(across):
            union[top : top + shape.height, left : left + shape.width] |= shape.pixels
    assert torch.equal(swept, union)


def inside(points, corners):
    """Tell which points (n, 2) lie strictly inside a convex polygon."""
    turns = []
    for (r0, c0), (r1, c1) in zip(corners, corners[1:] + corners[:1], strict=True):
        turns.append((r1 - r0) * (points[:, 1] - c0) - (c1 - c0) * (points[:, 0] - r0))
    turn = torch.stack(turns)
    return (turn > 0).all(0) | (turn < 0).all(0)


@settings(max_examples=40, deadline=None)
@given(
    height=st.floats(1.0, 5.0),
    width=st.floats(1.0, 7.0),
    degrees=st.floats(-180, 180),
    subpixel=st.booleans(),
)
def test_every_touched_pixel_is_taken_and_no_other(height, width, degrees, subpixel):
    """Compared with many points of the polygon, at many offsets for ``subpixel``."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    flat = [(0.0, 0.0), (0.0, width), (height, width), (height, 0.0)]
    corners = [(r * cos - c * sin, r * sin + c * cos) for r, c in flat]
    touched = touched_pixels(corners, subpixel)
    top, left = (min(corner[axis] for corner in corners) for axis in (0, 1))
    grid = torch.cartesian_prod(
        torch.linspace(0, height, 90, dtype=torch.float64)[1:-1],
        torch.linspace(0, width, 90, dtype=torch.float64)[1:-1],
    )
    points = torch.stack(
        [grid[:, 0] * cos - grid[:, 1] * sin - top, grid[:, 0] * sin + grid[:, 1] * cos - left], 1
    )
    offsets = torch.linspace(0, 0.999, 4 if subpixel else 1, dtype=torch.float64)
    for offset in torch.cartesian_prod(offsets, offsets).view(-1, 2):
        rows, columns = (points + offset).floor().long().unbind(1)
        assert touched[rows.clamp(min=0), columns.clamp(min=0)].all()
    # No pixel too many: one that is taken meets the polygon grown by the offsets.
    grown = 1 if subpixel else 0
    for row, column in touched.nonzero().tolist():
        fine = torch.linspace(-grown, 1, 60 * (1 + grown), dtype=torch.float64)
        pixel = torch.cartesian_prod(row + fine, column + fine)
        shifted = [(r - top, c - left) for r, c in corners]
        near = inside(pixel, shifted).any()
        reached = any(
            row - grown <= r <= row + 1 and column - grown <= c <= column + 1 for r, c in shifted
        )
        assert near or reached or touched.sum() > height * width


@pytest.mark.parametrize(
    ("patch", "rows"),
    [
        (StencilPatch.line(3), ("###",)),
        (StencilPatch.line(2, 1, 90), ("#", "#")),
        (StencilPatch.diamond(4), (".##.", "####", "####", ".##.")),
        (StencilPatch.diamond(3), ("###", "###", "###")),
        (StencilPatch.square(2, 45), ("###", "###", "###")),
        (StencilPatch.square(3, 180), ("###", "###", "###")),
        (StencilPatch.parallelogram(2, 2, 45), (".###", "###.")),
        (StencilPatch.line(2, 1, subpixel=True), ("###", "###")),
        (StencilPatch([[0, 0, 0], [0, 1, 0], [0, 1, 1]]), ("#.", "##")),
    ],
)
def test_stencils_drawn_by_hand(patch, rows):
    assert patch.rows == rows


def test_the_papers_six_shapes_are_a_staircase():
    shapes = staircase(502, (224, 224), [5, 12, 23, 39, 84, 224])
    assert [(shape.height, shape.width) for shape in shapes] == [
        (5, 224), (12, 83), (23, 38), (39, 20), (84, 12), (224, 5),
    ]  # fmt: skip


@pytest.mark.parametrize("size", [(224, 224), (12, 30), (30, 12), (4, 5)])
@pytest.mark.parametrize("pixels", [1, 7, 20, 502])
@pytest.mark.parametrize("count", [1, 2, 6, 40])
def test_every_rectangle_of_the_area_is_part_of_a_covering_one(size, pixels, count):
    shapes = least_staircase(pixels, size, count, lambda shape: shape.area)
    assert len(shapes) <= count
    for height in range(1, min(pixels, size[0]) + 1):
        for width in range(1, min(pixels // height, size[1]) + 1):
            assert any(height <= shape.height and width <= shape.width for shape in shapes)


def test_the_least_staircase_costs_no_more_than_any_other():
    pixels, size = 12, (9, 10)

    def cost(shapes):
        return sum(shape.area + 3 * shape.height for shape in shapes)

    def one(shape):
        return cost([shape])

    for count in (1, 2, 3):
        best = cost(least_staircase(pixels, size, count, one))
        others = [
            steps
            for steps in torch.combinations(torch.arange(1, 10), count).tolist()
            if steps[-1] >= 9
        ]
        tried = [cost(staircase(pixels, size, steps)) for steps in others]
        assert best == min(tried)


def test_the_largest_rectangles_stand_for_all():
    shapes = AnyRectangle(10).shapes((32, 32))
    assert {(shape.height, shape.width) for shape in shapes} == {
        (1, 10), (2, 5), (3, 3), (5, 2), (10, 1),
    }  # fmt: skip
    assert {(s.height, s.width) for s in AnyRectangle(10).shapes((4, 4))} == {
        (2, 4),
        (3, 3),
        (4, 2),
    }


@pytest.mark.parametrize(
    "threat",
    [
        RectanglePatches([(2, 3), (3, 2)]),
        AnyRectangle(9, "corners"),
        StencilPatch.diamond(5),
        MultiplePatches(2, StencilPatch.line(3, 1, 30)),
    ],
)
def test_a_threat_survives_being_saved(threat):
    assert threat_from_dict(threat.to_dict()) == threat
    assert threat.label() in repr(threat) or isinstance(threat.label(), str)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RectanglePatches([]), "at least one, got none"),
        (lambda: RectanglePatches([(2, 0)]), "expected pixels >= 1, got 0"),
        (lambda: AnyRectangle(0), "expected pixels >= 1, got 0"),
        (lambda: AnyRectangle.of_share(0.0001, (8, 8)), "at least one pixel"),
        (lambda: StencilPatch([[0, 0]]), "at least one pixel, got none"),
        (lambda: StencilPatch([[1, 0], [1]]), "rows of equal length"),
        (lambda: StencilPatch([]), "expected"),
        (lambda: StencilPatch.line(0), "positive lengths"),
        (lambda: StencilPatch.line(3, -1), "positive lengths"),
        (lambda: StencilPatch.diamond(0), "some area"),
        (lambda: StencilPatch.line(1e9), "within 4,096 pixels"),
        (lambda: StencilPatch.diamond(float("inf")), "within 4,096 pixels"),
        (lambda: SquarePatch(2, (1, 2)), "or a box"),
        (lambda: RectanglePatches([5]), "expected \\(height, width\\)"),
        (
            lambda: MaskSet.for_threat(
                MultiplePatches(2, SquarePatch(2)), (16, 16), (1, 3), (1, 2)
            ),
            "unions of masks coincide",
        ),
        (lambda: MaskSet.for_threat(SquarePatch(5), (224, 224), 224), "got 48,400"),
        (
            lambda: MaskSet(
                (1, 4), ((0, 0, 1, 2), (0, 2, 1, 2)), MultiplePatches(2, SquarePatch(1))
            ),
            "some regions of 2 patches together",
        ),
        (lambda: StencilPatch.diamond(9).regions((8, 9)), "no larger than the 8x9 image, got 9x9"),
        (lambda: MultiplePatches(0, SquarePatch(2)), "at least 1, got 0"),
        (lambda: MultiplePatches(2, MultiplePatches(2, SquarePatch(2))), "threat of one patch"),
        (lambda: MaskSet.for_threat(AnyRectangle(4), (8, 8), shapes=0), "at least 1, got 0"),
        (lambda: MaskSet.for_threat(SquarePatch(2), (8, 8), shapes=2), "for any rectangle only"),
        (lambda: MaskSet.for_threat(SquarePatch(2), (8, 8), layout="tight"), "layout: expected"),
        (lambda: staircase(12, (9, 9), [3, 5]), "ascend to 9"),
    ],
)
def test_bad_input_says_what_was_expected(make, message):
    with pytest.raises(PatchproofError, match=message):
        make()


def test_more_patches_than_masks_are_as_many_as_masks():
    """Of 20 patches on four masks, all four together are the only largest combination."""
    masks = MaskSet.for_threat(MultiplePatches(20, SquarePatch(2)), (8, 8), 2)
    assert len(masks) == 4 + 6 + 4 + 1
    assert masks.multiplicity().tolist() == [1] * 49


def test_balanced_masks_use_the_budget_that_the_papers_leave():
    """8 pixels and a patch of 2 have 7 places: a stride of 2 needs 4 masks, 5 can be smaller."""
    paper, balanced = (
        MaskSet.for_threat(SquarePatch(2), (8, 8), 5, layout=layout)
        for layout in ("paper", "balanced")
    )
    assert (len(paper), len(balanced)) == (16, 25)
    assert balanced.masked().sum() / 25 < paper.masked().sum() / 16


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_balanced_masks_are_no_larger_and_cover_as_often(data):
    n = data.draw(st.integers(2, 20), "pixels")
    patch = data.draw(st.integers(1, n), "patch")
    budget = data.draw(st.integers(1, 8), "budget")
    times = data.draw(st.integers(1, min(3, budget)), "multiplicity")
    sets = []
    for layout in ("paper", "balanced"):
        try:
            sets.append(
                MaskSet.for_threat(
                    RectanglePatches([(1, patch)]), (1, n), (1, budget), (1, times), layout
                )
            )
        except PatchproofError:
            assert times > 1
            return
    paper, balanced = sets
    assert len(paper) <= len(balanced) <= budget
    assert balanced.multiplicity().min() >= times
    assert balanced.masked().sum((1, 2)).max() <= paper.masked().sum((1, 2)).max()
