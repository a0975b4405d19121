import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from halves import make_defense, make_halves

from patchproof import PatchproofError, RunError
from patchproof.evaluation import Proportion, Summary, certify_dataset, read_result


@pytest.fixture
def run(tmp_path: Path) -> Path:
    certify_dataset(make_defense(), make_halves(6), tmp_path / "run", gallery=2)
    return tmp_path / "run"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(PatchproofError, match=r"nowhere: .* no such folder"):
        read_result(tmp_path / "nowhere")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchproofError, match=r"without manifest\.json"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "got no manifest"),
        ('{"format": "patchproof-result/9"}', "expected the format .*result/1, got .*result/9"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(run: Path, text: str, message: str) -> None:
    (run / "manifest.json").write_text(text)
    with pytest.raises(PatchproofError, match=message):
        read_result(run)


def test_a_run_without_a_finished_image_is_said_to_have_none(run: Path) -> None:
    (run / "examples-00000.parquet").unlink()
    with pytest.raises(PatchproofError, match="without a finished image"):
        read_result(run)


def test_without_its_summary_a_run_is_unfinished(run: Path) -> None:
    (run / "summary.json").unlink()
    result = read_result(run)
    assert not result.finished
    assert result.summary.count == 6


@pytest.mark.parametrize("name", ["examples-00000.parquet", "timing-00000.parquet", "gallery.npz"])
def test_a_damaged_file_is_named(run: Path, name: str) -> None:
    (run / name).write_bytes(b"PAR1 then nothing")
    with pytest.raises(RunError, match=f"{name}: .*damaged"):
        read_result(run)


def edit_about(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what the manifest records of how the run was made."""
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest["about"])
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_what_a_run_records_of_its_paper(run: Path) -> None:
    """A run of before there were defenses without a sound condition says nothing of it."""
    recorded = read_result(run).manifest["about"]
    assert recorded["paper"] == "sound"
    assert recorded["defense_words"] == "9 masks"
    share = figures(run)
    edit_about(run, lambda about: about.pop("paper"))
    assert figures(run) == share
    edit_about(run, lambda about: about.update(paper="unsound"))
    assert figures(run) == (share[0], "unsound")
    edit_about(run, lambda about: about.update(paper=None))
    assert figures(run) == (None, None)
    edit_about(run, lambda about: about.update(paper="perhaps"))
    with pytest.raises(PatchproofError, match="sound or unsound, got 'perhaps'"):
        read_result(run)


def figures(run: Path) -> tuple[Proportion | None, str | None]:
    summary = read_result(run).summary
    assert isinstance(summary, Summary)
    return summary.paper_accuracy, summary.paper


def test_a_run_of_before_goes_on(run: Path) -> None:
    """What is recorded of how a run was made does not make it another run."""
    edit_about(run, lambda about: about.pop("paper"))
    before = read_result(run).examples
    certify_dataset(make_defense(), make_halves(6), run, gallery=2)
    assert read_result(run).examples.equals(before)


def test_a_missing_timing_shard_is_named(run: Path) -> None:
    (run / "timing-00000.parquet").unlink()
    with pytest.raises(RunError, match=r"timing-00000\.parquet: missing or damaged"):
        read_result(run)
