"""Defenses over features from the command line: certify, resume, report, predict, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional

from patchproof import ALERT, Ablation, MultiplePatches, PatchGuard, SquarePatch
from patchproof.cli.feature_defenses import FEATURE_DEFENSES
from patchproof.datasets import load_dataset
from patchproof.evaluation import DetectionSummary, Summary, read_result
from patchproof.models import ModelSpec, build_model, save_classifier

Patchproof = Callable[[str], tuple[int, str, str]]

BAGNET = ModelSpec(
    "bagnet", 10, 1, (8, 8), {"receptive_field": 3, "stride": 1, "widths": [8, 8, 16], "depth": 0}
)
COUNT = "--data digits --count 40 --seed 1 --device cpu --gallery 1 --batch-size 32"
CERTIFY = f"certify {COUNT} --weights bagnet.safetensors --patch 1 --out run"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a BagNet after a few steps on digits."""
    digits = load_dataset("digits", "train").sample(300, 0)
    images = torch.stack([digits.image(index) for index in range(len(digits))])
    torch.manual_seed(0)
    model = build_model(BAGNET).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        batch = torch.randint(len(images), (64,))
        loss = functional.cross_entropy(model(images[batch]), digits.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "bagnet.safetensors"
    save_classifier(path, model.eval(), BAGNET, {"class_names": list(digits.class_names)})
    return path.read_bytes()


@pytest.fixture(autouse=True)
def files(workplace: Path, weights: bytes) -> None:
    """Put ``bagnet.safetensors`` and ``digit.png`` into the workplace."""
    (workplace / "bagnet.safetensors").write_bytes(weights)
    pixels = load_dataset("digits", "test").image(0)
    Image.fromarray((pixels[0] * 255).byte().numpy()).save(workplace / "digit.png")


WORDS = {
    "patchguard": "64 local features of 3x3 pixels, stride 1, windows of 3x3",
    "patchguard++": "64 local features of 3x3 pixels, stride 1, windows of 3x3",
    "trimmed-mean": "64 local features of 3x3 pixels, stride 1, without 9 at each end",
    "top-masking": "64 local features of 3x3 pixels, stride 1, without the 9 of most evidence",
    "median": "64 local features of 3x3 pixels, stride 1, their median",
}


@pytest.mark.parametrize("name", FEATURE_DEFENSES)
def test_certify_and_predict(patchproof: Patchproof, workplace: Path, name: str) -> None:
    code, output, _ = patchproof(f"{CERTIFY} --defense {name}")
    assert code == 0
    title = " ".join(output.partition("┏")[0].split())
    words = WORDS.get(name, "64 local features of 3x3 pixels, stride 1")
    assert title.endswith(f"anywhere on the image; {words}")
    result = read_result(workplace / "run")
    assert result.finished
    assert result.manifest["about"]["defense_words"] == words
    summary = result.summary
    if isinstance(summary, DetectionSummary):
        assert name == "patchguard++"
        assert "certified detection" in output
    else:
        sound = {"clipped-bagnet": "unsound", "median": None}
        sound |= dict.fromkeys(("trimmed-mean", "top-masking"))
        assert summary.paper == sound.get(name, "sound")
        assert (summary.paper_accuracy is None) == (summary.paper is None)
        assert ("the paper's condition" in output) == (summary.paper is not None)
        assert ("(not sound)" in output) == (summary.paper == "unsound")
    line = f"predict digit.png --weights bagnet.safetensors --patch 1 --defense {name} --json"
    code, output, _ = patchproof(line)
    assert code == 0
    answer = json.loads(output)
    assert answer["forwards"] == 1
    assert (answer["patch_suspected"] is None) == (name != "patchguard++")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("patchguard", "Paper condition<span"),
        ("clipped-bagnet", "Paper condition (not sound)"),
        ("median", '<td class="number">\u2013</td>'),
    ],
)
def test_report_says_what_the_papers_condition_is(
    patchproof: Patchproof, workplace: Path, name: str, words: str
) -> None:
    assert patchproof(f"{CERTIFY} --defense {name}")[0] == 0
    assert patchproof("report run --out page.html")[0] == 0
    page = (workplace / "page.html").read_text()
    assert words in page
    assert ("Paper condition<span" in page) == (name == "patchguard")
    assert "64 local features of 3x3 pixels" in page


