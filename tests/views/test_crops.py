"""Which crops a patch meets, against plain enumeration, and how crops are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import patchproof as pp
from patchproof.models.crops import cut
from patchproof.views.crops import CropPlaces, CropViews, box_sums

SIZE = (9, 11)
THREATS: dict[str, pp.Threat] = {
    "square": pp.SquarePatch(3),
    "wide": pp.RectanglePatch(2, 5),
    "as high as the image": pp.RectanglePatch(9, 1),
    "sizes": pp.RectanglePatches([(1, 6), (5, 2)]),
    "diamond": pp.StencilPatch.diamond(5),
    "two dots": pp.StencilPatch([[1, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]),
}


def seen(places: CropPlaces) -> torch.Tensor:
    """Return the pixels of every crop, (V, H, W) bool."""
    pixels = torch.zeros(places.count, *SIZE, dtype=torch.bool)
    height, width = places.crop_size
    for place, (top, left) in enumerate(places.corners(torch.arange(places.count)).tolist()):
        pixels[place, top : top + height, left : left + width] = True
    return pixels


@pytest.mark.parametrize("crop", [(4, 4), (1, 1), (9, 11), (2, 7)])
@pytest.mark.parametrize("name", THREATS)
def test_the_crops_that_meet_a_region_are_those_that_show_a_pixel_of_it(
    name: str, crop: tuple[int, int]
) -> None:
    places = CropPlaces(SIZE, crop)
    regions = THREATS[name].regions(SIZE)
    patch = regions.accumulate(torch.eye(len(regions))) > 0  # (R, H, W)
    meets = (seen(places)[None] & patch[:, None]).any(3).any(2)  # (R, V)
    each = torch.eye(places.count, dtype=torch.int32).view(places.count, *places.grid)
    found = box_sums(each, places.meeting(regions).parts)
    assert torch.equal(found, meets.T.int())
    corruption = CropViews(SIZE, crop).corruption(THREATS[name])
    assert torch.equal(corruption.patterns[corruption.region_to_pattern], meets)


def test_the_count_at_the_centre_is_the_papers() -> None:
    """Equations 2, 3 and 7: 10x10 crops of 32x32 pixels, of which a 5x5 patch meets 196 of 529."""
    places = CropPlaces((32, 32), 10)
    ones = torch.ones(places.grid, dtype=torch.int32)
    met = box_sums(ones, places.meeting(pp.SquarePatch(5).regions((32, 32))).parts)
    assert places.count == 529
    assert int(met.max()) == min(5 + 10 - 1, 23) ** 2
    assert int(met.min()) == 5 * 5  # in a corner


@pytest.mark.parametrize("replacement", [True, False])
def test_draws_are_uniform(replacement: bool) -> None:
    places = CropPlaces((5, 6), (3, 2))
    generator = np.random.default_rng(1)
    drawn = places.draw(4000, 5, replacement, generator)
    shares = torch.bincount(drawn.flatten(), minlength=places.count) / drawn.numel()
    assert drawn.shape == (4000, 5)
    assert shares.numpy() == pytest.approx(1 / places.count, abs=0.006)
    twice = (drawn.sort(1).values.diff(dim=1) == 0).any(1)
    assert bool(twice.any()) == replacement
    first, last = drawn[:, 0], drawn[:, -1]
    together = float((first == last).float().mean())
    assert together == pytest.approx(1 / places.count if replacement else 0.0, abs=0.01)


def test_crops_are_cut_where_the_corners_say() -> None:
    images = torch.rand(2, 3, *SIZE)
    crops = cut(images, torch.tensor([1, 0]), torch.tensor([[5, 4], [0, 0]]), (4, 7))
    assert torch.equal(crops[0], images[1, :, 5:9, 4:11])
    assert torch.equal(crops[1], images[0, :, :4, :7])


@pytest.mark.parametrize("crop", [0, 10, (4, 12), "4", (4.0, 4)])
def test_a_crop_that_does_not_fit_is_refused(crop: Any) -> None:
    with pytest.raises(pp.PatchproofError, match="crop_size: expected"):
        CropPlaces(SIZE, crop)
