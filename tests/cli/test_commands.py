"""The commands as a user runs them: output, exit codes, one line for each mistake."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from patchproof import ALERT, MinorityReports, PatchCleanser, SquarePatch
from patchproof.evaluation import read_result
from patchproof.models import ModelSpec, build_model

Patchproof = Callable[[str], tuple[int, str, str]]

MODEL = "--model python:halves_model:BrighterHalf --classes 2 --device cpu"
DETECT = f"certify --data images --split all {MODEL} --patch 2 --masks 3 --out run "
DETECT += "--defense minority-reports"
CERTIFY = f"certify --data images --split all {MODEL} --patch 2 --masks 3 --out run"


def test_certify_then_report(patchproof: Patchproof, workplace: Path) -> None:
    code, output, _ = patchproof(f"{CERTIFY} --gallery 2")
    assert code == 0
    assert "16 images against one square of 2x2 pixels" in output
    assert "patchproof report run" in output
    result = read_result(workplace / "run")
    assert result.finished
    assert 0 < result.summary.certified_accuracy.value < 1
    assert result.manifest["about"]["class_names"] == ["left", "right"]
    assert result.manifest["identity"]["model"]["spec"]["name"] == (
        "python:halves_model:BrighterHalf"
    )
    code, output, _ = patchproof("report run --out page.html")
    assert (code, output) == (0, "Report: page.html\n")
    assert "<html" in (workplace / "page.html").read_text()
    assert patchproof(CERTIFY)[0] == 0  # the folder may be certified again


HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
"""Where the tests run in the background, processes start out deaf to Ctrl-C."""


def command(line: str) -> list[str]:
    """Return the same command in a process of its own, which writes a shard every image."""
    code = (
        f"{HEARS_CTRL_C}import patchproof.evaluation.certify as c; c.SHARD_IMAGES = 1; "
        "from patchproof.cli.main import main; main()"
    )
    return [sys.executable, "-c", code, *line.split()]


def start_and_signal(line: str, folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Start a slow run, send a signal when two images are finished, and return code and stderr."""
    environment = os.environ | {"PYTHONPATH": ".", "SECONDS_PER_FORWARD": "0.02"}
    process = subprocess.Popen(
        command(f"{line} --batch-size 1"),  # so that images finish one after the other
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "examples-00001.parquet").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert not (folder / "summary.json").exists(), "the run ended before the signal came"
    return process.returncode, errors


def test_a_killed_run_goes_on_to_equal_tables(patchproof: Patchproof, workplace: Path) -> None:
    (workplace / "images/left/2.png").write_bytes(b"not an image")
    code, _ = start_and_signal(CERTIFY, workplace / "run", signal.SIGKILL)
    assert code == -signal.SIGKILL
    stopped = read_result(workplace / "run")
    assert not stopped.finished
    assert 2 <= len(stopped.examples) < 16
    assert patchproof(CERTIFY)[0] == 0
    assert patchproof(CERTIFY.replace("--out run", "--out whole"))[0] == 0
    resumed, whole = read_result(workplace / "run"), read_result(workplace / "whole")
    assert resumed.finished
    assert resumed.examples.equals(whole.examples)


def test_ctrl_c_says_how_to_go_on(workplace: Path) -> None:
    code, errors = start_and_signal(CERTIFY, workplace / "run", signal.SIGINT)
    assert code == 130
    assert "of 16 images, which are in run; the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert len(read_result(workplace / "run").examples) >= 2


def test_a_corrupt_image_is_named_and_left_out(patchproof: Patchproof, workplace: Path) -> None:
    (workplace / "images/left/3.png").write_bytes(b"not an image")
    code, output, _ = patchproof(f"{CERTIFY} --gallery 0")
    assert code == 0
    assert "1 corrupt, left out" in output
    examples = read_result(workplace / "run").examples.set_index("index")
    assert examples.loc[3, "status"] == "corrupt"
    assert "left/3.png" in str(examples.loc[3, "message"])


