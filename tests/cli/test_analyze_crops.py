"""The analyses of crops as a user runs them: what they say is what ``certify`` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from patchproof.evaluation import read_result
from patchproof.evaluation.summary import ProbableSummary, Summary

Patchproof = Callable[[str], tuple[int, str, str]]

DATA = "--data images --split all --classes 2 --device cpu --batch-size 64 --tolerance 0.001"
MODEL = "--model python:halves_model:BrighterHalf"
SLICE = f"{MODEL} --crop 6 {DATA} --out out"


def table(name: str, folder: str = "") -> pd.DataFrame:
    return pd.read_csv(Path("out") / (folder or name) / f"{name}.csv")


def test_what_votes_certify_is_what_certify_says(patchproof: Patchproof) -> None:
    line = f"analyze crops {SLICE} --patches 1,2x1 --numbers 4,5 --probabilities 0.3,0.9"
    code, out, err = patchproof(line)
    assert code == 0, err
    assert "crops of 16 images of images" in out
    found = table("crops")
    assert len(found) == 2 * (1 + 2 + 2 * 2)
    assert sorted(path.name for path in Path("out/crops").glob("*.png")) == [
        "numbers.png",
        "patches.png",
    ]
    defense = f"{MODEL} --defense randomized-cropping --defense-option crop=6 --patch 1 {DATA}"
    for mode, options in (
        ("all-crops", ""),
        ("fixed-crops", "--defense-option mode=fixed-crops --defense-option crops=5"),
        ("random-crops", "--defense-option mode=random-crops --defense-option crops=5"),
    ):
        code, _, err = patchproof(f"certify {defense} {options} --gallery 0 --out run-{mode}")
        assert code == 0, err
        summary = read_result(f"run-{mode}").summary
        rows = found[(found["threat"] == "1x1 square") & (found["mode"] == mode)]
        row = rows[rows["crops"] == (9 if mode == "all-crops" else 5)].iloc[0]
        if isinstance(summary, ProbableSummary):
            certified = read_result(f"run-{mode}").examples["success_probability"] >= 0.3
            assert row["certified_with_probability"] == certified.mean()
            assert row["probability"] == 0.3
            assert pd.isna(row["certified"])
        else:
            assert isinstance(summary, Summary)
            assert summary.paper_accuracy is not None
            assert row["certified"] == summary.certified_accuracy.value
            assert row["clean"] == summary.clean_accuracy.value
            assert row["paper"] == summary.paper_accuracy.value
            assert pd.isna(row["certified_with_probability"])


def test_every_crop_is_classified_once_for_all_analyses(patchproof: Patchproof) -> None:
    assert patchproof(f"analyze crops {SLICE} --patches 1")[0] == 0
    code, out, err = patchproof(f"analyze crop-draws {SLICE} --patches 1 --numbers 4,8 --times 20")
    assert code == 0, err
    assert "0 of them in this run" in out
    draws = table("crop-draws")
    assert draws["crops"].tolist() == [4, 8]
    assert (draws["turn_interval"] >= 0).all()
    assert (draws["chance_interval"] <= 1).all()
    code, out, err = patchproof(
        f"analyze crops-needed {SLICE} --patches 1 --numbers 5,9 --probabilities 0.3"
    )
    assert code == 0, err
    needed = table("crops-needed")
    assert needed["certified_with_probability"].is_monotonic_increasing
    line = f"{SLICE} --patches 1 --modes random-crops --numbers 5 --probabilities 0.3"
    assert patchproof(f"analyze crops {line} --name again")[0] == 0
    again = table("crops", "again")["certified_with_probability"]
    assert needed["certified_with_probability"].iloc[0] == again.iloc[0]
    about = json.loads(Path("out/again/analysis.json").read_text())["about"]
    assert about["forwards_in_this_run"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--patches 1 --modes some", "--modes: expected some of all-crops"),
        ("--patches 1 --modes all-crops,all-crops", "each once"),
        ("--patches 1 --numbers 0", "--numbers: expected numbers of crops"),
        ("--patches 1 --numbers 12 --replacement without", "from 1 to 9 places"),
        ("--patches 1 --probabilities 1", "--probabilities: expected numbers in (0, 1)"),
        ("--patches 9", "expected"),
        ("--patches 1 --crop 9", "crop_size: expected"),
    ],
)
def test_mistakes_are_told_before_anything_is_recorded(
    patchproof: Patchproof, options: str, message: str
) -> None:
    code, _, err = patchproof(f"analyze crops {SLICE} {options}")
    assert code == 2
    assert message in err
    assert not Path("out").exists()


def test_a_model_of_no_crops_needs_their_size(patchproof: Patchproof) -> None:
    line = f"analyze crops {MODEL} {DATA} --out out --patches 1"
    code, _, err = patchproof(line)
    assert code == 2
    assert "--crop: expected the size of the crops" in err
