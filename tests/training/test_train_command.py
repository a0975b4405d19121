"""The command ``patchproof train``: its defaults, its options, its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from patchproof.cli.train import default_squares, parse_model_option, train
from patchproof.datasets import load_dataset
from patchproof.models import load_classifier
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


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchproof.training.train_cutout", interrupted)
    result = CliRunner().invoke(app, [*QUICK, "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "the same command goes on" in result.output


def test_squares_are_20_to_40_percent_of_the_side() -> None:
    assert default_squares(load_dataset("digits")) == (2, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("widths=[16,32]", ("widths", [16, 32])),
        ("stem_stride=2", ("stem_stride", 2)),
        ("img=a=b", ("img", "a=b")),
    ],
)
def test_model_options_are_json_or_text(text: str, expected: tuple[str, object]) -> None:
    assert parse_model_option(text) == expected


@pytest.mark.parametrize("text", ["widths", "=3"])
def test_model_options_need_a_name_and_a_value(text: str) -> None:
    with pytest.raises(PatchproofError, match="expected NAME=JSON"):
        parse_model_option(text)
