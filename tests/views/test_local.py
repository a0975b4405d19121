"""Local features as views: in the order of the feature map, corrupted where they see the patch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from patchproof.errors import PatchproofError
from patchproof.models import BagNet, SmallResNet
from patchproof.threat import RectanglePatch, SquarePatch
from patchproof.views import LocalFeatureViews

SIZE = (12, 15)


def bagnet(receptive_field: int = 5, stride: int = 2) -> BagNet:
    torch.manual_seed(0)
    return BagNet(3, 2, receptive_field, stride, (4, 4, 4), 1).eval()


def test_one_forward_yields_the_local_logits_row_by_row() -> None:
    model = bagnet()
    views = LocalFeatureViews(model, SIZE)
    assert (views.grid, views.count, views.per_forward) == ((6, 8), 48, 48)
    assert views.wraps == (False, False)
    images = torch.rand(3, 2, *SIZE)
    with torch.no_grad():
        scores = views.evaluate(model, images, torch.zeros(3, dtype=torch.int64))
        local = model.local_logits(images)
        assert torch.allclose(scores.mean(1), model(images), atol=1e-6)
    assert scores.shape == (3, 48, 3)
    assert torch.equal(scores[1, 2 * 8 + 5], local[1, :, 2, 5])


@pytest.mark.parametrize(("receptive_field", "stride"), [(3, 1), (5, 2), (9, 4)])
def test_features_that_a_region_does_not_corrupt_stay_as_they_are(
    receptive_field: int, stride: int
) -> None:
    """Whatever the patch shows; and each of the corrupted ones can be changed."""
    model = bagnet(receptive_field, stride).double()
    views = LocalFeatureViews(model, SIZE, channels=2)
    threat = RectanglePatch(3, 2)
    corruption, regions = views.corruption(threat), threat.regions(SIZE)
    image = torch.rand(1, 2, *SIZE, dtype=torch.float64)
    none = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        clean = views.evaluate(model, image, none)
        for index in range(0, len(regions), 3):
            top, left, height, width = regions.box(index)
            attacked = image.clone()
            attacked[..., top : top + height, left : left + width] = torch.nan
            changed = views.evaluate(model, attacked, none).isnan().any(2)[0]
            pattern = corruption.patterns[corruption.region_to_pattern[index]]
            assert torch.equal(changed, pattern)
            benign = torch.where(attacked.isnan(), torch.rand_like(image), image)
            patched = views.evaluate(model, benign, none)
            assert torch.equal(patched[0, ~pattern], clean[0, ~pattern])


def test_patterns_are_distinct_and_a_larger_patch_corrupts_more() -> None:
    views = LocalFeatureViews(bagnet(), SIZE)
    small, large = (views.corruption(SquarePatch(side)) for side in (2, 4))
    assert len(set(map(tuple, small.patterns.tolist()))) == len(small.patterns)
    assert large.spared().min() < small.spared().min()


def test_networks_without_local_logits_and_other_image_sizes_are_refused() -> None:
    with pytest.raises(PatchproofError, match=r"expected a network with local_logits, .* Small"):
        LocalFeatureViews(SmallResNet(3, 2).eval(), SIZE)
    with pytest.raises(PatchproofError, match="channels: expected a number"):
        LocalFeatureViews(nn.Flatten(), SIZE)
    model = bagnet()
    views = LocalFeatureViews(model, SIZE)
    with pytest.raises(PatchproofError, match=r"logits of shape \(N, classes, 6, 8\), got \(1, 3"):
        views.evaluate(model, torch.rand(1, 2, 20, 20), torch.zeros(1, dtype=torch.int64))
