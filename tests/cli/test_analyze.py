"""``patchproof analyze`` as a user runs it: files, messages, and no forward pass twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from patchproof.cli.analyze import parse_layouts, parse_list, parse_pairs
from patchproof.errors import PatchproofError
from patchproof.evaluation import read_result
from patchproof.evaluation.recording import Archive

Patchproof = Callable[[str], tuple[int, str, str]]

SLICE = (
    "--data images --split all --model python:halves_model:BrighterHalf --classes 2 --device cpu "
    "--batch-size 16 --out out"
)
ANALYSES = {
    "budget": f"analyze budget {SLICE} --patch 2 --masks 2,3",
    "inference": f"analyze inference {SLICE} --patch 2 --masks 2,3",
    "sizes": f"analyze sizes {SLICE} --patches 2-3,8 --masks 3",
    "overestimate": f"analyze overestimate {SLICE} --patch 2 --estimates 2,3 --masks 3",
}
FIGURES = {
    "budget": ("accuracy", "trade-off"),
    "inference": ("inference",),
    "sizes": ("sizes",),
    "overestimate": ("overestimate",),
}
CERTIFY = (
    f"certify {SLICE.replace('--out out', '--out run')} --patch 2 --masks 3 --gallery 0 --count 12"
)


@pytest.fixture
def sketchy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures, which takes most of the time of these tests."""
    monkeypatch.setattr("patchproof.report.analysis._drawn", lambda *_: b"")


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_writes_tables_figures_and_how_they_were_made(
    patchproof: Patchproof, workplace: Path, name: str
) -> None:
    code, output, _ = patchproof(ANALYSES[name])
    assert code == 0
    assert f"{name} of 16 images of images" in output
    assert f"Tables and figures: out/{name}" in output
    folder = workplace / "out" / name
    files = {f"{name}.csv", f"{name}.md", "analysis.json"}
    files |= {f"{figure}.{kind}" for figure in FIGURES[name] for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == files
    table = pd.read_csv(folder / f"{name}.csv")
    assert (table["count"] == 16).all()
    assert table["certified"].between(table["certified_low"], table["certified_high"]).all()
    assert (folder / f"{name}.md").read_text().count("\n") == 2 + len(table)
    analysis = json.loads((folder / "analysis.json").read_text())
    assert analysis["identity"]["analysis"] == name
    assert len(analysis["identity"]["model"]["digest"]) == 64
    assert analysis["identity"]["dataset"]["count"] == 16
    about = analysis["about"]
    assert about["command"][:3] == ["patchproof", *sys.argv[1:3]]
    assert {"seed", "versions", "seconds_per_forward", "timed_on"} <= about.keys()
    expected = table["forwards"] * about["seconds_per_forward"] * 1000
    assert table["milliseconds"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.usefixtures("sketchy")
def test_later_analyses_ask_the_model_nothing_again(patchproof: Patchproof) -> None:
    assert " 0 of them" not in patchproof(ANALYSES["budget"])[1]
    assert "912 model forwards are recorded, 0 of them" in patchproof(ANALYSES["inference"])[1]
    budget = f"{ANALYSES['budget']} --name again --tolerance 0"
    assert "0 of them in this run" in patchproof(budget)[1]


@pytest.mark.usefixtures("sketchy")
def test_the_tables_agree_with_certify(patchproof: Patchproof, workplace: Path) -> None:
    assert patchproof(CERTIFY)[0] == 0
    assert patchproof(f"{ANALYSES['budget']} --count 12")[0] == 0
    table = pd.read_csv(workplace / "out/budget/budget.csv")
    (row,) = table[(table["masks_per_side"] == 3) & (table["inference"] == "double")].to_dict(
        "records"
    )
    summary = read_result(workplace / "run").summary
    assert row["clean"] == pytest.approx(summary.clean_accuracy.value, rel=1e-5)
    assert row["certified"] == pytest.approx(summary.certified_accuracy.value, rel=1e-5)
    assert row["certified_low"] == pytest.approx(summary.certified_accuracy.low, rel=1e-5)
    assert row["vanilla"] == pytest.approx(summary.vanilla_accuracy.value, rel=1e-5)


@pytest.mark.usefixtures("sketchy")
def test_a_multiplicity_too_high_for_some_masks_is_left_out_with_a_word(
    patchproof: Patchproof, workplace: Path
) -> None:
    code, _, errors = patchproof(f"{ANALYSES['budget']} --multiplicity 1,2 --layout paper,balanced")
    assert code == 0
    assert errors.count("left out 2 masks per side") == 2
    assert "paper layout, multiplicity 2: multiplicity: expected distinct masks" in errors
    table = pd.read_csv(workplace / "out/budget/budget.csv")
    assert len(table) == 2 * 3 * 2
    code, _, errors = patchproof(f"{ANALYSES['budget']} --multiplicity 4 --name other")
    assert code == 2
    assert "multiplicity: expected" in errors


@pytest.mark.usefixtures("sketchy")
def test_a_corrupt_image_is_left_out(patchproof: Patchproof, workplace: Path) -> None:
    (workplace / "images/left/3.png").write_bytes(b"not an image")
    code, output, _ = patchproof(ANALYSES["sizes"])
    assert code == 0
    assert "sizes of 15 images" in output
    assert "1 images are corrupt and left out" in output
    assert (pd.read_csv(workplace / "out/sizes/sizes.csv")["count"] == 15).all()


def test_objects_by_size_and_class(patchproof: Patchproof, workplace: Path) -> None:
    assert patchproof(CERTIFY)[0] == 0
    examples = read_result(workplace / "run").examples
    with_box = examples["index"].tolist()[:-1]
    rows = [f"{index},0,0,4,{1 + index % 2 * 7}" for index in [*with_box, 99]]
    (workplace / "boxes.csv").write_text("\n".join(["index,top,left,height,width", *rows]))
    code, output, _ = patchproof("analyze objects run --boxes boxes.csv --out out --bins 4")
    assert code == 0
    assert "1 images have no box" in output
    sizes = pd.read_csv(workplace / "out/objects/sizes.csv")
    assert sizes["size_low"].tolist() == [0.0, 0.25]  # 4 and 32 of 64 pixels
    assert sizes["count"].sum() == 11
    even = examples[examples["index"].isin(with_box) & (examples["index"] % 2 == 0)]
    assert sizes["count"].iloc[0] == len(even)
    assert sizes["certified"].iloc[0] == pytest.approx(even["certified"].mean(), rel=1e-5)
    classes = pd.read_csv(workplace / "out/objects/classes.csv")
    assert sorted(classes["name"]) == ["left", "right"]
    assert classes["count"].sum() == 12
    assert classes["certified"].is_monotonic_decreasing
    assert {path.suffix for path in (workplace / "out/objects").glob("sizes.*")} == {
        ".csv",
        ".md",
        ".png",
        ".svg",
    }
    code, output, _ = patchproof("analyze objects run --out out --name classes")
    assert code == 0
    assert not (workplace / "out/classes/sizes.csv").exists()


def test_an_unfinished_run_is_refused(patchproof: Patchproof, workplace: Path) -> None:
    assert patchproof(CERTIFY)[0] == 0
    (workplace / "run/summary.json").unlink()
    code, _, errors = patchproof("analyze objects run --out out")
    assert code == 2
    assert "run: expected a finished run" in errors


BUDGET, SIZES, OVER = ANALYSES["budget"], ANALYSES["sizes"], ANALYSES["overestimate"]
MISTAKES = {
    "no analysis": ("analyze", "Missing command"),
    "no such analysis": ("analyze buget", "No such command 'buget'"),
    "no folder": (BUDGET.replace("--out out", ""), "Missing option '--out'"),
    "no attacker": (BUDGET.replace("--patch 2", ""), "--patch or --covering"),
    "no list": (f"{BUDGET} --masks 2,,3", "--masks: expected numbers from 1 such as"),
    "a budget of zero": (f"{BUDGET} --masks 0,2", "--masks: expected"),
    "a list of words": (f"{BUDGET} --masks two", "got 'two'"),
    "a budget twice": (f"{BUDGET} --masks 2,3,2", "--masks: expected each number once"),
    "no such layout": (f"{BUDGET} --layout paper,square", "--layout: expected paper, balanced"),
    "a range downwards": (f"{SIZES} --patches 5-2", "--patches: expected an ascending range"),
    "an endless range": (f"{SIZES} --patches 2-9999999", "at most 1000 numbers"),
    "a patch larger than the image": (f"{SIZES} --patches 2,9", "8x8 image"),
    "an estimate below the patch": (f"{OVER} --estimates 1,2", "at least the 2 pixels"),
    "an estimate above the image": (f"{OVER} --estimates 9", "8x8 image"),
    "no estimates": (OVER.replace("--estimates 2,3", ""), "Missing option '--estimates'"),
    "empty data": (BUDGET.replace("--data images", "--data empty"), "empty"),
    "too many images": (f"{BUDGET} --count 17", "1 to 16 images, got 17"),
    "no model": ("analyze sizes --patches 2 --out out", "expected --weights FILE, --model NAME"),
    "a file for a folder": (BUDGET.replace("out out", "out halves_model.py"), "got a file"),
    "a folder of a run": (BUDGET.replace("out out", "out run"), "results of another command"),
    "a folder of something else": (
        f"{BUDGET} --name left".replace("out out", "out images"),
        "0.png",
    ),
    "no run": ("analyze objects images --out out", "without manifest.json"),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    patchproof: Patchproof, workplace: Path, line: str, message: str
) -> None:
    (workplace / "empty").mkdir()
    (workplace / "run").mkdir()
    (workplace / "run/manifest.json").write_text("{}")
    code, output, errors = patchproof(line)
    assert (code, output) == (2, "")
    assert errors.startswith("patchproof: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (workplace / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,top,left,height\n0,0,0,3\n", "none named width"),
        ("index,top,left,height,width\n0,0,0,3,9\n", "inside the 8x8 image"),
        ("index,top,left,height,width\nx,0,0,3,3\n", "whole numbers"),
        ("index,top,left,height,width\n99,0,0,3,3\n", "got none of its 12 images"),
    ],
)
def test_boxes_that_cannot_be_used_are_one_line(
    patchproof: Patchproof, workplace: Path, text: str, message: str
) -> None:
    assert patchproof(CERTIFY)[0] == 0
    (workplace / "boxes.csv").write_text(text)
    code, _, errors = patchproof("analyze objects run --boxes boxes.csv --out out")
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not (workplace / "out").exists()


