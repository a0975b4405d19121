"""``patchproof report`` with attack runs: what it says, and when it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from patchproof.evaluation import read_result
from patchproof.evaluation.store import RunFolder, empty_row
from patchproof.evaluation.summary import summarize_attack

Patchproof = Callable[[str], tuple[int, str, str]]

CERTIFY = (
    "certify --data images --split all --model python:halves_model:BrighterHalf --classes 2 "
    "--device cpu --patch 2 --masks 3 --out run"
)


def write_attack(certify: Path, path: Path, breaks_certified: bool, **changed: object) -> list[int]:
    """Write an attack run that breaks what is certified, or what is not; return the images."""
    result = read_result(certify)
    identity = result.manifest["identity"] | {"kind": "attack", "attack": {"name": "pgd"}} | changed
    rows = []
    for row in result.examples.to_dict("records"):
        right = row["prediction"] == row["label"]
        broken = right and row["certified"] == breaks_certified
        rows.append(
            empty_row("attack")
            | {name: row[name] for name in ("index", "label", "vanilla", "prediction", "status")}
            | {
                "attacked_prediction": 1 - row["label"] if broken else row["prediction"],
                "broken": broken,
                "regions": json.dumps([[0, 0, 2, 2]]),
                "case": "wrong" if not right else "broken" if broken else "held",
                "seconds": 0.1,
            }
        )
    with RunFolder.open(path, result.manifest | {"identity": identity}) as folder:
        folder.append(rows)
        folder.write_summary(summarize_attack(*folder.tables()))
    return [row["index"] for row in rows if row["broken"]]


def test_a_sandwich_succeeds(patchproof: Patchproof, workplace: Path) -> None:
    assert patchproof(CERTIFY)[0] == 0
    assert write_attack(workplace / "run", workplace / "attack", breaks_certified=False)
    code, output, errors = patchproof("report run attack --out page.html")
    assert (code, output, errors) == (0, "Report: page.html\n", "")
    assert "Sandwich" in (workplace / "page.html").read_text()


def test_the_sandwich_is_written_as_a_table_and_a_figure(
    patchproof: Patchproof, workplace: Path
) -> None:
    assert patchproof(CERTIFY)[0] == 0
    broken = write_attack(workplace / "run", workplace / "attack", breaks_certified=False)
    assert patchproof("report run attack --out page.html --tables tables")[0] == 0
    names = {f"sandwich-recovery.{kind}" for kind in ("csv", "md", "png", "svg")}
    assert {path.name for path in (workplace / "tables").iterdir()} == names | {"analysis.json"}
    (row,) = pd.read_csv(workplace / "tables/sandwich-recovery.csv").to_dict("records")
    assert (row["count"], row["broken_images"], row["certified_and_broken"]) == (16, len(broken), 0)
    code, _, errors = patchproof("report run --out other.html --tables tables")
    assert code == 2
    assert "expected an attack run on what a certify run certifies" in errors
    assert not (workplace / "other.html").exists()


def test_a_broken_certificate_ends_with_one_line_and_code_1(
    patchproof: Patchproof, workplace: Path
) -> None:
    assert patchproof(CERTIFY)[0] == 0
    broken = write_attack(workplace / "run", workplace / "attack", breaks_certified=True)
    code, _, errors = patchproof("report run attack --out page.html")
    assert code == 1
    assert errors.count("\n") == 1
    assert "CERTIFIED IMAGES ARE BROKEN" in errors
    images = ", ".join(map(str, broken[:10]))
    assert f"run certifies and attack breaks images {images}" in errors
    assert "which is a bug" in (workplace / "page.html").read_text()


def test_an_attack_on_something_else_breaks_nothing(
    patchproof: Patchproof, workplace: Path
) -> None:
    assert patchproof(CERTIFY)[0] == 0
    write_attack(
        workplace / "run", workplace / "attack", True, model={"spec": {"name": "m"}, "digest": "x"}
    )
    assert patchproof("report attack run --out page.html")[0] == 0
    assert "is on another model than" in (workplace / "page.html").read_text()
    assert patchproof("report attack --out page.html")[0] == 0
