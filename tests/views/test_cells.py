"""What the classifier of a network says of each place of its last feature map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from patchproof.errors import PatchproofError
from patchproof.models import SmallResNet
from patchproof.views.cells import CellViews


def network(widths: tuple[int, ...]) -> SmallResNet:
    torch.manual_seed(0)
    return SmallResNet(3, 2, widths).eval()


@pytest.mark.parametrize("side", [8, 10])
def test_views_are_the_places_row_by_row(side: int) -> None:
    model, images = network((4, 5, 6)), torch.rand(2, 2, side, side)
    views = CellViews(model, (side, side), 2)
    assert (views.grid, views.count) == ((side // 4, side // 4), (side // 4) ** 2)
    with torch.inference_mode():
        cells = model.cell_logits(images)
        scores = views.evaluate(model, images, torch.zeros(2, dtype=torch.int64))
    assert scores.shape == (2, views.count, 3)
    torch.testing.assert_close(scores[:, 1], cells[:, :, 0, 1])


def test_the_only_place_says_what_the_network_says() -> None:
    model, images = network((4, 5, 6)), torch.rand(3, 2, 4, 4)
    with torch.inference_mode():
        torch.testing.assert_close(model.cell_logits(images)[:, :, 0, 0], model(images))


def test_what_a_place_sees_is_followed_through_the_network() -> None:
    model = network((4, 4))
    views = CellViews(model, (32, 32), 2)
    assert views.size == (10, 10)  # 3x3, 3x3, pooled, 3x3 of every other pixel
    images = torch.rand(1, 2, 32, 32)
    changed = images.clone()
    changed[:, :, 15:, :] = torch.rand(1, 2, 17, 32)
    with torch.inference_mode():
        same = model.cell_logits(images) == model.cell_logits(changed)
    assert same[:, :, :5].all()  # row 4 sees the pixels 4 to 13
    assert not same[:, :, 6:].any()
    assert CellViews(network((4, 4, 4, 4)), (32, 32), 2).size == (32, 32)


def test_other_networks_are_refused() -> None:
    with pytest.raises(PatchproofError, match="cell_logits, such as small-resnet, got Conv2d"):
        CellViews(nn.Conv2d(1, 1, 1), (8, 8), 1)
