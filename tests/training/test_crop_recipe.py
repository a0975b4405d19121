"""The recipe ``crops``: what the network is shown, how it is validated, and that it learns."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.datasets import load_dataset
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec
from patchproof.training import CropRecipe, train

RECIPE = CropRecipe(
    crop_size=(3, 2),
    epochs=2,
    batch_size=64,
    shift=0,
    learning_rate=0.2,
    label_smoothing=0.0,
    precision="32-true",
)
SPEC = ModelSpec("crop-resnet9", 10, 1, (8, 8), {"crop": 5, "widths": [8, 16, 16, 16]})


class Recorder(nn.Module):
    """Two classes; keeps the crops that it is shown, and answers with their first pixel and 0."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, crops: Tensor) -> Tensor:
        self.seen.append(crops.clone())
        first = crops[:, 0, 0, 0]
        return torch.stack([first, torch.zeros_like(first)], 1)


class Told(nn.Module):
    """A network with ``cropped``, which keeps what it is told."""

    crop_size = (3, 2)

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[Tensor, Tensor, Tensor]] = []

    def cropped(self, images: Tensor, image: Tensor, corners: Tensor) -> Tensor:
        self.told.append((images, image, corners))
        return torch.zeros(len(image), 2)


def numbered(count: int, rows: int, columns: int) -> Tensor:
    """Return images whose pixels say which image, row and column they are of."""
    pixels = torch.arange(count * rows * columns, dtype=torch.float32)
    return pixels.view(count, 1, rows, columns)


class TestLoss:
    def test_each_image_shows_one_crop_at_a_place_of_its_own(self) -> None:
        torch.manual_seed(0)
        network, images = Recorder(), numbered(600, 5, 6)
        labels = torch.randint(2, (600,))
        loss = RECIPE.loss(network, images, labels, None)
        (seen,) = network.seen
        assert seen.shape == (600, 1, 3, 2)
        first = seen[:, 0, 0, 0].long()
        image, top, left = first // 30, first % 30 // 6, first % 6
        assert torch.equal(image, torch.arange(600))
        for crop, row, column, whole in zip(seen, top, left, images, strict=True):
            assert torch.equal(crop, whole[:, row : row + 3, column : column + 2])
        places = Counter(zip(top.tolist(), left.tolist(), strict=True))
        assert set(places) == {(row, column) for row in range(3) for column in range(5)}
        assert min(places.values()) > 20  # of 40 each
        logits = torch.stack([first.float(), torch.zeros(600)], 1)
        assert float(loss) == pytest.approx(float(functional.cross_entropy(logits, labels)))

    def test_a_network_that_asks_for_places_is_told_them(self) -> None:
        network, images = Told(), numbered(50, 5, 6)
        RECIPE.loss(network, images, torch.zeros(50, dtype=torch.int64), None)
        ((given, image, corners),) = network.told
        assert torch.equal(given, images)
        assert torch.equal(image, torch.arange(50))
        assert corners.shape == (50, 2)
        assert bool((corners[:, 0] <= 2).all() and (corners[:, 1] <= 4).all())
        assert len(set(map(tuple, corners.tolist()))) > 5

    def test_a_crop_as_large_as_the_image_is_the_image(self) -> None:
        network, images = Recorder(), numbered(4, 3, 2)
        RECIPE.loss(network, images, torch.zeros(4, dtype=torch.int64), None)
        assert torch.equal(network.seen[0], images)


class TestValidation:
    def test_spread_crops_vote_and_ties_go_to_the_lowest_class(self) -> None:
        drawn = RECIPE.draw(ModelSpec("small-resnet", 2, 1, (4, 3)), 1)
        assert drawn is not None
        assert drawn.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]  # all places
        images = torch.zeros(3, 1, 4, 3)
        images[0, 0, 0, 0] = 1.0  # first pixel of 1 of the 4 crops, which votes for class 0
        images[1, 0, 0, :2] = 1.0  # of 2
        images[2, 0, :2, :2] = 1.0  # of all 4

        class Bright(nn.Module):
            def forward(self, crops: Tensor) -> Tensor:
                first = crops[:, 0, 0, 0]
                return torch.stack([first, torch.full_like(first, 0.5)], 1)

        labels = torch.zeros(3, dtype=torch.int64)
        right = RECIPE.validate(Bright(), images, labels, drawn, slice(0, 3))
        assert right["vote_accuracy"].tolist() == [False, True, True]
        assert right["view_accuracy"].tolist() == [0.25, 0.5, 1.0]
        right = RECIPE.validate(Bright(), images, 1 - labels, drawn, slice(0, 3))
        assert right["vote_accuracy"].tolist() == [True, False, False]

    def test_where_places_are_many_a_grid_of_them_votes(self) -> None:
        drawn = replace(RECIPE, crop_size=(10, 12)).draw(ModelSpec("x", 2, 1, (32, 28)), 1)
        assert drawn is not None
        assert drawn.shape == (49, 2)
        assert len(set(map(tuple, drawn.tolist()))) == 49
        assert drawn.amin(0).tolist() == [0, 0]
        assert drawn.amax(0).tolist() == [22, 16]


def test_it_learns_digits_from_crops_and_goes_on(tmp_path: Path) -> None:
    data = load_dataset("digits", "train").sample(512, 0), load_dataset("digits", "validation")
    recipe = replace(RECIPE, crop_size=(5, 5), epochs=5, batch_size=32)
    best = train(recipe, SPEC, *data, tmp_path, device="cpu")
    assert best["vote_accuracy"] > 0.5
    assert best["vote_accuracy"] > best["view_accuracy"]
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in log]
    assert best["vote_accuracy"] == max(entry["vote_accuracy"] for entry in entries)
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["recipe"], card["crop_size"]) == ("crops", [5, 5])
    assert train(recipe, SPEC, *data, tmp_path, device="cpu") == best  # nothing is left to do
    assert (tmp_path / "log.jsonl").read_text().splitlines() == log


@pytest.mark.parametrize(
    ("crop_size", "message"),
    [
        ((4, 5), "expected the crops that the network was made for, (5, 5), got (4, 5)"),
        ((9, 5), "from 1 pixel to the 8x8 of the image"),
    ],
)
def test_crops_that_do_not_fit_are_refused(tmp_path: Path, crop_size: Any, message: str) -> None:
    data = load_dataset("digits", "train").sample(64, 0), load_dataset("digits", "validation")
    recipe = replace(RECIPE, crop_size=crop_size)
    with pytest.raises(PatchproofError) as raised:
        train(recipe, SPEC, *data, tmp_path / "new", device="cpu")
    assert message in str(raised.value)
    assert not (tmp_path / "new").exists()
