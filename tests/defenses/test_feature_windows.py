"""The windows of robust masking: Equation 1, and what patches really corrupt."""

from __future__ import annotations

import pytest
import torch
from feature_models import Hostile
from torch import Tensor, nn

import patchproof as pp
from patchproof.defenses.feature_windows import (
    choose_windows,
    corrupted_spans,
    window_by_equation,
)
from patchproof.models.bagnet import BagNet
from patchproof.views import AblatedViews, LocalFeatureViews


def smallest_window(cells: Tensor, wraps: tuple[bool, bool]) -> list[int]:
    """Return by trying them all the least rows and columns that hold the cells, (h, w) bool."""
    found = []
    for used, around in zip((cells.any(1), cells.any(0)), wraps, strict=True):
        places = len(used)
        for length in range(places + 1):
            starts = range(places) if around else range(places - length + 1)
            windows = [{(start + step) % places for step in range(length)} for start in starts]
            if any(set(used.nonzero().squeeze(1).tolist()) <= window for window in windows):
                found.append(length)
                break
    return found


@pytest.mark.parametrize("wraps", [(False, False), (False, True), (True, False), (True, True)])
def test_spans_are_the_smallest_windows(wraps: tuple[bool, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(200, 4, 6, generator=generator) < 0.12
    cells[0], cells[1] = False, True
    spans = corrupted_spans(cells.flatten(1), (4, 6), wraps)
    assert spans.tolist() == [smallest_window(pattern, wraps) for pattern in cells]


@pytest.mark.parametrize(
    ("field", "stride", "patch", "window"),
    [(9, 2, 5, 7), (7, 2, 5, 6), (5, 1, 2, 6), (9, 4, 5, 4), (9, 4, 2, 3)],
)
def test_equation_one_for_small_bagnets(field: int, stride: int, patch: int, window: int) -> None:
    """ceil((p + r - 1) / s), and never less than what some region corrupts."""
    model = BagNet(2, 1, field, stride, (2, 2, 2), 0).eval()
    threat = pp.SquarePatch(patch)
    views = LocalFeatureViews(model, (32, 32))
    assert window_by_equation(views, threat, (32, 32)) == (window, window)
    windows = choose_windows(views, views.corruption(threat), threat, (32, 32))
    assert windows.size == (window, window)


def test_the_published_window() -> None:
    """BagNet-17 at 224: fields of 17, stride 8; 32x32 patches corrupt 6x6 features (Section 3.4).

    Counted by hand: ceil((32 + 17 - 1) / 8) = 6.
    """

    class BagNet17(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(1, 1, 3),
                nn.Conv2d(1, 1, 3, 2),
                nn.Conv2d(1, 1, 3, 2),
                nn.Conv2d(1, 1, 3, 2),
            )

        def local_logits(self, images: Tensor) -> Tensor:
            logits: Tensor = self.layers(images)
            return logits

    views = LocalFeatureViews(BagNet17().eval(), (224, 224))
    assert (views.fields.size, views.fields.stride) == ((17, 17), (8, 8))
    assert views.grid == (26, 26)
    assert window_by_equation(views, pp.SquarePatch(32), (224, 224)) == (6, 6)


def test_bands_and_blocks_have_stride_one() -> None:
    threat = pp.RectanglePatch(3, 2)
    for ablation, window in (
        (pp.Ablation("column", 4), (1, 5)),
        (pp.Ablation("row", 4), (6, 1)),
        (pp.Ablation("block", 4), (6, 5)),
    ):
        views = AblatedViews(ablation, (12, 12))
        windows = choose_windows(views, views.corruption(threat), threat, (12, 12))
        assert windows.size == window
        assert windows.wraps == views.wraps


def test_the_largest_shape_of_several_counts() -> None:
    views = LocalFeatureViews(Hostile().eval(), (8, 8))
    threat = pp.RectanglePatches([(1, 3), (2, 1)])
    assert window_by_equation(views, threat, (8, 8)) == (4, 5)


def test_places_of_the_patch_may_need_less_than_equation_one() -> None:
    """A window that the equation does not allow is enough where the patch stays in a corner."""
    views = LocalFeatureViews(Hostile().eval(), (8, 8))
    corner = pp.SquarePatch(2, locations=pp.Box(0, 0, 2, 2))
    windows = choose_windows(views, views.corruption(corner), corner, (8, 8), window=3)
    assert windows.size == (3, 3)
    anywhere = pp.SquarePatch(2)
    with pytest.raises(pp.PatchproofError, match="expected at least 4x4 features, got 3x3"):
        choose_windows(views, views.corruption(anywhere), anywhere, (8, 8), window=3)
