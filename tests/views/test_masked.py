import torch
from torch import nn

from patchproof.threat import MaskSet, SquarePatch
from patchproof.views import MaskPairViews


def test_each_distinct_union_is_one_view_and_hides_both_masks():
    mask_set = MaskSet.for_threat(SquarePatch(2), (6, 7), (4, 5), 2)
    views = MaskPairViews(mask_set, fill=0.25)
    masked = mask_set.masked()
    for a in range(len(mask_set)):
        for b in range(len(mask_set)):
            hidden = views.hidden.pixels()[views.pair_to_view[a, b]]
            assert torch.equal(hidden, masked[a] | masked[b])
    assert len(views.hidden.pixels().flatten(1).unique(dim=0)) == views.count


def test_repeated_unions_are_evaluated_once():
    """Three overlapping masks on a line of 4 pixels have 6 pairs but 5 unions."""
    mask_set = MaskSet.for_threat(SquarePatch(1), (1, 4), (1, 4), (1, 2))
    pairs = len(mask_set) * (len(mask_set) + 1) // 2
    assert MaskPairViews(mask_set, 0.5).count < pairs


def test_corruption_lists_the_views_that_see_a_pixel_of_a_region():
    threat = SquarePatch(2)
    views = MaskPairViews(MaskSet.for_threat(threat, (5, 6), 3), 0.5)
    corruption = views.corruption(threat)
    regions = threat.regions((5, 6))
    assert len(corruption.patterns.unique(dim=0)) == len(corruption.patterns)
    for index in range(len(regions)):
        top, left, height, width = regions.box(index)
        seen = ~views.hidden.pixels()[:, top : top + height, left : left + width]
        pattern = corruption.patterns[corruption.region_to_pattern[index]]
        assert torch.equal(pattern, seen.flatten(1).any(1))


def test_a_patch_inside_the_masks_leaves_no_trace():
    """The model gets the same pixels, bit by bit, whatever the patch shows in a hidden region."""
    threat = SquarePatch(2)
    views = MaskPairViews(MaskSet.for_threat(threat, (5, 6), 3), fill=0.25)
    image = torch.rand(1, 3, 5, 6)
    corruption = views.corruption(threat)
    regions = threat.regions((5, 6))
    for index in range(len(regions)):
        top, left, height, width = regions.box(index)
        attacked = image.clone()
        attacked[..., top : top + height, left : left + width] = torch.rand(3, height, width)
        safe = (~corruption.patterns[corruption.region_to_pattern[index]]).nonzero().squeeze(1)
        clean, patched = (
            views.evaluate(nn.Flatten(), x.expand(len(safe), -1, -1, -1), safe)
            for x in (image, attacked)
        )
        assert len(safe)
        assert torch.equal(clean, patched)
        hidden = views.hidden.pixels()[safe].flatten(1).repeat(1, 3)[:, None]
        assert (clean[hidden] == 0.25).all()
