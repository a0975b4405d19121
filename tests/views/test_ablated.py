"""Ablated images: what is hidden has no influence, and what is kept is counted pixel by pixel."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.models import Ablation, AblationResNet, BandResNet
from patchproof.models.ablation import AblationKind
from patchproof.threat import RectanglePatch, SquarePatch
from patchproof.views import AblatedViews

SIZE = (7, 9)
ABLATIONS = [Ablation("column", 3), Ablation("row", 2), Ablation("block", 4)]


def kept_by_hand(ablation: Ablation, top: int, left: int) -> Tensor:
    """Return the kept pixels of one block, (H, W) bool, one by one."""
    height, width = ablation.block(SIZE)
    kept = torch.zeros(SIZE, dtype=torch.bool)
    for row in range(top, top + height):
        for column in range(left, left + width):
            kept[row % SIZE[0], column % SIZE[1]] = True
    return kept


def shown(views: AblatedViews) -> Tensor:
    """Return the pixels that each view shows the model, (V, H, W) bool."""
    images = torch.ones(views.count, 1, *views.image_size)
    pixels = views.evaluate(nn.Flatten(), images, torch.arange(views.count))
    return (pixels == 1).view(-1, *views.image_size)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_views_are_every_position_and_wrap_around(ablation: Ablation) -> None:
    views = AblatedViews(ablation, SIZE)
    kind = ablation.kind
    assert views.grid == {"column": (1, 9), "row": (7, 1), "block": (7, 9)}[kind]
    assert views.wraps == (kind != "column", kind != "row")
    assert views.count == math.prod(views.grid or ())
    expected = [
        kept_by_hand(ablation, top, left)
        for top in range(1 if kind == "column" else 7)
        for left in range(1 if kind == "row" else 9)
    ]
    assert torch.equal(shown(views), torch.stack(expected))


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("bands", [1, 2])
def test_corruption_is_what_each_region_meets(ablation: Ablation, bands: int) -> None:
    if ablation.kind == "block" and bands == 2:
        ablation = Ablation("block", 6)
    threat = RectanglePatch(2, 3)
    views = AblatedViews(ablation, SIZE, bands)
    seen = shown(views)
    corruption, regions = views.corruption(threat), threat.regions(SIZE)
    for index in range(len(regions)):
        top, left, height, width = regions.box(index)
        meets = seen[:, top : top + height, left : left + width].flatten(1).any(1)
        assert torch.equal(corruption.patterns[corruption.region_to_pattern[index]], meets)


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["column", "row", "block"])
def test_a_patch_meets_its_side_plus_the_band_s_minus_one(
    kind: AblationKind, size: int, patch: int
) -> None:
    """It meets m + s - 1 bands at every place (Levine and Feizi, 2020); of blocks, the square."""
    corruption = AblatedViews(Ablation(kind, size), SIZE).corruption(SquarePatch(patch))
    met = (patch + size - 1) ** (2 if kind == "block" else 1)
    assert (corruption.patterns.sum(1) == met).all()


def test_bands_met_are_never_more_than_there_are() -> None:
    corruption = AblatedViews(Ablation("column", 6), SIZE).corruption(SquarePatch(5))
    assert corruption.patterns.all()


def test_several_bands_come_in_every_combination() -> None:
    views = AblatedViews(Ablation("column", 2), SIZE, bands=3)
    assert views.count == math.comb(9, 3)
    assert views.grid is None
    single = shown(AblatedViews(Ablation("column", 2), SIZE))
    unions = [single[list(chosen)].any(0) for chosen in combinations(range(9), 3)]
    assert torch.equal(shown(views), torch.stack(unions))


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("network", [BandResNet, AblationResNet, None])
@pytest.mark.parametrize("bands", [1, 2])
def test_hidden_pixels_have_no_influence(
    ablation: Ablation, network: type[BandResNet | AblationResNet] | None, bands: int
) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(2 * 7 * 9, 3))
    if network is not None:
        model = network(3, 2, ablation.kind, ablation.size, widths=(4, 8, 8)).eval()
    views = AblatedViews(ablation, SIZE, bands)
    forwards = torch.arange(views.count)[:: 1 if views.count < 100 else 29]
    hidden = ~shown(views)[forwards][:, None]
    images = torch.rand(1, 2, *SIZE).expand(len(forwards), -1, -1, -1)
    with torch.no_grad():
        scores = views.evaluate(model, images, forwards)
        for other in (torch.rand_like(images), torch.full_like(images, torch.nan)):
            changed = torch.where(hidden, other, images)
            assert torch.equal(views.evaluate(model, changed, forwards), scores)
        kept_changed = torch.where(hidden, images, torch.rand_like(images))
        assert (views.evaluate(model, kept_changed, forwards) != scores).any(2).all()


def test_other_models_see_hidden_pixels_filled() -> None:
    views = AblatedViews(Ablation("row", 1), (2, 3), fill=0.25)
    scores = views.evaluate(nn.Flatten(), torch.ones(2, 1, 2, 3), torch.tensor([1, 0]))
    assert scores[:, 0].tolist() == [[0.25] * 3 + [1.0] * 3, [1.0] * 3 + [0.25] * 3]


def test_a_model_is_used_for_what_it_was_made_for() -> None:
    views = AblatedViews(Ablation("column", 3), SIZE)
    none = torch.zeros(1, dtype=torch.int64)
    for ablation in (Ablation("column", 2), Ablation("row", 3)):
        model = BandResNet(3, 1, ablation.kind, ablation.size, (4, 4))
        with pytest.raises(PatchproofError, match="which the model was made for"):
            views.evaluate(model, torch.rand(1, 1, *SIZE), none)


@pytest.mark.parametrize(
    ("ablation", "options", "message"),
    [
        (Ablation("column", 10), {}, "expected a column inside the 7x9 image, got 10"),
        (Ablation("block", 8), {}, "expected a block inside"),
        (Ablation("column", 3), {"bands": 10}, "from 1 to the 9 positions, got 10"),
        (Ablation("column", 3), {"bands": 0}, "from 1 to the 9 positions, got 0"),
        (Ablation("block", 3), {"bands": 7}, "expected views that fit into memory"),
        (Ablation("column", 3), {"fill": 1.5}, "expected a pixel value"),
    ],
)
def test_impossible_views_are_refused(
    ablation: Ablation, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PatchproofError, match=message):
        AblatedViews(ablation, SIZE, **options)
