"""The recipes: what they do to images, and that they train, resume and repeat."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from patchproof.datasets import ImageDataset, load_dataset
from patchproof.errors import PatchproofError, RunError
from patchproof.models import ModelSpec, build_model, load_classifier
from patchproof.threat import SquarePatch
from patchproof.training import CutoutRecipe, GreedyMasks, Recipe, train
from patchproof.training.loop import make_optimizer, shift_and_flip
from patchproof.training.masking import draw_candidates, random_squares

RECIPE = CutoutRecipe(square_sizes=(2, 3), epochs=3, batch_size=64, shift=1, precision="32-true")
SPEC = ModelSpec("tiny-resnet", 10, 1, (8, 8), {"widths": [8, 16]})
GREEDY = replace(
    RECIPE,
    square_sizes=None,
    greedy=GreedyMasks(SquarePatch(2), (4, 4), 3),
    epochs=2,
    epoch_images=128,
    learning_rate=0.05,
)


@pytest.fixture(scope="module")
def digits() -> tuple[ImageDataset, ImageDataset]:
    return load_dataset("digits", "train").sample(512, 0), load_dataset("digits", "validation")


@pytest.fixture(scope="module")
def trained(
    digits: tuple[ImageDataset, ImageDataset], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    train(RECIPE, SPEC, *digits, out, device="cpu")
    return out


def log_without_times(out: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


class TestSquares:
    def test_every_square_size_in_the_range_is_drawn(self) -> None:
        torch.manual_seed(0)
        # Where both squares lie apart and inside, the covered pixels are the sum of two squares.
        areas = set(random_squares(4000, (64, 64), (2, 4)).sum((1, 2, 3)).tolist())
        assert {a * a + b * b for a in (2, 3, 4) for b in (2, 3, 4)} <= areas
        assert max(areas) == 32

    def test_each_pixel_is_covered_by_some_square(self) -> None:
        torch.manual_seed(0)
        squares = random_squares(4000, (8, 6), (3, 3))
        assert squares.shape == (4000, 1, 8, 6)
        assert squares.dtype == torch.bool
        share = squares.float().mean(0)
        assert share.min() > 0.1  # corners too
        assert share.max() < 0.7

    def test_one_pixel_squares_are_uniform(self) -> None:
        torch.manual_seed(0)
        share = random_squares(20_000, (5, 5), (1, 1)).float().mean(0)
        assert torch.allclose(share, torch.full((1, 5, 5), 1 - (24 / 25) ** 2), atol=0.01)


class TestShiftAndFlip:
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 1, 3, 4)

    def test_nothing_changes_without_shift_and_flip(self) -> None:
        images = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
        assert torch.equal(shift_and_flip(images, replace(RECIPE, shift=0)), images)

    def test_flips_go_left_to_right_and_half_of_the_images_flip(self) -> None:
        torch.manual_seed(0)
        images = self.image.expand(1000, -1, -1, -1)
        flipped = shift_and_flip(images, replace(RECIPE, shift=0, flip=True))
        same = (flipped == self.image).flatten(1).all(1)
        mirrored = (flipped == self.image.flip(3)).flatten(1).all(1)
        assert bool((same ^ mirrored).all())
        assert 400 < int(same.sum()) < 600

    def test_shifts_reach_every_offset_and_mirror_the_border(self) -> None:
        torch.manual_seed(0)
        shifted = shift_and_flip(self.image.expand(500, -1, -1, -1), replace(RECIPE, shift=1))
        padded = torch.nn.functional.pad(self.image.float(), (1, 1, 1, 1), mode="reflect")
        expected = {
            tuple(padded[0, 0, top : top + 3, left : left + 4].flatten().int().tolist())
            for top in range(3)
            for left in range(3)
        }
        assert {tuple(image.flatten().tolist()) for image in shifted} == expected


class TestTraining:
    def test_it_learns_and_writes_the_best_epoch(self, trained: Path) -> None:
        log = log_without_times(trained)
        assert [entry["epoch"] for entry in log] == [1, 2, 3]
        assert log[-1]["loss"] < log[0]["loss"]
        _, card = load_classifier(trained / "model.safetensors")
        made = card["made"]
        assert made["best"]["masked_accuracy"] == max(entry["masked_accuracy"] for entry in log)
        assert made["best"]["clean_accuracy"] > 0.5
        assert (made["recipe"], made["fill"], made["square_sizes"]) == ("cutout", 0.5, [2, 3])
        assert made["data"]["train"]["images"] == 512
        assert {file.name for file in trained.iterdir()} == {
            "card.json",
            "checkpoint.pt",
            "log.jsonl",
            "model.safetensors",
        }

    def test_a_stopped_training_goes_on_to_the_same_network(
        self,
        digits: tuple[ImageDataset, ImageDataset],
        trained: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        calls = 0

        def interrupted(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 11:  # in the second epoch of 8 steps
                raise KeyboardInterrupt
            return shift_and_flip(images, recipe)

        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr("patchproof.training.loop.shift_and_flip", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(RECIPE, SPEC, *digits, out, device="cpu")
        assert len(log_without_times(out)) == 1
        train(RECIPE, SPEC, *digits, out, device="cpu")
        assert log_without_times(out) == log_without_times(trained)
        digest = load_classifier(trained / "model.safetensors")[1]["digest"]
        assert load_classifier(out / "model.safetensors")[1]["digest"] == digest

    def test_a_finished_training_is_not_repeated(
        self, digits: tuple[ImageDataset, ImageDataset], trained: Path
    ) -> None:
        before = (trained / "model.safetensors").stat().st_mtime_ns
        best = train(RECIPE, SPEC, *digits, trained, device="cpu")
        assert best["masked_accuracy"] == max(
            e["masked_accuracy"] for e in log_without_times(trained)
        )
        assert (trained / "model.safetensors").stat().st_mtime_ns == before

    def test_a_folder_of_another_training_is_refused(
        self, digits: tuple[ImageDataset, ImageDataset], trained: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(PatchproofError, match="expected a new folder or one of this training"):
            train(replace(RECIPE, seed=1), SPEC, *digits, trained, device="cpu")
        with pytest.raises(PatchproofError, match="expected a new folder or one of this training"):
            train(RECIPE, SPEC, digits[0].sample(500, 0), digits[1], trained, device="cpu")
        shutil.copy(trained / "model.safetensors", tmp_path)
        with pytest.raises(PatchproofError, match="expected a new folder or one of this training"):
            train(RECIPE, SPEC, *digits, tmp_path, device="cpu")

    def test_the_plain_recipe_chooses_by_clean_accuracy(
        self, digits: tuple[ImageDataset, ImageDataset], tmp_path: Path
    ) -> None:
        plain = replace(RECIPE, square_sizes=None, epochs=2)
        best = train(plain, SPEC, *digits, tmp_path, device="cpu")
        assert best["masked_accuracy"] is None
        assert best["clean_accuracy"] == max(
            e["clean_accuracy"] for e in log_without_times(tmp_path)
        )
        assert json.loads((tmp_path / "card.json").read_text())["recipe"] == "plain"

    def test_a_loss_that_is_not_finite_ends_the_run_and_can_be_tried_again(
        self, digits: tuple[ImageDataset, ImageDataset], tmp_path: Path
    ) -> None:
        with pytest.raises(RunError, match="expected a finite loss"):
            train(replace(RECIPE, learning_rate=1e30), SPEC, *digits, tmp_path, device="cpu")
        train(replace(RECIPE, epochs=1), SPEC, *digits, tmp_path, device="cpu")

    def test_a_damaged_checkpoint_is_named(
        self, digits: tuple[ImageDataset, ImageDataset], trained: Path, tmp_path: Path
    ) -> None:
        out = shutil.copytree(trained, tmp_path / "copy")
        (out / "checkpoint.pt").write_bytes(b"damaged")
        with pytest.raises(RunError, match=r"checkpoint\.pt"):
            train(RECIPE, SPEC, *digits, out, device="cpu")

    def test_data_that_do_not_fit_are_refused(
        self, digits: tuple[ImageDataset, ImageDataset], tmp_path: Path
    ) -> None:
        with pytest.raises(PatchproofError, match="expected images for ModelSpec"):
            train(RECIPE, replace(SPEC, channels=3), *digits, tmp_path)
        with pytest.raises(PatchproofError, match="expected images of 9 classes, got 10"):
            train(RECIPE, replace(SPEC, classes=9), *digits, tmp_path)
        with pytest.raises(PatchproofError, match="at least one batch of 64"):
            train(RECIPE, SPEC, digits[0].sample(63, 0), digits[1], tmp_path)
        with pytest.raises(PatchproofError, match="expected a device and a precision"):
            train(RECIPE, SPEC, *digits, tmp_path, device="abacus")


class TestGreedyCutout:
    def test_it_starts_from_given_weights_and_records_them(
        self, digits: tuple[ImageDataset, ImageDataset], trained: Path, tmp_path: Path
    ) -> None:
        start = trained / "model.safetensors"
        still = replace(GREEDY, learning_rate=1e-12, weight_decay=0.0)
        best = train(still, SPEC, *digits, tmp_path, device="cpu", start=start)
        before, start_card = load_classifier(start)
        after, card = load_classifier(tmp_path / "model.safetensors")
        for old, new in zip(before.parameters(), after.parameters(), strict=True):
            assert torch.allclose(old, new, rtol=0, atol=1e-7)
        assert card["made"]["start"] == start_card["digest"]
        assert json.loads((tmp_path / "card.json").read_text())["start"] == start_card["digest"]
        assert card["made"]["recipe"] == "greedy-cutout"
        assert card["made"]["greedy"]["candidates"] == 3
        assert best["masked_accuracy"] < best["clean_accuracy"]

    def test_it_makes_the_network_better_under_the_masks_that_hurt_most(
        self, digits: tuple[ImageDataset, ImageDataset], trained: Path, tmp_path: Path
    ) -> None:
        longer = replace(GREEDY, epochs=4, epoch_images=None)
        start = trained / "model.safetensors"
        best = train(longer, SPEC, *digits, tmp_path, device="cpu", start=start)
        log = log_without_times(tmp_path)
        assert best["masked_accuracy"] == max(entry["masked_accuracy"] for entry in log)
        assert best["masked_accuracy"] > log[0]["masked_accuracy"]

    def test_a_stopped_training_goes_on_to_the_same_network(
        self,
        digits: tuple[ImageDataset, ImageDataset],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        calls = 0

        def interrupted(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 4:  # in the second epoch of 2 steps
                raise KeyboardInterrupt
            return shift_and_flip(images, recipe)

        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        train(GREEDY, SPEC, *digits, whole, device="cpu")
        with monkeypatch.context() as patch:
            patch.setattr("patchproof.training.loop.shift_and_flip", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train(GREEDY, SPEC, *digits, stopped, device="cpu")
        assert len(log_without_times(stopped)) == 1
        train(GREEDY, SPEC, *digits, stopped, device="cpu")
        assert log_without_times(stopped) == log_without_times(whole)
        digests = {
            load_classifier(out / "model.safetensors")[1]["digest"] for out in tmp_path.iterdir()
        }
        assert len(digests) == 1

    def test_every_epoch_is_validated_with_the_same_candidates(
        self,
        digits: tuple[ImageDataset, ImageDataset],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        validation = digits[1].sample(100, 0)  # no batch of the training has so many images
        drawn = []

        def recorded(count: int, masks: int, candidates: int) -> torch.Tensor:
            choice = draw_candidates(count, masks, candidates)
            if count == 100:
                drawn.append(choice)
            return choice

        monkeypatch.setattr("patchproof.training.masking.draw_candidates", recorded)
        train(GREEDY, SPEC, digits[0], validation, tmp_path, device="cpu")
        first, second, *next_epoch = drawn
        assert not torch.equal(first, second)
        assert all(map(torch.equal, next_epoch, (first, second)))
        assert len(next_epoch) == 2

    def test_weights_of_another_network_are_refused(
        self, digits: tuple[ImageDataset, ImageDataset], trained: Path, tmp_path: Path
    ) -> None:
        start = trained / "model.safetensors"
        wider = replace(SPEC, options={"widths": [8, 32]})
        with pytest.raises(PatchproofError, match=r"expected weights of ModelSpec.* to start from"):
            train(RECIPE, wider, *digits, tmp_path, start=start)
        with pytest.raises(PatchproofError, match="to start from, got both"):
            train(RECIPE, SPEC, *digits, tmp_path, start=start, pretrained=True)
        with pytest.raises(PatchproofError, match="does not exist"):
            train(RECIPE, SPEC, *digits, tmp_path, start=tmp_path / "nothing")
        assert not list(tmp_path.iterdir())

    def test_other_start_weights_are_another_training(
        self, digits: tuple[ImageDataset, ImageDataset], trained: Path, tmp_path: Path
    ) -> None:
        once = replace(GREEDY, epochs=1)
        train(once, SPEC, *digits, tmp_path / "scratch", device="cpu")
        with pytest.raises(PatchproofError, match="expected a new folder or one of this training"):
            train(
                once,
                SPEC,
                *digits,
                tmp_path / "scratch",
                device="cpu",
                start=trained / "model.safetensors",
            )

    def test_masks_that_do_not_fit_the_images_are_refused(
        self, digits: tuple[ImageDataset, ImageDataset], tmp_path: Path
    ) -> None:
        too_large = replace(GREEDY, greedy=GreedyMasks(SquarePatch(9)))
        with pytest.raises(PatchproofError, match="8"):
            train(too_large, SPEC, *digits, tmp_path)

    def test_an_epoch_of_more_images_than_there_are_is_refused(
        self, digits: tuple[ImageDataset, ImageDataset], tmp_path: Path
    ) -> None:
        with pytest.raises(PatchproofError, match="at most the 512 training images, got 513"):
            train(replace(GREEDY, epoch_images=513), SPEC, *digits, tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 2}),
        ("timm:resmlp_12_224", {"num_blocks": 2, "embed_dim": 24}),
    ],
)
def test_small_transformers_and_mlps_learn_with_adamw(
    digits: tuple[ImageDataset, ImageDataset], tmp_path: Path, name: str, options: dict[str, int]
) -> None:
    spec = ModelSpec(name, 10, 1, (8, 8), {"img_size": 8, "patch_size": 2} | options)
    recipe = replace(
        RECIPE,
        square_sizes=None,
        shift=0,
        epochs=6,
        batch_size=32,
        optimizer="adamw",
        learning_rate=0.005,
        weight_decay=0.05,
    )
    best = train(recipe, spec, *digits, tmp_path, device="cpu")
    log = log_without_times(tmp_path)
    assert log[-1]["loss"] < log[0]["loss"] - 0.15
    assert best["clean_accuracy"] > 0.2
    assert json.loads((tmp_path / "card.json").read_text())["optimizer"] == "adamw"


def test_adamw_decays_matrices_and_kernels_alone() -> None:
    network = build_model(
        ModelSpec(
            "timm:resmlp_12_224",
            10,
            1,
            (8, 8),
            {"img_size": 8, "patch_size": 4, "num_blocks": 1, "embed_dim": 6},
        )
    )
    recipe = replace(RECIPE, optimizer="adamw", weight_decay=0.05)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed, free = (
        {names[id(parameter)].removeprefix("model.") for parameter in group["params"]}
        for group in make_optimizer(recipe, network).param_groups
    )
    assert decayed | free == {name.removeprefix("model.") for name in names.values()}
    assert {"stem.proj.weight", "head.weight", "blocks.0.mlp_channels.fc1.weight"} <= decayed
    assert {"head.bias", "norm.alpha", "norm.beta", "blocks.0.ls1"} <= free
    assert [group["weight_decay"] for group in make_optimizer(recipe, network).param_groups] == [
        0.05,
        0.0,
    ]


def test_recipes_that_began_before_the_newer_settings_keep_their_card() -> None:
    assert RECIPE.to_dict() == {
        "recipe": "cutout",
        "square_sizes": [2, 3],
        "fill": 0.5,
        "epochs": 3,
        "batch_size": 64,
        "learning_rate": 0.4,
        "warmup": 0.2,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "label_smoothing": 0.1,
        "shift": 1,
        "flip": False,
        "seed": 0,
        "precision": "32-true",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"greedy": GreedyMasks(SquarePatch(2))},
        {"optimizer": "adam"},
        {"epoch_images": 63},
        {"square_sizes": (0, 3)},
        {"square_sizes": (4, 3)},
        {"fill": 1.5},
        {"epochs": 0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup": -0.1},
        {"precision": "8-bit"},
        {"shift": -1},
    ],
)
def test_impossible_recipes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PatchproofError, match="expected"):
        replace(RECIPE, **changes)
