"""Randomized cropping from the command line: certify, resume, report, predict, mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional

from patchproof import RandomizedCropping, SquarePatch, load
from patchproof.datasets import load_dataset
from patchproof.evaluation import read_result
from patchproof.evaluation.summary import ProbableSummary, Summary
from patchproof.models import ModelSpec, build_model, save_classifier
from patchproof.models.crops import CropResNet9

Patchproof = Callable[[str], tuple[int, str, str]]

NET = ModelSpec("crop-resnet9", 10, 1, (8, 8), {"crop": 5, "widths": [8, 16, 16, 16]})
COUNT = "--data digits --count 40 --seed 1 --device cpu --gallery 2"
DEFENSE = "--weights crops.safetensors --defense randomized-cropping"
CERTIFY = f"certify {COUNT} {DEFENSE} --out run"
PATCH = "--patch 1 --locations 0,0,2,2"  # meets at most 4 of the 16 crops
FIXED = "--defense-option mode=fixed-crops --defense-option crops=12"
RANDOM = "--defense-option mode=random-crops --defense-option crops=12"
MODES = {
    "all-crops": ("", "all 16 crops of 5x5 pixels"),
    "fixed-crops": (FIXED, "12 fixed crops of 5x5 pixels of 16, drawn with replacement"),
    "random-crops": (
        f"{RANDOM} --defense-option probability=0.9",
        "12 random crops of 5x5 pixels of 16, drawn with replacement, for a probability of 0.9",
    ),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a small network after a few steps on crops of digits."""
    digits = load_dataset("digits", "train").sample(600, 0)
    images = torch.stack([digits.image(index) for index in range(len(digits))])
    torch.manual_seed(0)
    model = build_model(NET).train()
    assert isinstance(model, CropResNet9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(100):
        batch = torch.randint(len(images), (128,))
        logits = model.cropped(images, batch, torch.randint(4, (128, 2)))
        loss = functional.cross_entropy(logits, digits.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "crops.safetensors"
    save_classifier(path, model.eval(), NET, {"class_names": list(digits.class_names)})
    return path.read_bytes()


@pytest.fixture(autouse=True)
def files(workplace: Path, weights: bytes) -> None:
    """Put ``crops.safetensors`` and ``digit.png`` into the workplace."""
    (workplace / "crops.safetensors").write_bytes(weights)
    pixels = load_dataset("digits", "test").image(0)
    Image.fromarray((pixels[0] * 255).byte().numpy()).save(workplace / "digit.png")


@pytest.mark.parametrize("mode", MODES)
def test_certify_and_report(patchproof: Patchproof, workplace: Path, mode: str) -> None:
    options, words = MODES[mode]
    code, output, _ = patchproof(f"{CERTIFY} {PATCH} {options}")
    assert code == 0
    assert words in " ".join(output.partition("┏")[0].split())
    assert "not sound" in output
    result = read_result(workplace / "run")
    assert result.finished
    assert result.manifest["about"]["defense_words"] == words
    assert result.manifest["about"]["paper"] == "unsound"
    identity = result.manifest["identity"]
    assert identity["defense"]["mode"] == mode
    summary = result.summary
    assert summary.clean_accuracy.value > 0.5
    assert summary.vanilla_accuracy.value > 0.5
    if mode == "random-crops":
        assert identity["kind"] == "probable"
        assert isinstance(summary, ProbableSummary)
        share = summary.certified_with_probability_accuracy.value
        examples = result.examples
        assert share == (examples["success_probability"] >= 0.9).mean()
        assert (examples["clean_probability"] >= examples["success_probability"]).all()
        assert summary.mean_success_probability == examples["success_probability"].mean()
    else:
        assert identity["kind"] == "recovery"
        assert isinstance(summary, Summary)
        share = summary.certified_accuracy.value
    assert 0 < share < summary.clean_accuracy.value
    forwards = summary.forwards_per_image
    assert forwards < 12 if mode == "fixed-crops" else forwards == 16
    assert patchproof("report run --out page.html")[0] == 0
    page = (workplace / "page.html").read_text()
    assert words in page
    assert ("certified with" in page) == (mode == "random-crops")


@pytest.mark.parametrize("mode", MODES)
def test_the_same_command_goes_on_with_a_run(
    patchproof: Patchproof, workplace: Path, mode: str
) -> None:
    """Random crops too: what a run records of its draws is drawn by the seed and the image."""
    line = f"{CERTIFY} {PATCH} --batch-size 64 {MODES[mode][0]}"
    assert patchproof(line)[0] == 0
    folder = workplace / "run"
    whole = read_result(folder).examples
    (folder / "summary.json").unlink()
    (folder / "examples-00000.parquet").unlink()
    assert patchproof(line)[0] == 0
    assert read_result(folder).examples.equals(whole)
    code, _, errors = patchproof(f"{line} --tolerance 0.5")
    assert code == 2
    assert "defense.tolerance is 0.001 there and 0.5 here" in errors


def test_another_seed_draws_other_crops(patchproof: Patchproof, workplace: Path) -> None:
    found = []
    for seed in (0, 1):
        line = f"{CERTIFY}-{seed} {PATCH} {RANDOM} --defense-option seed={seed}"
        assert patchproof(line)[0] == 0
        found.append(read_result(workplace / f"run-{seed}").examples)
    assert found[0]["success_probability"].equals(found[1]["success_probability"])
    assert not found[0]["prediction"].equals(found[1]["prediction"])


def test_vote_shares_from_samples(patchproof: Patchproof, workplace: Path) -> None:
    options = "--defense-option samples=400 --defense-option confidence=0.95"
    code, output, _ = patchproof(f"{CERTIFY} {PATCH} {RANDOM} {options}")
    assert code == 0
    assert "(vote shares from 400 crops, confidence 0.95)" in " ".join(output.split())
    sampled = read_result(workplace / "run").examples["success_probability"]
    assert patchproof(f"{CERTIFY}-known {PATCH} {RANDOM}")[0] == 0
    known = read_result(workplace / "run-known").examples["success_probability"]
    assert 0 < sampled.mean() < known.mean()


def test_several_patches_without_replacement(patchproof: Patchproof, workplace: Path) -> None:
    options = f"{RANDOM} --defense-option replacement=false"
    code, output, _ = patchproof(f"{CERTIFY} --patch 2*1 --locations 0,0,2,8 {options}")
    assert code == 0
    assert "drawn without replacement" in " ".join(output.split())
    assert read_result(workplace / "run").summary.clean_accuracy.value > 0.5


def test_a_network_that_knows_nothing_of_crops(patchproof: Patchproof, workplace: Path) -> None:
    line = "certify --data images --split all --model python:halves_model:BrighterHalf --classes 2 "
    line += "--device cpu --out run --patch 1 --defense randomized-cropping"
    code, _, errors = patchproof(line)
    assert code == 2
    assert "crop_size: expected the size of the crops, got none" in errors
    assert not (workplace / "run").exists()
    assert patchproof(f"{line} --defense-option crop=8x6")[0] == 0
    defense = read_result(workplace / "run").manifest["identity"]["defense"]
    assert defense["crop_size"] == [8, 6]


def test_predict(patchproof: Patchproof) -> None:
    line = f"predict digit.png {DEFENSE} --patch 1"
    for options, most in ((FIXED, 12), (RANDOM, 12), ("", 16)):
        code, output, _ = patchproof(f"{line} {options} --json")
        assert code == 0
        answer = json.loads(output)
        assert 1 < answer["forwards"] <= most
        assert answer["label"] == int(load_dataset("digits", "test").labels[0])


def test_a_saved_defense_replaces_its_options(patchproof: Patchproof, workplace: Path) -> None:
    made = build_model(NET)
    defense = RandomizedCropping(
        made, SquarePatch(2), image_size=(8, 8), mode="random-crops", crops=9, seed=4
    )
    defense.save(workplace / "defense.safetensors", NET)
    line = f"certify {COUNT} --out run --defense defense.safetensors"
    assert patchproof(line)[0] == 0
    loaded = load(workplace / "defense.safetensors")
    assert read_result(workplace / "run").manifest["identity"]["defense"] == loaded.to_dict()
    code, _, errors = patchproof(f"{line} --patch 2")
    assert code == 2
    assert "expected --defense FILE without --patch" in errors


MISTAKES = {
    "no such option": (
        "--patch 1 --defense-option window=3",
        "expected one of mode, crop, crops, replacement, seed, probability, samples, confidence",
    ),
    "no such mode": ("--patch 1 --defense-option mode=some", "or 'random-crops', got 'some'"),
    "half a crop": (f"--patch 1 {FIXED} --defense-option crops=1.5", "a number of crops such as"),
    "a crop of another network": (
        "--patch 1 --defense-option crop=4",
        "expected (5, 5), which the model was made for, got (4, 4)",
    ),
    "a crop larger than the image": ("--patch 1 --defense-option crop=9", "crop_size: expected"),
    "more crops than places": (
        f"--patch 1 {FIXED} --defense-option replacement=false --defense-option crops=17",
        "from 1 to 16 places, without replacement, got 17",
    ),
    "certainty": (f"--patch 1 {RANDOM} --defense-option probability=1.0", "in (0, 1), got 1.0"),
    "a whole number": (f"--patch 1 {RANDOM} --defense-option probability=1", "such as 0.95"),
    "samples of fixed crops": (
        f"--patch 1 {FIXED} --defense-option samples=9",
        "expected with mode=random-crops, got mode=fixed-crops",
    ),
    "sparse pixels": ("--patch sparse:2", "expected patches, whose places can be listed"),
    "masks": ("--patch 1 --masks 3", "--masks: expected with --defense patchcleanser or"),
    "fill": ("--patch 1 --fill 0.5", "--fill: expected with a defense that hides pixels"),
    "tau": ("--patch 1 --tau 0.5", "--tau: expected with --defense minority-reports or"),
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


def test_help_and_list_name_it(patchproof: Patchproof) -> None:
    for command in ("certify", "predict"):
        code, output, _ = patchproof(f"{command} --help")
        assert code == 0
        assert "randomized-cropping" in output
    code, output, _ = patchproof("list")
    assert code == 0
    for name in ("randomized-cropping", "crop-resnet9", "crops"):
        assert f"  {name} " in output
