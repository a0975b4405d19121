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
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec, load_classifier, save_classifier

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


BAGNET = ["receptive_field=3", "stride=1", "widths=[8,8,8]", "depth=0"]
SMALL_BAGNET = [part for option in BAGNET for part in ("--model-option", option)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["masked-evidence", "--patch", "2"], {"window": [4, 4], "masks": 1, "clean_share": 0.5}),
        (
            ["masked-evidence", "--window", "3x2", "--evidence-masks", "2", "--clean-share", "0"],
            {"window": [3, 2], "masks": 2, "clean_share": 0.0},
        ),
        (["bagcert", "--patch", "2"], {"margin": 2 * 16 / 64}),
        (["bagcert", "--margin", "0.3"], {"margin": 0.3}),
        (["trimmed-mean", "--patch", "2"], {"statistic": "trimmed-mean", "trim": 16}),
        (["top-masking", "--window", "2"], {"statistic": "top-masking", "trim": 4}),
        (["median"], {"statistic": "median", "trim": 0}),
        (["clipped"], {"scale": 10.0}),
    ],
)
def test_recipes_of_local_features_train_a_bagnet(
    tmp_path: Path, options: list[str], expected: dict[str, object]
) -> None:
    all_options = ["--recipe", *options, "--out", str(tmp_path), "--count", "64", *SMALL_BAGNET]
    result = CliRunner().invoke(app, [*QUICK, *all_options])
    assert result.exit_code == 0, result.output
    assert "validation accuracy" in result.output
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["recipe"], card["model"]["name"]) == (options[0], "bagnet")
    assert card.items() >= expected.items()


@pytest.mark.parametrize(
    ("options", "ablation"),
    [
        (["--model-option", "widths=[8,16]"], {"kind": "column", "size": 4}),
        (
            ["--model-option", "widths=[8,16]", "--model-option", "ablation=row"],
            {"kind": "row", "size": 4},
        ),
        (["--model", "tiny-resnet", "--ablation", "block:3"], {"kind": "block", "size": 3}),
    ],
)
def test_ablation_keeps_what_the_network_was_made_for_or_what_is_asked(
    tmp_path: Path, options: list[str], ablation: dict[str, object]
) -> None:
    all_options = ["--recipe", "ablation", "--out", str(tmp_path), "--count", "64", *options]
    result = CliRunner().invoke(app, [*QUICK, *all_options, "--bands", "2"])
    assert result.exit_code == 0, result.output
    assert "accuracy of the vote" in result.output
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["ablation"] == ablation
    assert card["bands"] == 2
    assert card["model"]["name"] == ("tiny-resnet" if "--model" in options else "band-resnet")


def test_fine_tuning_of_local_features_has_no_clean_share(tmp_path: Path) -> None:
    start = tmp_path / "plain" / "model.safetensors"
    first = ["--recipe", "plain", "--model", "bagnet", *SMALL_BAGNET, "--out", str(start.parent)]
    assert CliRunner().invoke(app, [*QUICK, *first, "--count", "64"]).exit_code == 0
    second = ["--recipe", "masked-evidence", "--patch", "2", "--start", str(start)]
    out = tmp_path / "masked"
    result = CliRunner().invoke(app, [*QUICK, *second, "--out", str(out), "--count", "64"])
    assert result.exit_code == 0, result.output
    card = json.loads((out / "card.json").read_text())
    assert card["clean_share"] == 0.0
    assert card["learning_rate"] == pytest.approx(0.04)


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
        (["--patch", "2"], "--patch: expected with --recipe greedy-cutout, interval-bounds, "),
        (["--recipe", "clipped", "--window", "2"], "--window: expected with --recipe masked"),
        (["--recipe", "plain", "--margin", "0.2"], "--margin: expected with --recipe bagcert only"),
        (["--recipe", "plain", "--bands", "2"], "--bands: expected with --recipe ablation only"),
        (["--recipe", "bagcert", "--evidence-masks", "2"], "with --recipe masked-evidence only"),
        (["--recipe", "ablation", "--clean-share", "0.5"], "--clean-share: expected with"),
        (["--recipe", "masked-evidence"], "--patch or --window: expected one of them"),
        (["--recipe", "top-masking", "--patch", "2", "--window", "3"], "one of them for this"),
        (["--recipe", "bagcert", "--patch", "2", "--margin", "0.2"], "--margin, or --patch"),
        (["--recipe", "bagcert", "--patch", "6"], "features"),
        (["--recipe", "median", "--model", "tiny-resnet"], "local_logits, such as bagnet"),
        (["--recipe", "ablation", "--model", "tiny-resnet"], "--ablation: expected what to keep"),
        (["--recipe", "ablation", "--ablation", "4"], "expected column:4, row:4 or block:8"),
        (["--recipe", "ablation", "--ablation", "row:4"], "that the network was made for"),
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