MISTAKES = {
    "no such command": ("certfy", "No such command 'certfy'"),
    "no such option": (f"{CERTIFY} --speed 3", "No such option: --speed"),
    "no folder for the results": ("certify --patch 2", "Missing option '--out'"),
    "no model": ("certify --patch 2 --out run", "expected --weights FILE, --model NAME or"),
    "no weights": ("certify --model timm:resnet18 --patch 2 --out run", "--pretrained"),
    "missing weights": ("certify --weights w.safetensors --patch 2 --out run", "w.safetensors"),
    "missing defense": ("certify --defense d.safetensors --out run", "d.safetensors"),
    "no attacker": (CERTIFY.replace("--patch 2", ""), "--patch or --covering"),
    "no such data": (CERTIFY.replace("images", "nowhere"), "got 'nowhere'"),
    "empty data": (CERTIFY.replace("images", "empty"), "empty"),
    "no such split": (CERTIFY.replace("all", "test"), "expected split all"),
    "too many images": (f"{CERTIFY} --count 17", "1 to 16 images, got 17"),
    "a patch larger than the image": (CERTIFY.replace("--patch 2", "--patch 9"), "8x8 image"),
    "a budget of zero": (CERTIFY.replace("--masks 3", "--masks 0"), "--masks: expected"),
    "too few classes": (CERTIFY.replace("--classes 2", "--classes x"), "'--classes'"),
    "a tau out of range": (f"{DETECT} --tau 1.5", "--tau"),
    "a tau without its defense": (f"{CERTIFY} --tau 0.5", "--tau: expected with --defense"),
    "an inference of another defense": (
        f"{DETECT} --inference challenger",
        "--inference: expected",
    ),
    "no such defense": (
        f"{CERTIFY} --defense magic",
        "patchcleanser, minority-reports, patchguard",
    ),
    "a fill out of range": (f"{CERTIFY} --fill 2", "--fill"),
    "no such device": (CERTIFY.replace("cpu", "abacus"), "--device: expected"),
    "a folder of something else": (CERTIFY.replace("run", "images"), "got a folder that holds"),
    "a file for a folder": (CERTIFY.replace("run", "halves_model.py"), "got a file"),
    "a report of nothing": ("report", "Missing argument"),
    "a report of another folder": ("report images", "without manifest.json"),
    "no image file": (f"predict nowhere.png {MODEL} --patch 2", "nowhere.png"),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    patchproof: Patchproof, workplace: Path, line: str, message: str
) -> None:
    (workplace / "empty").mkdir()
    code, output, errors = patchproof(line)
    assert code == 2
    assert output == ""
    assert errors.startswith("patchproof: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (workplace / "run").exists()


def test_the_results_of_another_run_are_refused(patchproof: Patchproof) -> None:
    assert patchproof(CERTIFY)[0] == 0
    code, _, errors = patchproof(CERTIFY.replace("--patch 2", "--patch 1"))
    assert code == 2
    assert "run: holds the results of another run: " in errors
    assert "threat.height is 2 there and 1 here" in errors


def test_a_debugger_sees_where(
    patchproof: Patchproof, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHPROOF_DEBUG", "1")
    code, _, errors = patchproof("report images")
    assert code == 2
    assert "Traceback" in errors


def test_predict_says_label_case_and_suspicion(patchproof: Patchproof, workplace: Path) -> None:
    line = f"predict images/left/7.png images/right/7.png {MODEL} --patch 2 --masks 3"
    code, output, errors = patchproof(line)
    assert (code, errors) == (0, "")
    assert output.splitlines() == [
        "images/left/7.png: 0, case agreed, no patch suspected, 9 forwards",
        "images/right/7.png: 1, case agreed, no patch suspected, 9 forwards",
    ]


def test_certify_and_predict_with_alerts(patchproof: Patchproof, workplace: Path) -> None:
    code, output, _ = patchproof(f"{DETECT} --tau 0.6")
    assert code == 0
    assert "alert on the clean image" in output
    assert "certified detection" in output
    result = read_result(workplace / "run")
    assert result.kind == "detection"
    assert result.manifest["identity"]["defense"]["tau"] == 0.6
    alerted = result.examples["prediction"] == ALERT
    assert 0 < alerted.sum() < 16
    assert patchproof("report run --out page.html")[0] == 0
    files = sorted((workplace / "images").glob("*/*.png"))
    line = " ".join(["predict", *map(str, files), MODEL, "--patch 2 --masks 3"])
    line += " --defense minority-reports --tau 0.6"
    code, output, _ = patchproof(line)
    assert code == 0
    said = [": alert, patch suspected, " in words for words in output.splitlines()]
    assert said == alerted.tolist()
    code, output, _ = patchproof(f"{line} --json")
    for alert, words in zip(alerted, output.splitlines(), strict=True):
        answer = json.loads(words)
        assert (answer["label"] is None) == answer["patch_suspected"] == alert
        assert (answer["case"] == "alert") == alert


def test_a_saved_detector_replaces_model_and_attacker(
    patchproof: Patchproof, workplace: Path
) -> None:
    spec = ModelSpec("tiny-resnet", 2, 1, (8, 8))
    detector = MinorityReports(
        build_model(spec), SquarePatch(2), image_size=(8, 8), masks_per_side=2, tau=0.5
    )
    detector.save(workplace / "detector.safetensors", spec)
    line = "certify --data images --split all --defense detector.safetensors --out run --gallery 0"
    code, _, errors = patchproof(f"{line} --tau 0.6")
    assert code == 2
    assert "expected --defense FILE without --tau" in errors
    assert patchproof(line)[0] == 0
    assert read_result(workplace / "run").manifest["identity"]["defense"] == detector.to_dict()


def test_predict_goes_on_after_a_corrupt_file(patchproof: Patchproof, workplace: Path) -> None:
    (workplace / "bad.png").write_bytes(b"not an image")
    line = f"predict bad.png images/right/7.png {MODEL} --patch 2 --masks 3 --json"
    code, output, errors = patchproof(line)
    assert code == 1
    assert errors.startswith("patchproof: error: ")
    assert "bad.png" in errors
    bad, good = map(json.loads, output.splitlines())
    assert "bad.png" in bad["error"]
    assert (good["label"], good["patch_suspected"], good["error"]) == (1, False, "")


def test_predict_refuses_another_size_unless_it_may_resize(
    patchproof: Patchproof, workplace: Path
) -> None:
    model = build_model(ModelSpec("tiny-resnet", 3, 1, (12, 12)))
    defense = PatchCleanser(model, SquarePatch(2), image_size=(12, 12), masks_per_side=2)
    spec = ModelSpec("tiny-resnet", 3, 1, (12, 12))
    defense.save(workplace / "defense.safetensors", spec, {"class_names": ["a", "b", "c"]})
    line = "predict images/left/7.png --defense defense.safetensors"
    code, _, errors = patchproof(line)
    assert code == 1
    assert "give an image size" in errors
    code, output, _ = patchproof(f"{line} --image-size 12")
    assert code == 0
    assert any(f"({name})" in output for name in "abc")
    code, _, errors = patchproof(f"{line} --image-size 8")
    assert code == 2
    assert "expected images of 12x12x1 (height, width, channels), got 8x8x1" in errors


def test_a_defense_replaces_model_and_attacker(patchproof: Patchproof, workplace: Path) -> None:
    spec = ModelSpec("tiny-resnet", 2, 1, (8, 8))
    defense = PatchCleanser(build_model(spec), SquarePatch(2), image_size=(8, 8), masks_per_side=2)
    defense.save(workplace / "defense.safetensors", spec)
    line = "certify --data images --split all --defense defense.safetensors --out run --gallery 0"
    code, _, errors = patchproof(f"{line} --patch 2")
    assert code == 2
    assert "expected --defense FILE without --patch" in errors
    assert patchproof(line)[0] == 0
    identity = read_result(workplace / "run").manifest["identity"]
    assert identity["defense"] == defense.to_dict()
    assert identity["model"]["spec"] == spec.to_dict()
    code, output, _ = patchproof("list defense.safetensors")
    assert code == 0
    assert json.loads(output)["model"] == spec.to_dict()


def test_a_damaged_file_is_a_failure(patchproof: Patchproof, workplace: Path) -> None:
    (workplace / "w.safetensors").write_bytes(b"12345")
    code, _, errors = patchproof("list w.safetensors")
    assert code == 1
    assert "w.safetensors" in errors
    assert errors.count("\n") == 1


def test_list_names_what_there_is(patchproof: Patchproof) -> None:
    code, output, _ = patchproof("list")
    assert code == 0
    for name in ("tiny-resnet", "digits", "cutout", "PatchCleanser", "--patch 2.4%"):
        assert name in output


@pytest.mark.parametrize(
    "name", ["", "demo", "train", "certify", "predict", "report", "list"], ids=str
)
def test_every_command_has_help_with_an_example(patchproof: Patchproof, name: str) -> None:
    code, output, _ = patchproof(f"{name} --help")
    assert code == 0
    assert f"Example: patchproof {name}" in output or (not name and "patchproof demo" in output)


def test_version(patchproof: Patchproof) -> None:
    code, output, _ = patchproof("--version")
    assert code == 0
    assert output.startswith("patchproof 0.")


def test_freed_memory_is_used_again() -> None:
    """Blocks of 32 MiB in all take fresh pages each time, unless those that are freed are kept."""
    glibc = platform.libc_ver()[0] == "glibc"  # no other library has the setting
    program = f"""
import resource, sys
from patchproof.cli.main import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() == {glibc}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    blocks = [b"x" * 2**22 for _ in range(8)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    default, kept = (
        int(subprocess.run([sys.executable, "-c", program, name], capture_output=True).stdout)
        for name in ("default", "keep")
    )
    assert kept < default / 4 or not glibc