@pytest.mark.usefixtures("sketchy")
def test_the_folder_of_another_analysis_is_refused(patchproof: Patchproof, workplace: Path) -> None:
    assert patchproof(BUDGET)[0] == 0
    before = (workplace / "out/budget/budget.csv").read_bytes()
    code, _, errors = patchproof(f"{BUDGET} --masks 2,4")
    assert code == 2
    assert "out/budget: holds the results of another run: parameters.setups" in errors
    code, _, errors = patchproof(f"{SIZES} --name budget")
    assert code == 2
    assert 'analysis is "budget" there and "sizes" here' in errors
    assert (workplace / "out/budget/budget.csv").read_bytes() == before
    assert patchproof(BUDGET)[0] == 0  # the same analysis may be made again
    assert (workplace / "out/budget/budget.csv").read_bytes() == before


@pytest.mark.usefixtures("sketchy")
def test_ctrl_c_says_how_to_go_on(
    patchproof: Patchproof, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Archive.record

    def interrupted(self: Archive, *arguments: Any) -> object:
        if self.forwards:
            raise KeyboardInterrupt
        return record(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Archive, "record", interrupted)
        code, _, errors = patchproof(BUDGET)
    assert code == 130
    assert "stopped; what is recorded is in out/recordings, and the same command goes on" in errors
    assert not (workplace / "out/budget").exists()
    code, output, _ = patchproof(BUDGET)
    assert code == 0
    assert "912 model forwards are recorded, 736 of them in this run" in output


@pytest.mark.usefixtures("sketchy")
def test_a_killed_recording_goes_on_to_equal_tables(
    patchproof: Patchproof, workplace: Path
) -> None:
    """The process is killed when it has written two shards of one or two images each."""
    code = (
        "import patchproof.evaluation.recording as r; r.SHARD_SECONDS = 0.0; "
        "from patchproof.cli.main import main; main()"
    )
    path = os.pathsep.join([".", *filter(None, sys.path)])
    line = BUDGET.replace("--masks 2,3", "--masks 3")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *line.split(), "--batch-size", "4"],
        env=os.environ | {"PYTHONPATH": path, "SECONDS_PER_FORWARD": "0.02"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(workplace.glob("out/recordings/*/views-*.npz"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workplace / "out/budget").exists()
    code, output, _ = patchproof(line)
    assert code == 0
    assert "736 model forwards are recorded" in output
    assert "736 of them in this run" not in output
    assert patchproof(line.replace("out out", "out whole"))[0] == 0
    resumed, whole = (
        pd.read_csv(workplace / folder / "budget/budget.csv").drop(columns="milliseconds")
        for folder in ("out", "whole")
    )
    pd.testing.assert_frame_equal(resumed, whole)


@pytest.mark.parametrize("name", ["", *ANALYSES, "objects"])
def test_every_analysis_has_help_with_an_example(patchproof: Patchproof, name: str) -> None:
    code, output, _ = patchproof(f"analyze {name} --help")
    assert code == 0
    assert not name or f"Example: patchproof analyze {name}" in output
    assert not name or "--out" in output


def test_lists() -> None:
    assert parse_list("--patches", "2, 5,8") == [2, 5, 8]
    assert parse_list("--patches", "8,2-4") == [8, 2, 3, 4]
    assert parse_pairs("--masks", "2,6x4,7-8") == [(2, 2), (6, 4), (7, 7), (8, 8)]
    assert parse_layouts("paper, balanced") == ["paper", "balanced"]


@pytest.mark.parametrize("text", ["", "1.5", "-1", "2-", "6x", "x4", "0x2", "2;3", "2,2"])
def test_what_is_no_list_is_named_with_its_option(text: str) -> None:
    with pytest.raises(PatchproofError, match=r"^--masks: expected"):
        parse_pairs("--masks", text)
