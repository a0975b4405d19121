"""The analyses of features as a user runs them: files, messages, and no forward pass twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from patchproof.cli.analyze_features import (
    ANALYSES,
    parse_bounds,
    parse_features,
    parse_patches,
    parse_shares,
    parse_sizes,
)
from patchproof.cli.feature_bench import name_of
from patchproof.errors import PatchproofError
from patchproof.evaluation import read_result
from patchproof.evaluation.feature_recording import FeatureArchive
from patchproof.models import TinyResNet
from patchproof.threat import SquarePatch

Patchproof = Callable[[str], tuple[int, str, str]]

MODEL = """
import torch

class Corners(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.local = torch.nn.Conv2d(1, 2, 2, stride=2)
        sides = torch.tensor([1.0, -1.0]).repeat_interleave(4)
        self.register_buffer("sides", sides, persistent=False)
        with torch.no_grad():
            self.local.weight[0] = 1.0
            self.local.weight[1] = -1.0
            self.local.bias.copy_(torch.tensor([1.0, 1.5]))

    def local_logits(self, images):
        return 9 * self.local((images - 0.2) * self.sides)

    def forward(self, images):
        return self.local_logits(images).mean((2, 3))
"""
DATA = "--data images --split all --classes 2 --device cpu --batch-size 16 --out out"
SLICE = f"--model python:corners_model:Corners {DATA}"
LINES = {
    "clipping": "clipping",
    "windows": "windows --sizes 0,1,2",
    "receptive-fields": "receptive-fields --patches 1,2",
    "thresholds": "thresholds --patches 1 --values 0,0.5",
    "feature-types": "feature-types --patches 1,2",
    "overlarge-masks": "overlarge-masks --patches 1,2 --masks 1-3",
    "training": "training --patches 2",
    "top-k": "top-k --patches 1 --k 1,2",
    "local-logits": "local-logits --patch 2 --steps 2",
    "patch-sizes": "patch-sizes --patches 1-3",
    "aggregations": "aggregations --patches 1,2",
}
ROWS = {
    **{"clipping": 5, "windows": 3, "receptive-fields": 2, "thresholds": 2, "feature-types": 6},
    **{"overlarge-masks": 5, "training": 1, "top-k": 2, "local-logits": 240, "patch-sizes": 3},
    "aggregations": 14,
}


def analyze(name: str, options: str = "") -> str:
    return f"analyze {LINES[name]} {SLICE} {options}"


@pytest.fixture(autouse=True)
def _model(workplace: Path) -> Iterator[None]:
    (workplace / "corners_model.py").write_text(MODEL)
    yield
    sys.modules.pop("corners_model", None)


@pytest.fixture
def sketchy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures, which takes most of the time of these tests."""
    monkeypatch.setattr("patchproof.report.analysis._drawn", lambda *_: b"")


def test_every_analysis_has_a_line_here() -> None:
    assert set(ANALYSES) == set(LINES)


@pytest.mark.parametrize("name", LINES)
def test_an_analysis_writes_tables_figures_and_how_they_were_made(
    patchproof: Patchproof, workplace: Path, name: str
) -> None:
    code, output, _ = patchproof(analyze(name))
    assert code == 0
    assert "of 16 images of images" in output
    assert f"Tables and figures: out/{name}" in output
    folder = workplace / "out" / name
    files = {f"{name}.{kind}" for kind in ("csv", "md", "png", "svg")} | {"analysis.json"}
    if name == "local-logits":
        files |= {"attack.csv", "attack.md", "wrong.csv", "wrong.md"}
        files |= {"large-logits.png", "large-logits.svg"}
    assert {path.name for path in folder.iterdir()} == files
    table = pd.read_csv(folder / f"{name}.csv")
    assert len(table) == ROWS[name]
    assert (table["model"] == "python:corners_model:Corners").all()
    assert (folder / f"{name}.md").read_text().count("\n") == 2 + len(table)
    analysis = json.loads((folder / "analysis.json").read_text())
    assert analysis["identity"]["analysis"] == name
    (model,) = analysis["identity"]["models"].values()
    assert len(model["digest"]) == 64
    assert model["views"] == {"kind": "local features", "grid": [4, 4]}
    assert {"seed", "versions", "seconds_per_forward", "timed_on"} <= analysis["about"].keys()


@pytest.mark.usefixtures("sketchy")
def test_later_analyses_ask_the_model_nothing_again(patchproof: Patchproof) -> None:
    first = patchproof(analyze("clipping"))[1]
    assert "32 model forwards are recorded, 32 of them in this run" in first
    for name in ("windows", "thresholds", "patch-sizes"):
        assert "32 model forwards are recorded, 0 of them" in patchproof(analyze(name))[1]
    attacked = analyze("local-logits")
    assert "64 model forwards are recorded, 32 of them in this run" in patchproof(attacked)[1]
    assert "64 model forwards are recorded, 0 of them" in patchproof(f"{attacked} --name two")[1]


@pytest.mark.usefixtures("sketchy")
def test_the_tables_agree_with_certify(patchproof: Patchproof, workplace: Path) -> None:
    certify = f"certify {SLICE.replace('--out out', '--out run')} --defense patchguard --patch 2"
    assert patchproof(f"{certify} --gallery 0")[0] == 0
    assert patchproof(analyze("training"))[0] == 0
    (row,) = pd.read_csv(workplace / "out/training/training.csv").to_dict("records")
    summary = read_result(workplace / "run").summary
    assert row["vanilla"] == pytest.approx(summary.vanilla_accuracy.value, rel=1e-5)
    assert row["clean"] == pytest.approx(summary.clean_accuracy.value, rel=1e-5)
    assert row["certified"] == pytest.approx(summary.certified_accuracy.value, rel=1e-5)
    assert row["certified_low"] == pytest.approx(summary.certified_accuracy.low, rel=1e-5)
    assert 0 < row["certified"] < row["clean"]


@pytest.mark.usefixtures("sketchy")
def test_local_logits_are_compared_of_networks_that_see_everything(
    patchproof: Patchproof, workplace: Path
) -> None:
    network = TinyResNet(2, 1)
    save_file(network.state_dict(), workplace / "tiny.safetensors")
    model = f"--model tiny-resnet --weights tiny.safetensors {DATA}"
    code, _, errors = patchproof(f"analyze {LINES['local-logits']} {model}")
    assert code == 0
    assert "no robust masking of tiny: expected features that each see a small part" in errors
    folder = workplace / "out/local-logits"
    clean, attacked = pd.read_csv(folder / "attack.csv").to_dict("records")
    assert pd.isna(clean["clean"])
    (wrong,) = pd.read_csv(folder / "wrong.csv").to_dict("records")
    assert wrong["features"] == 16
    assert wrong["wrong_global"] == pytest.approx(1 - attacked["vanilla"])
    code, _, errors = patchproof(f"analyze {LINES['clipping']} {model}")
    assert (code, "expected one with local_logits" in errors) == (2, True)


@pytest.mark.usefixtures("sketchy")
def test_several_weights_are_several_rows(patchproof: Patchproof, workplace: Path) -> None:
    weights = {"local.weight": torch.ones(2, 1, 2, 2), "local.bias": torch.zeros(2)}
    for name in ("one", "two"):
        save_file(weights, workplace / f"{name}.safetensors")
    code, output, _ = patchproof(
        f"analyze training --patches 1,2 {SLICE} --weights one.safetensors "
        "--weights two.safetensors"
    )
    assert code == 0
    assert "64 model forwards are recorded" in output
    table = pd.read_csv(workplace / "out/training/training.csv")
    assert table["model"].tolist() == ["one", "one", "two", "two"]
    same = table.drop(columns="model")
    pd.testing.assert_frame_equal(same[:2], same[2:].reset_index(drop=True))


@pytest.mark.usefixtures("sketchy")
def test_a_model_without_local_features_is_shown_bands(
    patchproof: Patchproof, workplace: Path
) -> None:
    model = SLICE.replace("corners_model:Corners", "halves_model:BrighterHalf")
    code, _, errors = patchproof(f"analyze windows {model}")
    assert code == 2
    assert "expected one with local_logits" in errors
    code, _, _ = patchproof(f"analyze windows {model} --ablation column:3 --sizes 0,2")
    assert code == 0
    table = pd.read_csv(workplace / "out/windows/windows.csv")
    assert table["window"].tolist() == ["none", "1x2"]


@pytest.mark.usefixtures("sketchy")
def test_patches_too_large_are_left_out_with_a_word(
    patchproof: Patchproof, workplace: Path
) -> None:
    code, _, errors = patchproof(analyze("patch-sizes").replace("1-3", "1-8"))
    assert code == 0
    assert "left out python:corners_model:Corners, 8x8 square: windows: expected less" in errors
    table = pd.read_csv(workplace / "out/patch-sizes/patch-sizes.csv")
    assert table["patch_side"].max() < 8
    assert table["certified"].is_monotonic_decreasing


MISTAKES = {
    "no patches": (f"analyze thresholds {SLICE}", "Missing option '--patches'"),
    "a patch larger than the image": (f"analyze training --patches 9 {SLICE}", "8x8 image"),
    "no window is small enough": (f"analyze training --patches 8 {SLICE}", "windows: expected"),
    "a window of everything": (f"analyze windows --sizes 4 {SLICE}", "less than the 4x4 views"),
    "a patch twice": (f"analyze top-k --patches 1,2,1 {SLICE}", "each patch once"),
    "no such feature": (analyze("feature-types", "--features logit"), "--features: expected"),
    "a threshold above 1": (analyze("thresholds", "--values 2"), "--values: expected"),
    "bounds the wrong way": (analyze("clipping", "--bounds 5:0"), "--bounds: expected"),
    "sizes that are words": (analyze("windows", "--sizes two"), "--sizes: expected"),
    "masks too small": (f"analyze overlarge-masks --patches 3 --masks 2 {SLICE}", "at least the 3"),
    "no such defense": (analyze("aggregations", "--defenses mean"), "--defenses: expected all"),
    "no such ablation": (analyze("windows", "--ablation diagonal:2"), "--ablation: expected"),
    "two patches": (f"analyze training --patches 2*1 {SLICE}", "expected one patch"),
    "a step too far": (analyze("local-logits", "--step-size 2"), "at least one step"),
    "no model": (f"analyze training --patches 1 {DATA}", "expected --weights FILE, --model NAME"),
    "weights twice": (
        f"analyze training --patches 1 {SLICE} --weights a/x.pt --weights b/x.pt",
        "got x more than once",
    ),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    patchproof: Patchproof, workplace: Path, line: str, message: str
) -> None:
    code, output, errors = patchproof(line)
    assert (code, output) == (2, "")
    assert message in errors
    last = errors.strip().split("\n")[-1]
    assert last.startswith("patchproof: error: ")
    assert not (workplace / "out").exists()


@pytest.mark.usefixtures("sketchy")
def test_the_folder_of_another_analysis_is_refused(patchproof: Patchproof, workplace: Path) -> None:
    assert patchproof(analyze("training"))[0] == 0
    before = (workplace / "out/training/training.csv").read_bytes()
    code, _, errors = patchproof(analyze("training").replace("--patches 2", "--patches 1"))
    assert code == 2
    assert "out/training: holds the results of another run: parameters.patches" in errors
    assert (workplace / "out/training/training.csv").read_bytes() == before
    assert patchproof(analyze("training"))[0] == 0
    assert (workplace / "out/training/training.csv").read_bytes() == before


@pytest.mark.usefixtures("sketchy")
def test_ctrl_c_says_how_to_go_on(
    patchproof: Patchproof, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureArchive, "_tables", stop)
    code, _, errors = patchproof(analyze("clipping"))
    assert code == 130
    assert "stopped; what is recorded is in out/recordings, and the same command goes on" in errors
    assert not (workplace / "out/clipping").exists()


@pytest.mark.parametrize("name", LINES)
def test_every_analysis_has_help_with_an_example(patchproof: Patchproof, name: str) -> None:
    code, output, _ = patchproof(f"analyze {name} --help")
    assert code == 0
    assert f"Example: patchproof analyze {name}" in output


def test_values_of_options() -> None:
    sides = parse_patches("5, 1-3", "anywhere", (32, 32))
    assert sides == [SquarePatch(side) for side in (5, 1, 2, 3)]
    assert parse_patches("0.4%,2.4%", "anywhere", (32, 32)) == [SquarePatch(2), SquarePatch(5)]
    assert parse_bounds("-inf:inf,0:5.5") == [(float("-inf"), float("inf")), (0.0, 5.5)]
    assert parse_sizes("0, 2,10") == [0, 2, 10]
    assert parse_shares("0,0.25,1") == [0.0, 0.25, 1.0]
    assert parse_features("prediction,logits") == ["prediction", "logits"]


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_bounds, text) for text in ("", "5", "1:1", "0:1:2", "a:b", "nan:1")),
        *((parse_sizes, text) for text in ("", "-1", "1.5", "2,2", "1-3")),
        *((parse_shares, text) for text in ("", "x", "-0.1", "1.1", "nan", "0.5,0.50")),
        *((parse_features, text) for text in ("", "logits,logits", "logit")),
    ],
)
def test_what_cannot_be_read_is_refused(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(PatchproofError, match=r"^--\w+: expected"):
        parse(text)


def test_a_classifier_is_named_by_its_file() -> None:
    assert name_of(Path("zoo/bagnet.safetensors")) == "bagnet"
    assert name_of(Path("runs/bagnet7/model.safetensors")) == "bagnet7"
