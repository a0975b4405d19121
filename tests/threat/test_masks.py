import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchproof.errors import PatchproofError
from patchproof.threat import Box, MaskSet, RectanglePatch, SquarePatch


@pytest.mark.parametrize(
    ("budget", "starts", "size"), [(5, [0, 1, 2, 3, 4], 2), (3, [0, 2, 3], 3), (1, [0], 6)]
)
def test_the_masks_of_the_papers_figure_3(budget, starts, size):
    """On 6 pixels with a patch of 2 (PatchCleanser, Figure 3)."""
    masks = MaskSet.for_threat(RectanglePatch(1, 2), (1, 6), (1, budget))
    assert [box.left for (box,) in masks.masks] == starts
    assert {box.width for (box,) in masks.masks} == {size}


@pytest.mark.parametrize(
    ("image", "patch", "budget", "mask"), [(32, 5, 6, 9), (32, 2, 6, 7), (224, 32, 6, 64)]
)
def test_known_mask_sizes(image, patch, budget, mask):
    masks = MaskSet.for_threat(SquarePatch(patch), (image, image), budget)
    assert len(masks) == budget**2
    assert {(box.height, box.width) for (box,) in masks.masks} == {(mask, mask)}
    assert masks.masks[-1] == (Box(image - mask, image - mask, mask, mask),)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_region_is_covered_as_often_as_asked_within_the_budget(data):
    size = data.draw(st.tuples(st.integers(1, 14), st.integers(1, 14)), "image size")
    patch = RectanglePatch(data.draw(st.integers(1, size[0])), data.draw(st.integers(1, size[1])))
    budget = data.draw(st.tuples(st.integers(1, 16), st.integers(1, 16)), "budget")
    times = data.draw(st.tuples(*(st.integers(1, min(k, 3)) for k in budget)), "multiplicity")
    try:
        masks = MaskSet.for_threat(patch, size, budget, times)
    except PatchproofError:
        if times == (1, 1):
            raise
        return  # masks of a high multiplicity coincide on a small image
    assert len(masks) <= budget[0] * budget[1]
    regions, masked = patch.regions(size), masks.masked()
    for index in range(len(regions)):
        top, left, height, width = regions.box(index)
        hidden = masked[:, top : top + height, left : left + width].flatten(1).all(1)
        assert hidden.sum() == masks.multiplicity()[index] >= times[0] * times[1]


def test_a_set_with_a_hole_is_refused_and_the_hole_named():
    boxes = (Box(0, 0, 3, 4), Box(1, 0, 3, 3))
    with pytest.raises(PatchproofError, match=r"none that covers Box\(top=2, left=2"):
        MaskSet((4, 4), boxes, SquarePatch(2))
    MaskSet((4, 4), boxes, SquarePatch(2, locations=Box(0, 0, 4, 3)))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ((), "got none"),
        ((Box(0, 0, 4, 5),), "inside the 4x4 image"),
        ((Box(0, 0, 4, 4), Box(0, 0, 4, 4)), "distinct"),
    ],
)
def test_bad_mask_sets(boxes, message):
    with pytest.raises(PatchproofError, match=message):
        MaskSet((4, 4), boxes, SquarePatch(2))


@pytest.mark.parametrize("budget", [0, (3, 0), (2, 2, 2), 2.5, "6"])
def test_a_budget_is_one_or_two_whole_numbers(budget):
    with pytest.raises(PatchproofError, match="masks_per_side: expected"):
        MaskSet.for_threat(SquarePatch(2), (8, 8), budget)


def test_a_multiplicity_above_the_budget_is_refused():
    with pytest.raises(PatchproofError, match="at most the 2 masks"):
        MaskSet.for_threat(SquarePatch(2), (8, 8), 2, 3)


def test_masked_marks_the_half_open_boxes():
    masks = MaskSet((3, 4), (Box(0, 0, 3, 3), Box(0, 1, 3, 3)), SquarePatch(2))
    assert masks.masked().int().tolist() == [[[1, 1, 1, 0]] * 3, [[0, 1, 1, 1]] * 3]
    assert masks.multiplicity().tolist() == [1, 2, 1] * 2
    assert masks.masked().dtype == torch.bool
