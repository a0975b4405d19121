"""The recipe ``ablation``: what the network is shown, and that it learns from it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchproof.datasets import load_dataset
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec
from patchproof.models.ablation import Ablation, Kept
from patchproof.training import AblationRecipe, train

RECIPE = AblationRecipe(
    ablation=Ablation("column", 3),
    epochs=2,
    batch_size=64,
    shift=0,
    learning_rate=0.2,
    precision="32-true",
)
SPEC = ModelSpec("band-resnet", 10, 1, (8, 8), {"size": 3, "widths": [16, 32]})


class Recorder(nn.Module):
    """Two classes; keeps what it is shown, and answers with the mean pixel and 0."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        mean = images.mean((1, 2, 3))
        return torch.stack([mean, torch.zeros_like(mean)], 1)


class Asked(nn.Module):
    """A network with ``ablated``, which keeps what it is asked for."""

    ablation = Ablation("column", 3)

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Kept] = []

    def ablated(self, images: Tensor, kept: Kept) -> Tensor:
        self.kept.append(kept)
        return torch.zeros(len(images), 2)


LABELS = torch.zeros(400, dtype=torch.int64)


class TestLoss:
    def test_each_image_keeps_one_band_at_a_place_of_its_own(self) -> None:
        torch.manual_seed(0)
        network = Recorder()
        RECIPE.loss(network, torch.ones(400, 1, 4, 8), LABELS, None)
        (seen,) = network.seen
        kept = seen == 1.0
        assert bool((kept | (seen == 0.5)).all())
        assert bool((kept == kept[:, :, :1]).all())  # whole columns
        assert bool((kept[:, 0, 0].sum(1) == 3).all())
        places = Counter(map(tuple, kept[:, 0, 0].tolist()))
        assert len(places) == 8  # wrapped ones among them
        assert min(places.values()) > 25

    def test_several_bands_are_at_different_places(self) -> None:
        torch.manual_seed(0)
        network = Asked()
        replace(RECIPE, bands=2).loss(network, torch.ones(400, 1, 4, 8), LABELS, None)
        (kept,) = network.kept
        assert kept.corners.shape == (400, 2, 2)
        assert kept.size == (4, 3)
        assert bool((kept.corners[:, 0] != kept.corners[:, 1]).any(1).all())

    def test_a_network_that_hides_by_itself_is_asked_for_it(self) -> None:
        network = Asked()
        RECIPE.loss(network, torch.ones(5, 1, 4, 8), LABELS[:5], None)
        assert network.kept[0].corners.shape == (5, 1, 2)


class TestValidation:
    def test_all_places_vote_and_ties_go_to_the_lowest_class(self) -> None:
        # A band votes for class 0 if it holds the bright column; the fill is darker than nothing.
        recipe = replace(RECIPE, fill=0.0)
        drawn = recipe.draw(ModelSpec("small-resnet", 2, 1, (4, 8)), 1)
        assert drawn is not None
        assert drawn[:, 0].tolist() == [[0, column] for column in range(8)]
        images = torch.zeros(2, 1, 4, 8)
        images[0, :, :, 2] = images[0, :, :, 4] = 1.0  # seen by 5 of the 8 bands
        images[1, :, :, 2] = images[1, :, :, 3] = 1.0  # by 4 of them
        labels = torch.tensor([0, 0])

        class Bright(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return torch.stack([images.amax((1, 2, 3)), torch.full((len(images),), 0.5)], 1)

        right = recipe.validate(Bright(), images, labels, drawn, slice(0, 2))
        assert right["vote_accuracy"].tolist() == [True, True]
        assert right["view_accuracy"].tolist() == [5 / 8, 4 / 8]
        right = recipe.validate(Bright(), images, 1 - labels, drawn, slice(0, 2))
        assert right["vote_accuracy"].tolist() == [False, False]

    def test_where_places_are_many_some_of_them_vote(self) -> None:
        blocks = replace(RECIPE, ablation=Ablation("block", 3))
        drawn = blocks.draw(ModelSpec("small-resnet", 2, 1, (28, 28)), 1)
        assert drawn is not None
        assert drawn.shape == (32, 1, 2)
        assert len(set(map(tuple, drawn[:, 0].tolist()))) == 32
        pairs = replace(RECIPE, bands=2).draw(ModelSpec("small-resnet", 2, 1, (28, 28)), 1)
        assert pairs is not None
        assert pairs.shape == (32, 2, 2)


def test_it_learns_digits_from_bands(tmp_path: Path) -> None:
    data = load_dataset("digits", "train").sample(512, 0), load_dataset("digits", "validation")
    best = train(replace(RECIPE, epochs=6, batch_size=32), SPEC, *data, tmp_path, device="cpu")
    assert best["vote_accuracy"] > 0.3
    assert best["vote_accuracy"] > best["view_accuracy"]
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert best["vote_accuracy"] == max(entry["vote_accuracy"] for entry in entries)
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["recipe"], card["bands"]) == ("ablation", 1)
    assert card["ablation"] == {"kind": "column", "size": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ablation": Ablation("column", 2)}, "the ablation that the network was made for"),
        ({"bands": 9}, "bands up to the 8 places"),
        ({"ablation": Ablation("column", 9)}, "inside the 8x8 image"),
    ],
)
def test_networks_and_images_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    data = load_dataset("digits", "train").sample(64, 0), load_dataset("digits", "validation")
    with pytest.raises(PatchproofError, match=message):
        train(replace(RECIPE, **changes), SPEC, *data, tmp_path / "new", device="cpu")
    assert not (tmp_path / "new").exists()


def test_no_band_is_refused() -> None:
    with pytest.raises(PatchproofError, match="bands from 1"):
        replace(RECIPE, bands=0)
