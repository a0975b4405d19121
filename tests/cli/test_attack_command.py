"""``patchproof attack`` as a new user meets it: results, comparison, mistakes, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from test_commands import HEARS_CTRL_C

Patchproof = Callable[[str], tuple[int, str, str]]

SHARED = (
    "--data images --split all --model python:halves_model:BrighterHalf --patch 2 --masks 3 "
    "--threads 1"
)
QUICK = "--attack-option steps=2 --attack-option step_size=1 --place-count 3"


def examples(folder: Path) -> pd.DataFrame:
    return pd.concat(map(pd.read_parquet, sorted(folder.glob("examples-*.parquet"))))


def test_attack_then_compare_then_report(patchproof: Patchproof, workplace: Path) -> None:
    assert patchproof(f"certify {SHARED} --out certified")[0] == 0
    code, output, errors = patchproof(
        f"attack {SHARED} {QUICK} --places trial --out attacked --against certified"
    )
    assert code == 0, errors
    assert "not broken by this attack" in output
    assert "certified and broken: 0" in output
    table = examples(workplace / "attacked")
    assert len(table) == 16
    summary = json.loads((workplace / "attacked/summary.json").read_text())
    right = table["prediction"] == table["label"]
    assert summary["robust_accuracy"]["value"] == pytest.approx((right & ~table["broken"]).mean())
    code, output, errors = patchproof("report certified attacked --out page.html")
    assert code == 0, errors
    assert (workplace / "page.html").stat().st_size > 10_000


@pytest.mark.parametrize("method", ["pgd", "ifgsm", "lavan", "square"])
def test_every_attack_breaks_a_bare_classifier(
    patchproof: Patchproof, workplace: Path, method: str
) -> None:
    line = SHARED.replace(" --masks 3", "") + " --defense undefended --places all"
    code, _, errors = patchproof(
        f"attack {line} --attack {method} --attack-option steps=20 --out attacked"
    )
    assert code == 0, errors
    assert examples(workplace / "attacked")["broken"].any()


def test_a_universal_patch_is_made_and_tried(patchproof: Patchproof, workplace: Path) -> None:
    line = SHARED.replace(" --masks 3", "")
    code, output, errors = patchproof(
        f"universal-patch {line} --target 1 --steps 20 --images-per-step 8 --out made/patch.png"
    )
    assert code == 0, errors
    assert (workplace / "made/patch.pdf").read_bytes().startswith(b"%PDF")
    code, output, errors = patchproof(
        f"attack {line} --defense undefended --attack universal --patch-image made/patch.png "
        "--target 1 --places all --out attacked"
    )
    assert code == 0, errors
    assert "got the target's label" in output
    table = examples(workplace / "attacked")
    assert (table.loc[table["case"] == "held", "tries"] == 49).all()
    assert (table["target"] == 1).tolist() == (table["label"] == 0).tolist()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--attack nothing", "--attack: expected pgd or ifgsm or"),
        ("--attack-option stepz=3", "expected aims or"),
        ("--attack-option steps=0", "steps: expected at least 1, got 0"),
        ("--attack-option steps=many", "steps: expected"),
        ("--attack universal --attack-option seed=1", "--patch-image: expected"),
        ("--patch-image x.png", "--patch-image: expected"),
        ('--attack-option aims=["nothing"]', "aim: expected"),
        ("--attack-option aims=nothing", "aim: expected majority or"),
        ("--attack-option aims=3", "aim: expected majority or"),
        ("--attack ifgsm --restarts 2", "restarts: expected 1"),
        ("--target 2", "target: expected a class from 0 to 1, got 2"),
        ("--against nowhere", "nowhere: expected a results folder"),
        ("--data nowhere", "nowhere"),
        ("--places corners --place-count 0", "place-count"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    patchproof: Patchproof, workplace: Path, extra: str, message: str
) -> None:
    code, _, errors = patchproof(f"attack {SHARED} {extra} --out attacked")
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not (workplace / "attacked").exists()


def test_ctrl_c_keeps_what_is_finished(workplace: Path) -> None:
    command = [
        *(sys.executable, "-c", f"{HEARS_CTRL_C}from patchproof.cli.main import main; main()"),
        "attack",
        *SHARED.split(),
        *QUICK.split(),
        *("--out", "attacked"),
    ]
    environment = os.environ | {"SECONDS_PER_FORWARD": "0.2", "PYTHONPATH": str(workplace)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (workplace / "attacked/manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
