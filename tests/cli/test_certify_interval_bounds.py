"""Interval bounds from the command line: certify, resume, report, predict, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional

from patchproof import IntervalBoundPropagation, MultiplePatches, SparsePixels, SquarePatch, load
from patchproof.datasets import load_dataset
from patchproof.evaluation import Summary, read_result
from patchproof.models import ModelSpec, build_model, save_classifier

Patchproof = Callable[[str], tuple[int, str, str]]

MLP = ModelSpec("ibp-mlp", 10, 1, (8, 8), {"hidden": [24]})
COUNT = "--data digits --count 40 --seed 1 --device cpu --gallery 2"
CERTIFY = f"certify {COUNT} --weights mlp.safetensors --out run --defense interval-bounds"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a perceptron with small weights after a few steps on digits."""
    digits = load_dataset("digits", "train").sample(400, 0)
    images = torch.stack([digits.image(index) for index in range(len(digits))])
    torch.manual_seed(0)
    model = build_model(MLP).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=1.0)
    for _ in range(120):
        batch = torch.randint(len(images), (64,))
        loss = functional.cross_entropy(5 * model(images[batch]), digits.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "mlp.safetensors"
    save_classifier(path, model.eval(), MLP, {"class_names": list(digits.class_names)})
    return path.read_bytes()


@pytest.fixture(autouse=True)
def files(workplace: Path, weights: bytes) -> None:
    """Put ``mlp.safetensors`` and ``digit.png`` into the workplace."""
    (workplace / "mlp.safetensors").write_bytes(weights)
    pixels = load_dataset("digits", "test").image(0)
    Image.fromarray((pixels[0] * 255).byte().numpy()).save(workplace / "digit.png")


def test_certify_and_report(patchproof: Patchproof, workplace: Path) -> None:
    code, output, _ = patchproof(f"{CERTIFY} --patch 1")
    assert code == 0
    title = " ".join(output.partition("┏")[0].split())
    assert title.endswith("anywhere on the image; interval bounds of the patch at 64 places")
    assert "the paper's condition" in output
    assert "not sound" not in output
    result = read_result(workplace / "run")
    assert result.finished
    about = result.manifest["about"]
    assert about["defense_words"] == "interval bounds of the patch at 64 places"
    assert about["paper"] == "sound"
    identity = result.manifest["identity"]
    assert (identity["kind"], identity["defense"]["method"]) == ("recovery", "interval")
    assert identity["defense"]["tolerance"] == 0.0
    summary = result.summary
    assert isinstance(summary, Summary)
    assert summary.forwards_per_image == 1
    assert 0 < summary.certified_accuracy.value < summary.clean_accuracy.value
    assert summary.clean_accuracy == summary.vanilla_accuracy
    assert result.gallery is not None
    assert result.gallery.vulnerability.min() == 0
    assert patchproof("report run --out page.html")[0] == 0
    page = (workplace / "page.html").read_text()
    assert "interval bounds of the patch at 64 places" in page
    assert "margins up to 0 logits count as lost" in page
    assert "1.0 model forwards per image" in page
    assert "bounds not counted" in page
    assert "hidden pixels" not in page


def test_the_same_command_goes_on_with_a_run(patchproof: Patchproof, workplace: Path) -> None:
    line = f"{CERTIFY} --patch 1 --batch-size 8"
    assert patchproof(line)[0] == 0
    folder = workplace / "run"
    whole = read_result(folder).examples
    (folder / "summary.json").unlink()
    (folder / "examples-00000.parquet").unlink()
    assert patchproof(line)[0] == 0
    assert read_result(folder).examples.equals(whole)
    assert patchproof(f"{line} --defense-option screen=2")[0] == 0  # the same verdicts
    code, _, errors = patchproof(f"{line} --tolerance 0.5")
    assert code == 2
    assert "defense.tolerance is 0.0 there and 0.5 here" in errors


def test_sparse_pixels(patchproof: Patchproof, workplace: Path) -> None:
    code, output, _ = patchproof(f"{CERTIFY} --patch sparse:1")
    assert code == 0
    assert "interval bounds of 1 pixel anywhere" in " ".join(output.split())
    result = read_result(workplace / "run")
    assert result.manifest["identity"]["threat"] == SparsePixels(1).to_dict()
    assert patchproof("report run --out page.html")[0] == 0
    page = (workplace / "page.html").read_text()
    assert "Any one pixel of the image, with any content in all its channels." in page
    assert "these are 1.56% of them" in page


def test_several_patches(patchproof: Patchproof, workplace: Path) -> None:
    code, output, _ = patchproof(f"{CERTIFY} --patch 2*1 --locations 0,0,3,3")
    assert code == 0
    assert "interval bounds of the patches at 36 places" in " ".join(output.split())
    threat = read_result(workplace / "run").manifest["identity"]["threat"]
    assert threat["type"] == MultiplePatches(2, SquarePatch(1)).to_dict()["type"]


def test_backward_bounds(patchproof: Patchproof, workplace: Path) -> None:
    code, output, _ = patchproof(f"{CERTIFY} --patch 1 --defense-option method=backward")
    assert code == 0
    assert "with backward bounds of the last layers" in " ".join(output.split())
    assert patchproof("report run --out page.html")[0] == 0
    assert "IntervalBoundPropagation, backward bounds" in (workplace / "page.html").read_text()


def test_predict(patchproof: Patchproof) -> None:
    line = "predict digit.png --weights mlp.safetensors --patch 1 --defense interval-bounds --json"
    code, output, _ = patchproof(line)
    assert code == 0
    answer = json.loads(output)
    assert answer["forwards"] == 1
    assert answer["patch_suspected"] is None
    assert answer["label"] in range(10)


def test_a_saved_defense_replaces_its_options(patchproof: Patchproof, workplace: Path) -> None:
    made = build_model(MLP)
    defense = IntervalBoundPropagation(made, SquarePatch(2), image_size=(8, 8))
    defense.save(workplace / "defense.safetensors", MLP)
    line = f"certify {COUNT} --out run --defense defense.safetensors"
    code, _, errors = patchproof(f"{line} --patch 2")
    assert code == 2
    assert "expected --defense FILE without --patch" in errors
    assert patchproof(line)[0] == 0
    loaded = load(workplace / "defense.safetensors")
    assert read_result(workplace / "run").manifest["identity"]["defense"] == loaded.to_dict()
    assert patchproof("predict digit.png --defense defense.safetensors")[0] == 0


MISTAKES = {
    "no such option": (
        "--patch 1 --defense-option window=3",
        "expected method or screen for interval-bounds, got 'window'",
    ),
    "no such method": (
        "--patch 1 --defense-option method=forward",
        "method: expected 'interval' or 'backward', got 'forward'",
    ),
    "half a place": (
        "--patch 1 --defense-option screen=1.5",
        "screen: expected places a side >= 1, got 1.5",
    ),
    "backward bounds of sparse pixels": (
        "--patch sparse:2 --defense-option method=backward",
        "expected 'interval' for sparse pixels",
    ),
    "masks": ("--patch 1 --masks 3", "--masks: expected with --defense patchcleanser or"),
    "fill": ("--patch 1 --fill 0.5", "--fill: expected with a defense that hides pixels"),
    "tau": ("--patch 1 --tau 0.5", "--tau: expected with --defense minority-reports or"),
    "too many patches": ("--patch 4*1", "expected at most 20,000 places of several patches"),
    "too many pixels": ("--patch sparse:65", "expected at most the 64 of a 8x8 image, got 65"),
    "no attacker": ("", "--patch"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    patchproof: Patchproof, workplace: Path, options: str, message: str
) -> None:
    code, output, errors = patchproof(f"{CERTIFY} {options}")
    assert (code, output) == (2, "")
    assert errors.startswith("patchproof: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (workplace / "run").exists()


@pytest.mark.parametrize("batch_size", ["", "--batch-size 8"])
def test_a_network_without_bounds_is_refused_before_anything_is_written(
    patchproof: Patchproof, workplace: Path, batch_size: str
) -> None:
    (workplace / "halves_model.py").write_text(
        "import torch\n"
        "class Sorted(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        return images.flatten(1).sort(1).values[:, :2]\n"
    )
    line = "certify --data images --split all --model python:halves_model:Sorted --classes 2 "
    line += f"--device cpu --out run --patch 2 --defense interval-bounds {batch_size}"
    code, _, errors = patchproof(line)
    assert code == 2
    assert "bounds" in errors
    assert not (workplace / "run").exists()


def test_other_defenses_send_sparse_pixels_here(patchproof: Patchproof, workplace: Path) -> None:
    line = f"certify {COUNT} --weights mlp.safetensors --out run --patch sparse:2"
    code, _, errors = patchproof(line)
    assert code == 2
    assert "any 2 pixels of the image" in errors
    assert "--defense interval-bounds" in errors
    assert errors.count("\n") == 1
    assert not (workplace / "run").exists()


def test_list_names_it(patchproof: Patchproof) -> None:
    code, output, _ = patchproof("list")
    assert code == 0
    for name in ("interval-bounds", "--patch sparse:4", "ibp-mlp"):
        assert f"  {name} " in output
