"""Defenses without a certificate from the command line: predict, saved files, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from patchproof import DigitalWatermarking, SquarePatch
from patchproof.models import ModelSpec, build_model

Patchproof = Callable[[str], tuple[int, str, str]]

MODEL = "--model python:halves_model:BrighterHalf --classes 2 --device cpu"
PREDICT = f"predict images/left/7.png images/right/7.png {MODEL} --patch 2"
CERTIFY = f"certify --data images --split all {MODEL} --patch 2 --out run"
SMOOTHING = "local-gradient-smoothing --defense-option window=4 --defense-option overlap=1"
DEFENSES = {
    "undefended": 1,
    f"{SMOOTHING} --defense-option threshold=0.3 --defense-option smoothing=1": 1,
    "digital-watermarking --defense-option opening=2 --fill 0.2": 2,
}


@pytest.mark.parametrize(("defense", "forwards"), DEFENSES.items())
def test_predict(patchproof: Patchproof, defense: str, forwards: int) -> None:
    code, output, _ = patchproof(f"{PREDICT} --defense {defense} --json")
    assert code == 0
    answers = [json.loads(line) for line in output.splitlines()]
    assert [answer["label"] for answer in answers] == [0, 1]
    assert [answer["forwards"] for answer in answers] == [forwards] * 2
    assert {answer["patch_suspected"] for answer in answers} == {None}
    code, output, _ = patchproof(f"{PREDICT} --defense {defense}")
    assert output.splitlines()[0].startswith("images/left/7.png: 0, case agreed, ")


@pytest.mark.parametrize("defense", DEFENSES)
def test_there_is_nothing_to_certify(patchproof: Patchproof, workplace: Path, defense: str) -> None:
    code, output, errors = patchproof(f"{CERTIFY} --defense {defense}")
    assert (code, output) == (2, "")
    assert "expected one with a certificate, got" in errors
    assert "patchproof attack" in errors
    assert not (workplace / "run").exists()


def test_a_saved_defense(patchproof: Patchproof, workplace: Path) -> None:
    spec = ModelSpec("tiny-resnet", 2, 1, (8, 8))
    defense = DigitalWatermarking(build_model(spec), SquarePatch(2), image_size=(8, 8), opening=2)
    defense.save(workplace / "saved.safetensors", spec)
    code, output, _ = patchproof("predict images/left/0.png --defense saved.safetensors")
    assert code == 0
    assert "2 forwards" in output
    code, _, errors = patchproof(
        "certify --data images --split all --defense saved.safetensors --out run"
    )
    assert code == 2
    assert "got DigitalWatermarking, of which nothing is proved" in errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "undefended --defense-option window=5",
            "--defense-option: expected none for undefended, got 'window'",
        ),
        (
            f"{SMOOTHING} --defense-option fill=0.5",
            "expected one of window, overlap, threshold, smoothing for local-gradient-smoothing, "
            "got 'fill'",
        ),
        (
            f"{SMOOTHING} --defense-option smoothing=much",
            "--defense-option smoothing: expected a number above 0 such as 2.3, got 'much'",
        ),
        (
            "digital-watermarking --defense-option window=2.5",
            "--defense-option window: expected a side in pixels such as 5, got 2.5",
        ),
        (
            "digital-watermarking --defense-option window=true",
            "expected a side in pixels such as 5, got True",
        ),
        ("digital-watermarking --defense-option window=9", "at most the image's 8x8 pixels, got 9"),
        ("local-gradient-smoothing", "at most the image's 8x8 pixels, got 15"),
        ("undefended --fill 0.3", "--fill: expected with a defense that hides pixels"),
        (f"{SMOOTHING} --fill 0.3", "--fill: expected with a defense that hides pixels"),
        (
            "undefended --tolerance 0.1",
            "--tolerance: expected with a defense that certifies, got undefended",
        ),
        ("undefended --tau 0.5", "--tau: expected with --defense minority-reports or patchguard++"),
        ("digital-watermarking --masks 4", "--masks: expected with --defense patchcleanser or"),
    ],
)
def test_mistakes_in_one_line(patchproof: Patchproof, options: str, words: str) -> None:
    code, output, errors = patchproof(f"{PREDICT} --defense {options}")
    assert (code, output) == (2, "")
    assert words in errors
    assert len(errors.splitlines()) == 1


def test_the_list_names_them(patchproof: Patchproof) -> None:
    _, output, _ = patchproof("list")
    for name in ("undefended", "local-gradient-smoothing", "digital-watermarking"):
        assert name in output


ANALYZE = "analyze heuristics --data images --split all --classes 2 --device cpu --patch 2 "
ANALYZE += "--model python:halves_model:BrighterHalf --steps 30 --out out"


def test_search_for_settings(patchproof: Patchproof, workplace: Path) -> None:
    (workplace / "images/left/2.png").write_bytes(b"not an image")
    line = f"{ANALYZE} --defense digital-watermarking --grid window=2,3,9 --grid opening=1"
    code, output, errors = patchproof(f"{line} --fill 0.2")
    assert code == 0, errors
    assert "digital-watermarking on 15 images of images" in " ".join(output.split())
    assert "1 images are corrupt and left out" in output
    table = pd.read_csv(workplace / "out/heuristics/heuristics.csv")
    assert table["window"].tolist() == [2] * 3 + [3] * 3, "9 is more than the image has"
    assert table["threshold"].tolist() == [0.1, 0.3, 0.5] * 2
    assert set(table["fill"]) == {0.2}
    assert table["best"].sum() == 1
    assert (table["vanilla_attacked"] < table["vanilla"]).all()
    assert "| window | regions | T |" in (workplace / "out/heuristics/heuristics.md").read_text()
    about = json.loads((workplace / "out/heuristics/analysis.json").read_text())
    assert about["identity"]["parameters"]["attack"]["steps"] == 30
    code, _, errors = patchproof(f"{line} --fill 0.3")
    assert code == 2
    assert "holds the results of another run: parameters.settings is" in errors


def test_search_with_values_of_its_own(patchproof: Patchproof, workplace: Path) -> None:
    code, output, errors = patchproof(
        f"{ANALYZE} --defense local-gradient-smoothing --count 6 --most-lost 0"
    )
    assert code == 0, errors
    table = pd.read_csv(workplace / "out/heuristics/heuristics.csv")
    assert len(table) == 12
    kept = table["clean"] >= table["vanilla"]
    assert table["best"].any() == kept.any()
    assert ("All settings lose more" in output) == (not kept.any())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--grid fill=0.5", "--grid: expected each of window, overlap, threshold, smoothing once"),
        ("--grid window=3 --grid window=4", "once at most for local-gradient-smoothing"),
        ("--grid window=", "--grid: expected numbers such as window=1,2, got 'window='"),
        ("--grid window=some", "--grid: expected numbers such as window=1,2"),
        ("--grid window=2.5", "--grid window: expected a side in pixels such as 5, got 2.5"),
        ("--grid window=20", "window: expected at most the image's 8x8 pixels, got 20"),
    ],
)
def test_mistakes_in_a_grid(
    patchproof: Patchproof, workplace: Path, options: str, words: str
) -> None:
    code, _, errors = patchproof(f"{ANALYZE} --defense local-gradient-smoothing {options}")
    assert code == 2
    assert words in errors
    assert not (workplace / "out").exists()
