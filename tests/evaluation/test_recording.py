"""A recording holds what the model says, is made once, goes on after any stop, and never mixes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from halves import BrighterHalf, make_halves
from torch import Tensor, nn

from patchproof import MaskSet, PatchproofError, RunError, SquarePatch
from patchproof.datasets import ImageDataset
from patchproof.evaluation import recording as module
from patchproof.evaluation.recording import Archive, Recording, RecordingProgress
from patchproof.views import MaskPairViews

MASKS = MaskSet.for_threat(SquarePatch(2), (8, 8), 3)


def make_archive(folder: Path, **options: Any) -> Archive:
    """Return an archive of the model and the images of these tests; it counts its forwards."""
    model = options.pop("model") if "model" in options else BrighterHalf().eval()
    dataset = options.pop("dataset") if "dataset" in options else make_halves()
    return Archive(folder, model, dataset, **({"fill": 0.5, "batch_size": 16} | options))


def same(one: Recording, other: Recording) -> bool:
    names = ("index", "right", "labels", "margins", "confidences")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_a_recording_is_what_the_model_says_of_every_view(tmp_path: Path) -> None:
    halves, model = make_halves(), BrighterHalf().eval()
    recording = make_archive(tmp_path).record(MASKS)
    views = MaskPairViews(MASKS, 0.5)
    masked = MASKS.masked()
    images = torch.stack([halves.image(position) for position in range(len(halves))])
    assert recording.labels.shape == (20, 1 + views.count)
    assert recording.index.tolist() == list(range(20))
    assert torch.equal(recording.right, halves.labels)
    columns = [(0, torch.zeros(8, 8, dtype=torch.bool))]
    for first in range(len(MASKS)):
        for second in range(len(MASKS)):
            hidden = masked[first] | masked[second]
            columns.append((1 + int(views.pair_to_view[first, second]), hidden))
    for column, hidden in columns:
        with torch.no_grad():
            scores = model(images.masked_fill(hidden, 0.5))
        highest, second_highest = scores.topk(2).values.unbind(1)
        torch.testing.assert_close(recording.margins[:, column], highest - second_highest)
        assert torch.equal(recording.labels[:, column].long(), scores.argmax(1))
        confidence = scores.softmax(1).amax(1)
        torch.testing.assert_close(recording.confidences[:, column], confidence)
    assert recording.forwards == 20 * (1 + views.count)
    assert recording.seconds > 0


def test_a_second_recording_costs_nothing(tmp_path: Path) -> None:
    first = make_archive(tmp_path)
    recording = first.record(MASKS)
    second = make_archive(tmp_path)
    assert same(second.record(MASKS), recording)
    assert (first.forwards, second.forwards) == (recording.forwards, 0)


def test_equal_masks_share_a_recording_whatever_they_are_for(tmp_path: Path) -> None:
    archive = make_archive(tmp_path)
    masks = MaskSet.for_threat(SquarePatch(2), (8, 8), 4)
    archive.record(masks)
    spent = archive.forwards
    archive.record(MaskSet.for_threat(SquarePatch(2), (8, 8), 5))  # the same masks
    archive.record(MaskSet((8, 8), masks.masks, SquarePatch(1)))
    assert archive.forwards == spent


def other_weights() -> nn.Module:
    model = BrighterHalf().eval()
    model.scale.data.fill_(19.0)
    return model


class DarkerHalf(BrighterHalf):
    """The same weights, another architecture."""

    def forward(self, images: Tensor) -> Tensor:
        return -super().forward(images)


@pytest.mark.parametrize(
    "options",
    [
        {"model": other_weights()},
        {"model": DarkerHalf().eval()},
        {"fill": 0.25},
        {"dataset": make_halves().subset(range(1, 20))},
    ],
    ids=["weights", "architecture", "fill", "images"],
)
def test_other_content_is_another_recording(tmp_path: Path, options: dict[str, Any]) -> None:
    make_archive(tmp_path).record(MASKS)
    other = make_archive(tmp_path, **options)
    other.record(MASKS)
    assert other.forwards > 0


def stop_after(count: int, error: BaseException) -> Callable[[RecordingProgress], None]:
    def progress(now: RecordingProgress) -> None:
        if now.done >= count:
            raise error

    return progress


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("shard_seconds", [0.0, 30.0])
def test_a_stopped_recording_keeps_what_is_finished_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, shard_seconds: float
) -> None:
    monkeypatch.setattr(module, "SHARD_SECONDS", shard_seconds)
    whole = make_archive(tmp_path / "whole").record(MASKS)
    stopped = make_archive(tmp_path / "part")
    with pytest.raises(type(error)):
        stopped.record(MASKS, stop_after(6, error))
    assert 0 < stopped.forwards < whole.forwards

    seen: list[RecordingProgress] = []
    rest = make_archive(tmp_path / "part")
    recording = rest.record(MASKS, seen.append)
    assert 6 <= seen[0].done < 20
    assert seen[-1].done == seen[-1].total == 20
    assert rest.forwards == whole.forwards - stopped.forwards
    assert same(recording, whole)
    assert recording.forwards == whole.forwards


def test_a_killed_recording_leaves_no_half_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies while it writes leaves a file under another name, which is removed."""
    monkeypatch.setattr(module, "SHARD_SECONDS", 0.0)
    whole = make_archive(tmp_path / "whole").record(MASKS)
    with pytest.raises(RuntimeError):
        make_archive(tmp_path / "part").record(MASKS, stop_after(6, RuntimeError()))
    (folder,) = (tmp_path / "part").iterdir()
    shard = min(folder.glob("views-*.npz"))
    unfinished = folder / f".{shard.name}-abcdefgh"
    unfinished.write_bytes(shard.read_bytes()[:100])
    assert same(make_archive(tmp_path / "part").record(MASKS), whole)
    assert not unfinished.exists()


