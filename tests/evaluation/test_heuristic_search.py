"""The search for settings of defenses without a certificate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.attacks import PatchIFGSM
from patchproof.errors import PatchproofError
from patchproof.evaluation.heuristic_search import (
    AttackedImages,
    all_settings,
    possible_defenses,
    search_settings,
)

THREAT = pp.SquarePatch(2)
SIZE = (8, 8)


class Glaring(nn.Module):
    """Says 1 if there is more than a little of pixels above 0.8, else 0."""

    def forward(self, images: Tensor) -> Tensor:
        glare = (images - 0.8).relu().sum((1, 2, 3))
        return torch.stack([torch.full_like(glare, 0.3), glare], 1)


@pytest.fixture(scope="module")
def images() -> AttackedImages:
    """Dim images, right as 0; the attacked ones glare. Every fourth glares itself, right as 1."""
    clean = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    labels = torch.zeros(8, dtype=torch.int64)
    clean[::4, :, 2:4, 2:4] = 1.0
    labels[::4] = 1
    attacked = clean.clone()
    attacked[..., 2:4, 2:4] = 1.0
    attacked[::4, :, 2:4, 2:4] = 0.0
    return AttackedImages(clean, attacked, labels)


@pytest.fixture
def undefended() -> pp.Undefended:
    return pp.Undefended(Glaring().eval(), THREAT, image_size=SIZE)


def test_rows_are_what_the_defenses_say(images: AttackedImages, undefended: pp.Undefended) -> None:
    settings = all_settings({"window": [1, 2], "threshold": [0.1], "opening": [1, 2]})
    assert settings == [
        {"window": window, "threshold": 0.1, "opening": opening}
        for window in (1, 2)
        for opening in (1, 2)
    ]
    defenses = possible_defenses(pp.DigitalWatermarking, undefended, settings, fill=0.4)
    table = search_settings(undefended, defenses, images)
    assert len(table) == 4
    for row, chosen in zip(table.to_dict("records"), settings, strict=True):
        defense = pp.DigitalWatermarking(
            undefended.model, THREAT, image_size=SIZE, fill=0.4, **chosen
        )
        for name, shown in (("clean", images.clean), ("attacked", images.attacked)):
            assert row[name] == (defense.predict(shown) == images.labels).float().mean()
        assert {name: row[name] for name in chosen} == chosen
        assert (row["regions"], row["fill"], row["count"]) == (1, 0.4, 8)
        assert (row["vanilla"], row["vanilla_attacked"]) == (1.0, 0.0)
        assert row["clean_low"] < row["clean"] <= row["clean_high"]


def test_the_best_is_chosen_under_attack_unless_it_loses_too_much(
    images: AttackedImages, undefended: pp.Undefended
) -> None:
    defenses = possible_defenses(pp.DigitalWatermarking, undefended, [{"window": 1}, {"window": 2}])
    # one pixel of glare less changes nothing; without all four, images of 1 are lost
    table = search_settings(undefended, defenses, images)
    assert table["clean"].tolist() == [1.0, 0.75]
    assert table["attacked"].tolist() == [0.0, 0.75]
    for most_lost, best in ((1.0, [False, True]), (0.25, [False, True]), (0.2, [True, False])):
        table = search_settings(undefended, defenses, images, most_lost)
        assert table["best"].tolist() == best
    assert search_settings(undefended, defenses[1:], images, 0.2)["best"].tolist() == [False]


def test_settings_that_are_refused_are_left_out(undefended: pp.Undefended) -> None:
    def found(*windows: int) -> list[int]:
        settings = all_settings({"window": windows, "overlap": [2]})
        made = possible_defenses(pp.LocalGradientSmoothing, undefended, settings)
        return [defense.settings()["window"] for defense in made]

    assert found(2, 3, 8, 9) == [3, 8]
    with pytest.raises(PatchproofError, match=r"window: expected at most .* got 9"):
        found(2, 9)
    with pytest.raises(PatchproofError, match="settings: expected at least one, got none"):
        found()


def test_mistakes_in_a_search(images: AttackedImages, undefended: pp.Undefended) -> None:
    defenses = possible_defenses(pp.DigitalWatermarking, undefended, [{}])
    with pytest.raises(PatchproofError, match="most_lost: expected a share"):
        search_settings(undefended, defenses, images, 2.0)
    none = AttackedImages(images.clean[:0], images.attacked[:0], images.labels[:0])
    with pytest.raises(PatchproofError, match="one image and one defense, got 0 and 1"):
        search_settings(undefended, defenses, none)
    with pytest.raises(PatchproofError, match="one image and one defense, got 8 and 0"):
        search_settings(undefended, [], images)


class Bright(nn.Module):
    """Says 1 if the image is a little brighter than 64 pixels of 0.2, else 0."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([torch.full((len(images),), 12.9), images.sum((1, 2, 3))], 1)


def test_the_attack_goes_on_after_its_first_success() -> None:
    undefended = pp.Undefended(Bright().eval(), THREAT, image_size=SIZE)
    clean = torch.full((3, 1, 8, 8), 0.2)
    labels = torch.tensor([0, 0, 1])
    attack = PatchIFGSM(steps=30, step_size=0.1, momentum=0.0)
    left: list[int] = []
    found = AttackedImages.of(undefended, attack, clean, labels, progress=left.append)
    assert undefended.predict(found.attacked).tolist() == [1, 1, 0]
    changed = found.attacked != clean
    assert changed.flatten(1).sum(1).tolist() == [4, 4, 0], "the last was wrong before"
    assert found.attacked[changed].eq(1.0).all()
    assert torch.equal(found.clean, clean)
    assert left[0] == 2
