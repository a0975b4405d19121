from pathlib import Path

import pytest
from halves import make_defense, make_halves

from patchproof import PatchproofError, RunError
from patchproof.evaluation import certify_dataset, read_result


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


def test_a_missing_timing_shard_is_named(run: Path) -> None:
    (run / "timing-00000.parquet").unlink()
    with pytest.raises(RunError, match=r"timing-00000\.parquet: missing or damaged"):
        read_result(run)