def test_the_same_command_goes_on_with_a_run(patchproof: Patchproof, workplace: Path) -> None:
    line = f"{CERTIFY} --defense patchguard"
    assert patchproof(line)[0] == 0
    before = read_result(workplace / "run").examples
    assert patchproof(line)[0] == 0
    assert read_result(workplace / "run").examples.equals(before)
    code, _, errors = patchproof(f"{line} --defense-option threshold=0.2")
    assert code == 2
    assert "defense.threshold is 0.0 there and 0.2 here" in errors


def test_a_threshold_makes_the_papers_condition_unsound(
    patchproof: Patchproof, workplace: Path
) -> None:
    line = f"{CERTIFY} --defense patchguard --defense-option threshold=0.2"
    line += " --defense-option high=50 --defense-option feature=logits --defense-option window=4x5"
    code, output, _ = patchproof(line)
    assert code == 0
    assert "the paper's condition (not sound)" in output
    result = read_result(workplace / "run")
    assert isinstance(result.summary, Summary)
    assert result.summary.paper == "unsound"
    defense = result.manifest["identity"]["defense"]
    assert (defense["threshold"], defense["high"], defense["window"]) == (0.2, 50.0, [4, 5])


def test_ablations_of_any_model(patchproof: Patchproof, workplace: Path) -> None:
    line = "certify --data images --split all --model python:halves_model:BrighterHalf --classes 2 "
    line += "--device cpu --out run --patch 2 --gallery 0 --defense derandomized-smoothing "
    line += "--defense-option ablation=row:2 --defense-option vote_threshold=null"
    code, output, _ = patchproof(line)
    assert code == 0
    assert "8 bands of rows of 2x8 pixels" in " ".join(output.split())
    defense = read_result(workplace / "run").manifest["identity"]["defense"]
    assert defense["ablation"] == {"kind": "row", "size": 2}
    assert defense["vote_threshold"] is None


def test_several_patches_need_no_windows(patchproof: Patchproof, workplace: Path) -> None:
    line = CERTIFY.replace("--patch 1", "--patch 2*1")
    code, _, errors = patchproof(f"{line} --defense patchguard")
    assert code == 2
    assert "expected one patch" in errors
    assert "top-masking" in errors
    code, output, _ = patchproof(f"{line} --defense top-masking")
    assert code == 0
    assert "without the 18 of most evidence" in " ".join(output.split())
    assert read_result(workplace / "run").manifest["identity"]["threat"] == (
        MultiplePatches(2, SquarePatch(1)).to_dict()
    )


def test_windows_for_a_larger_patch(patchproof: Patchproof, workplace: Path) -> None:
    line = f"{CERTIFY} --defense patchguard --defense-option mask_for=3"
    code, output, _ = patchproof(line)
    assert code == 0
    assert "windows of 5x5" in " ".join(output.split())


def test_tau_for_the_detector(patchproof: Patchproof, workplace: Path) -> None:
    line = f"{CERTIFY} --defense patchguard++ --defense-option window=7"
    assert patchproof(f"{line} --tau 0.3")[0] == 0
    alerted = read_result(workplace / "run").examples["prediction"] == ALERT
    assert alerted.any()
    assert patchproof(f"{line} --defense-option tau=0.3")[0] == 0  # the same run
    code, _, errors = patchproof(f"{line} --tau 0.3 --defense-option tau=0.3")
    assert code == 2
    assert "expected one of --tau and --defense-option tau" in errors


