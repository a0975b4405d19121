"""The command ``patchproof train``: its defaults, its options, its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from patchproof.cli.train import default_squares, train
from patchproof.datasets import load_dataset
from patchproof.models import ModelSpec, load_classifier, save_classifier
from patchproof.results import PatchproofError

app = typer.Typer()
app.command()(train)

QUICK = ["--data", "digits", "--epochs", "1", "--batch-size", "64", "--device", "cpu"]


def test_it_trains_a_classifier_for_the_digits(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--model-option", "widths=[8,16]", "--fill", "0.25"]
    result = CliRunner().invoke(app, [*QUICK, *options, "--count", "128"])
    assert result.exit_code == 0, result.output
    assert "epoch 1, validation accuracy" in result.output
    _, card = load_classifier(tmp_path / "model.safetensors")
    assert card["model"]["name"] == "tiny-resnet"
    assert card["model"]["options"] == {"widths": [8, 16]}
    assert card["made"]["fill"] == 0.25
    assert card["made"]["square_sizes"] == [2, 3]
    assert card["made"]["flip"] is False  # a mirrored digit is no digit
    assert card["made"]["data"]["train"]["images"] == 128


def test_the_plain_recipe_has_no_squares(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--recipe", "plain", "--count", "64"]
    result = CliRunner().invoke(app, [*QUICK, *options])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "card.json").read_text())["square_sizes"] is None


def test_greedy_cutout_goes_on_from_a_trained_classifier(tmp_path: Path) -> None:
    start = tmp_path / "first" / "model.safetensors"
    options = ["--out", str(start.parent), "--model-option", "widths=[8,16]", "--count", "128"]
    assert CliRunner().invoke(app, [*QUICK, *options]).exit_code == 0
    options = [
        "--recipe",
        "greedy-cutout",
        "--start",
        str(start),
        "--out",
        str(tmp_path / "second"),
    ]
    options += ["--patch", "2", "--masks", "3x4", "--candidates", "2", "--epoch-images", "128"]
    result = CliRunner().invoke(app, [*QUICK, *options])
    assert result.exit_code == 0, result.output
    assert "under the two masks that hurt most" in result.output
    _, card = load_classifier(tmp_path / "second" / "model.safetensors")
    assert card["model"]["options"] == {"widths": [8, 16]}
    made = card["made"]
    assert made["start"] == load_classifier(start)[1]["digest"]
    assert made["greedy"]["masks_per_side"] == [3, 4]
    assert made["greedy"]["candidates"] == 2
    assert made["greedy"]["threat"]["height"] == 2
    assert made["epoch_images"] == 128
    assert made["learning_rate"] == pytest.approx(0.04)
    assert made["square_sizes"] is None


def test_adamw_has_its_own_defaults(tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--optimizer", "adamw", "--count", "64"]
    result = CliRunner().invoke(app, [*QUICK, *options])
    assert result.exit_code == 0, result.output
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["learning_rate"], card["weight_decay"]) == (0.001, 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "greedy-cutout"], "--patch: expected a size"),
        (
            ["--recipe", "greedy-cutout", "--patch", "2", "--candidates", "0"],
            "at least 1 candidate",
        ),
        (["--recipe", "greedy-cutout", "--patch", "9"], "8"),
        (["--recipe", "greedy-cutout", "--patch", "2", "--squares", "2", "3"], "--squares"),
        (["--patch", "2"], "expected with --recipe greedy-cutout only, got cutout"),
        (["--recipe", "plain", "--candidates", "3"], "greedy-cutout only, got plain"),
        (["--start", "nothing.safetensors"], "does not exist"),
        (["--epoch-images", "32"], "at least one batch of 64"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, options: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, [*QUICK, "--out", str(tmp_path / "new"), *options])
    assert isinstance(result.exception, PatchproofError)
    assert message in str(result.exception)
    assert not (tmp_path / "new").exists()


def test_a_start_file_that_names_code_needs_the_model_option(tmp_path: Path) -> None:
    spec = ModelSpec("python:torch.nn:Flatten", 64, 1, (8, 8))
    save_classifier(tmp_path / "code.safetensors", torch.nn.Flatten(), spec, {})
    options = ["--start", str(tmp_path / "code.safetensors"), "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, [*QUICK, *options])
    assert isinstance(result.exception, PatchproofError)
    assert "expected --model python:torch.nn:Flatten too" in str(result.exception)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchproof.training.train", interrupted)
    result = CliRunner().invoke(app, [*QUICK, "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "the same command goes on" in result.output


def test_squares_are_20_to_40_percent_of_the_side() -> None:
    assert default_squares(load_dataset("digits")) == (2, 3)