def test_images_recorded_by_two_processes_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_archive(tmp_path / "whole").record(MASKS)
    with pytest.raises(RuntimeError):
        make_archive(tmp_path / "part").record(MASKS, stop_after(6, RuntimeError()))
    (folder,) = (tmp_path / "part").iterdir()
    (other,) = (tmp_path / "whole").iterdir()
    (shard,) = other.glob("views-*.npz")
    (folder / shard.name).write_bytes(shard.read_bytes())
    recording = make_archive(tmp_path / "part").record(MASKS)
    assert same(recording, whole)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    make_archive(tmp_path).record(MASKS)
    (shard,) = tmp_path.rglob("views-*.npz")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(RunError, match=rf"{shard.name}: damaged .*delete it and run again"):
        make_archive(tmp_path).record(MASKS)


def test_a_corrupt_image_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        recording = make_archive(tmp_path, dataset=make_halves(broken=frozenset({7}))).record(MASKS)
    assert "halves image 7" in caplog.text
    assert (len(recording), recording.corrupt) == (19, 1)
    assert recording.index.tolist() == [*range(7), *range(8, 20)]


def test_nothing_but_corrupt_images_is_a_failure(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, dataset=make_halves(3, frozenset(range(3))))
    with pytest.raises(RunError, match="expected images that can be read, got none"):
        archive.record(MASKS)


class NotFinite(BrighterHalf):
    """Says NaN of bright images."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3)) > 0.45
        return super().forward(images).masked_fill(bright[:, None], torch.nan)


def test_outputs_that_are_not_finite_have_no_label_and_no_confidence(tmp_path: Path) -> None:
    recording = make_archive(tmp_path, model=NotFinite().eval()).record(MASKS)
    invalid = recording.labels == -1
    assert 0 < int(invalid.sum()) < invalid.numel()
    assert (recording.confidences[invalid] == 0).all()
    assert (recording.confidences[~invalid] >= 0.5).all()
    assert (recording.margins[invalid] == 0).all()


def test_the_batch_size_is_measured_once(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, batch_size=None)
    expected = make_archive(tmp_path / "other").record(MASKS)
    np.testing.assert_array_equal(archive.record(MASKS).labels, expected.labels)
    assert archive.batch_size is not None
    assert f"batches of {archive.batch_size}" in archive.record(MASKS).machines[0]


def without_images(halves: ImageDataset) -> ImageDataset:
    none = torch.empty(0, dtype=torch.int64)
    return replace(halves, labels=none, indices=none)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_images, "expected images in halves test, got none"),
        (lambda halves: replace(halves, labels=halves.labels + 1), "expected 0 to 1, got 2"),
        (lambda halves: halves.subset([1, 1]), "each image once"),
    ],
)
def test_data_that_do_not_fit_are_refused(
    halves: ImageDataset,
    tmp_path: Path,
    change: Callable[[ImageDataset], ImageDataset],
    message: str,
) -> None:
    with pytest.raises(PatchproofError, match=message):
        make_archive(tmp_path / "out", dataset=change(halves))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten()).eval(), r"images of shape \(1, 8, 8\)"),
        (nn.Flatten(0).eval(), r"expected logits of shape \(1, classes >= 2\)"),
        (BrighterHalf().train(), "eval mode"),
    ],
    ids=["channels", "logits", "training"],
)
def test_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, model: nn.Module, message: str
) -> None:
    with pytest.raises(PatchproofError, match=message):
        make_archive(tmp_path, model=model)


def test_masks_for_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchproofError, match=r"images of \(8, 8\) pixels"):
        make_archive(tmp_path).record(MaskSet.for_threat(SquarePatch(2), (9, 9), 3))