def test_a_saved_defense_replaces_its_options(patchproof: Patchproof, workplace: Path) -> None:
    spec = ModelSpec("band-resnet", 10, 1, (8, 8), {"size": 2, "widths": [4, 4]})
    defense = PatchGuard(
        build_model(spec), SquarePatch(2), image_size=(8, 8), ablation=Ablation("column", 2)
    )
    defense.save(workplace / "defense.safetensors", spec)
    line = f"certify {COUNT} --defense defense.safetensors --out run"
    code, _, errors = patchproof(f"{line} --defense-option threshold=0.5")
    assert code == 2
    assert "expected --defense FILE without --defense-option" in errors
    code, output, _ = patchproof(line)
    assert code == 0
    assert "8 bands of columns of 8x2 pixels, windows of 1x3" in " ".join(output.split())
    assert read_result(workplace / "run").manifest["identity"]["defense"] == defense.to_dict()
    assert patchproof("predict digit.png --defense defense.safetensors")[0] == 0


MISTAKES = {
    "no such option": (
        "patchguard --defense-option speed=3",
        "expected one of feature, threshold, window, mask_for, high, ablation, bands for "
        "patchguard, got 'speed'",
    ),
    "an option of another defense": (
        "median --defense-option trim=3",
        "expected one of feature, high, ablation, bands for median, got 'trim'",
    ),
    "no value": ("patchguard --defense-option threshold", "--defense-option: expected NAME=JSON"),
    "a threshold out of range": ("patchguard --defense-option threshold=2", "in [0, 1], got 2.0"),
    "a threshold in words": (
        "patchguard --defense-option threshold=high",
        "--defense-option threshold: expected a share of the evidence",
    ),
    "an ablation without size": (
        "bagcert --defense-option ablation=column",
        "--defense-option ablation: expected column:4",
    ),
    "no such ablation": (
        "bagcert --defense-option ablation=ring:4",
        "expected one of ('column', 'row', 'block'), got 'ring'",
    ),
    "half a view": (
        "trimmed-mean --defense-option trim=1.5",
        "--defense-option trim: expected a number of views",
    ),
    "a window too small": (
        "patchguard --defense-option window=2",
        "expected at least 3x3 features, got 2x2",
    ),
    "masks": ("patchguard --masks 3", "--masks: expected with --defense patchcleanser or"),
    "a mask set's options": (
        "bagcert --layout balanced --multiplicity 2",
        "--multiplicity, --layout: expected with --defense patchcleanser or minority-reports only",
    ),
    "an inference": ("median --inference challenger", "--inference: expected with"),
    "an option for masks": (
        "patchcleanser --defense-option threshold=0.2",
        "--defense-option: expected with --defense patchguard, ",
    ),
    "a tau of a defense that never alerts": (
        "patchguard --tau 0.5",
        "--tau: expected with --defense minority-reports or patchguard++ only, got patchguard",
    ),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    patchproof: Patchproof, workplace: Path, options: str, message: str
) -> None:
    code, output, errors = patchproof(f"{CERTIFY} --defense {options}")
    assert (code, output) == (2, "")
    assert errors.startswith("patchproof: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (workplace / "run").exists()


def test_a_model_that_sees_the_whole_image_needs_an_ablation(patchproof: Patchproof) -> None:
    line = "certify --data images --split all --model python:halves_model:BrighterHalf --classes 2 "
    code, _, errors = patchproof(f"{line} --device cpu --out run --patch 2 --defense patchguard")
    assert code == 2
    assert "expected one with local_logits, such as bagnet, or an ablation" in errors


def test_list_names_the_defenses_and_their_models(patchproof: Patchproof) -> None:
    code, output, _ = patchproof("list")
    assert code == 0
    for name in (*FEATURE_DEFENSES, "bagnet", "band-resnet", "ablation-resnet", "token-drop:NAME"):
        assert f"  {name} " in output
