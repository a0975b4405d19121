"""A run writes what the defense says, goes on after any stop, and never mixes with another."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from halves import BrighterHalf, make_defense, make_halves
from torch import nn

from patchproof import PatchCleanser, PatchproofError, RunError, SquarePatch
from patchproof.datasets import ImageDataset
from patchproof.evaluation import Progress, certify, certify_dataset, read_result
from patchproof.evaluation.store import RunFolder


def stop_after(count: int, error: BaseException) -> Callable[[Progress], None]:
    """Return a progress callback that raises when so many images are done."""

    def progress(now: Progress) -> None:
        if now.done >= count:
            raise error

    return progress


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "SHARD_IMAGES", 3)


def test_the_tables_say_what_the_defense_says(
    defense: PatchCleanser, halves: ImageDataset, tmp_path: Path
) -> None:
    summary = certify_dataset(defense, halves, tmp_path / "run")
    images = torch.stack([halves.image(position) for position in range(len(halves))])
    expected = defense.certify(images, halves.labels)
    result = read_result(tmp_path / "run")
    examples = result.examples
    assert examples["index"].tolist() == list(range(20))
    assert examples["label"].tolist() == halves.labels.tolist()
    assert examples["prediction"].tolist() == expected.prediction.tolist()
    assert examples["certified"].tolist() == expected.certified.tolist()
    assert examples["paper_condition"].tolist() == expected.paper_condition.tolist()
    assert examples["vanilla"].tolist() == defense.model(images).argmax(1).tolist()
    assert 0 < summary.certified_accuracy.value < summary.clean_accuracy.value < 1
    assert result.timing["forwards"].between(1, 45).all()
    assert result.finished
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary.to_dict()


def test_rows_keep_the_indices_of_their_source(
    defense: PatchCleanser, halves: ImageDataset, tmp_path: Path
) -> None:
    certify_dataset(defense, halves.subset([19, 4, 11]), tmp_path)
    assert read_result(tmp_path).examples["index"].tolist() == [4, 11, 19]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
def test_a_stopped_run_keeps_what_is_finished_and_goes_on(
    halves: ImageDataset, tmp_path: Path, error: BaseException
) -> None:
    certify_dataset(make_defense(), halves, tmp_path / "whole")
    with pytest.raises(type(error)):
        certify_dataset(make_defense(), halves, tmp_path / "run", progress=stop_after(8, error))
    stopped = read_result(tmp_path / "run")
    assert not stopped.finished
    assert 8 <= len(stopped.examples) < 20

    seen: list[Progress] = []
    certify_dataset(make_defense(), halves, tmp_path / "run", progress=seen.append)
    assert seen[0].done == len(stopped.examples)
    assert seen[-1].done == 20
    resumed, whole = read_result(tmp_path / "run"), read_result(tmp_path / "whole")
    assert resumed.examples.equals(whole.examples)
    assert resumed.finished
    assert resumed.timing["index"].equals(whole.timing["index"])


def test_a_finished_run_evaluates_nothing_again(halves: ImageDataset, tmp_path: Path) -> None:
    certify_dataset(make_defense(), halves, tmp_path)
    before = read_result(tmp_path)
    defense = make_defense()
    calls: list[int] = []
    defense.model.register_forward_hook(lambda *_: calls.append(1))
    summary = certify_dataset(defense, halves, tmp_path)
    assert len(calls) == 1  # that the model fits the data
    assert summary == before.summary


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("name", ["manifest", "timing-00001", "examples-00001", "summary"])
def test_no_space_left_leaves_whole_files_and_the_run_can_go_on(
    halves: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    certify_dataset(make_defense(), halves, tmp_path / "whole")
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if Path(target).stem == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(RunError, match=f"cannot write .*{name}.*: No space left on device"):
            certify_dataset(make_defense(), halves, tmp_path / "run")
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name[0] == "."]
    certify_dataset(make_defense(), halves, tmp_path / "run")
    assert read_result(tmp_path / "run").examples.equals(read_result(tmp_path / "whole").examples)


def test_a_corrupt_image_is_named_recorded_and_left_out(
    defense: PatchCleanser, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        summary = certify_dataset(defense, make_halves(broken=frozenset({7})), tmp_path)
    assert "halves image 7" in caplog.text
    assert (summary.count, summary.corrupt) == (19, 1)
    assert summary.clean_accuracy.count == 19
    row = read_result(tmp_path).examples.set_index("index").loc[7]
    assert (row["status"], row["prediction"], row["certified"]) == ("corrupt", -1, False)
    assert "halves image 7" in row["message"]


def test_nothing_but_corrupt_images_is_a_failure(defense: PatchCleanser, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="got none"):
        certify_dataset(defense, make_halves(3, frozenset(range(3))), tmp_path)


def without_images(halves: ImageDataset) -> ImageDataset:
    none = torch.empty(0, dtype=torch.int64)
    return ImageDataset(**{**vars(halves), "labels": none, "indices": none})


def with_labels_of_three_classes(halves: ImageDataset) -> ImageDataset:
    labels = halves.labels.clone()
    labels[3] = 2
    return ImageDataset(**{**vars(halves), "labels": labels})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_images, "expected images in halves test, got none"),
        (with_labels_of_three_classes, "expected labels from 0 to 1.* got 0 to 2"),
        (lambda halves: halves.subset([1, 1]), "each image once"),
        (lambda halves: ImageDataset(**{**vars(halves), "image_size": (9, 8)}), "images of 8x8"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_written(
    defense: PatchCleanser,
    halves: ImageDataset,
    tmp_path: Path,
    change: Callable[[ImageDataset], ImageDataset],
    message: str,
) -> None:
    with pytest.raises(PatchproofError, match=message):
        certify_dataset(defense, change(halves), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_for_other_channels_is_refused(halves: ImageDataset, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten()).eval()
    with pytest.raises(PatchproofError, match="expected a model for 1x8x8 images"):
        certify_dataset(make_defense(model=model), halves, tmp_path / "run")


def other_weights() -> PatchCleanser:
    model = BrighterHalf().eval()
    model.scale.data.fill_(19.0)
    return make_defense(model=model)


@pytest.mark.parametrize(
    ("other", "options", "key"),
    [
        (make_defense, {"stop": "never"}, 'stop is "first_lost_region" there and "never" here'),
        (lambda: make_defense(fill=0.25), {}, "defense.fill is 0.5 there and 0.25 here"),
        (lambda: make_defense(threat=SquarePatch(1)), {}, "threat.height is 2 there and 1 here"),
        (other_weights, {}, "model.digest"),
    ],
)
def test_the_folder_of_another_run_is_refused_with_what_differs(
    halves: ImageDataset,
    tmp_path: Path,
    other: Callable[[], PatchCleanser],
    options: dict[str, Any],
    key: str,
) -> None:
    certify_dataset(make_defense(), halves, tmp_path, gallery=0)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(PatchproofError, match="results of another run") as refusal:
        certify_dataset(other(), halves, tmp_path, gallery=0, **options)
    assert key in str(refusal.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_images_are_another_run(
    defense: PatchCleanser, halves: ImageDataset, tmp_path: Path
) -> None:
    certify_dataset(defense, halves.subset(range(10)), tmp_path, gallery=0)
    with pytest.raises(PatchproofError, match=r"dataset\.indices_digest"):
        certify_dataset(defense, halves.subset(range(1, 11)), tmp_path)


def test_a_folder_with_other_files_is_refused(
    defense: PatchCleanser, halves: ImageDataset, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(PatchproofError, match=r"got a folder that holds thesis\.tex"):
        certify_dataset(defense, halves, tmp_path)
    with pytest.raises(PatchproofError, match="got a file"):
        certify_dataset(defense, halves, tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_processes_cannot_write_to_one_folder(
    defense: PatchCleanser, halves: ImageDataset, tmp_path: Path
) -> None:
    pytest.importorskip("fcntl")
    certify_dataset(defense, halves, tmp_path)
    manifest = read_result(tmp_path).manifest
    with (
        RunFolder.open(tmp_path, manifest),
        pytest.raises(RunError, match="another patchproof process"),
    ):
        certify_dataset(defense, halves, tmp_path)


def test_the_gallery_shows_certified_right_and_wrong_images(
    defense: PatchCleanser, halves: ImageDataset, tmp_path: Path
) -> None:
    certify_dataset(defense, halves, tmp_path, gallery=6)
    result = read_result(tmp_path)
    gallery = result.gallery
    assert gallery is not None
    rows = result.examples.set_index("index").loc[gallery.index]
    assert rows["certified"].sum() >= 2
    assert (rows["prediction"] != rows["label"]).any()
    assert gallery.image.shape == (6, 1, 8, 8)
    first = int(gallery.index[0])
    assert np.allclose(gallery.image[0] / 255, halves.image(first).numpy())
    certified = rows["certified"].to_numpy()
    highest = gallery.vulnerability.max((1, 2))
    assert (highest[certified] == 0).all()
    assert (highest[~certified] > 0).all()


def test_a_gallery_of_none_writes_none(
    defense: PatchCleanser, halves: ImageDataset, tmp_path: Path
) -> None:
    certify_dataset(defense, halves, tmp_path, gallery=0)
    assert read_result(tmp_path).gallery is None
