"""Any few pixels as a threat."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import patchproof as pp
from patchproof.errors import PatchproofError
from patchproof.threat import MultiplePatches, SparsePixels, threat_from_dict


def test_sparse_pixels_say_and_save_themselves() -> None:
    assert threat_from_dict(SparsePixels(4).to_dict()) == SparsePixels(4)
    assert SparsePixels(1).label() == "1 pixel"
    assert SparsePixels(4).label() == "4 pixels"
    assert "any 4 pixels" in SparsePixels(4).describe()
    assert SparsePixels(4).patches == 1


def test_sparse_pixels_have_one_region_the_whole_image() -> None:
    regions = SparsePixels(20).regions((4, 5))
    assert len(regions) == 1
    assert regions.box(0) == (0, 0, 4, 5)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "4"])
def test_sparse_pixels_are_a_number(count: Any) -> None:
    with pytest.raises(PatchproofError, match="number of pixels: expected at least 1"):
        SparsePixels(count)


def test_no_more_pixels_than_the_image_has() -> None:
    with pytest.raises(PatchproofError, match="at most the 20 of a 4x5 image, got 21"):
        SparsePixels(21).regions((4, 5))


class Anything(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :3]


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (pp.PatchCleanser, {"masks_per_side": 3}),
        (pp.MinorityReports, {"masks_per_side": 3}),
        (pp.PatchGuard, {"ablation": pp.Ablation("column", 2)}),
        (pp.DerandomizedSmoothing, {"ablation": pp.Ablation("column", 2)}),
        (pp.BagCert, {"ablation": pp.Ablation("block", 2)}),
        (pp.RobustStatistics, {"ablation": pp.Ablation("row", 2), "statistic": "median"}),
        (pp.PatchGuardPlusPlus, {"ablation": pp.Ablation("column", 2)}),
    ],
)
def test_defenses_of_views_refuse_sparse_pixels_and_name_the_one_that_does_not(
    make: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(PatchproofError, match=r"any 2 pixels.*IntervalBoundPropagation"):
        make(Anything().eval(), SparsePixels(2), image_size=(8, 8), **options)


def test_several_sparse_sets_are_no_threat() -> None:
    with pytest.raises(PatchproofError, match="expected a threat of one patch"):
        MultiplePatches(2, SparsePixels(2))
