"""A recording of features holds all scores, is made once, and goes on after any stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from squares import SIZE, Squares, make_archive, make_squares
from torch import Tensor, nn

from patchproof import PatchproofError, RunError, SquarePatch
from patchproof.evaluation import feature_recording as module
from patchproof.evaluation import recording as shards
from patchproof.evaluation.feature_recording import FeatureRecording, Part
from patchproof.evaluation.local_attack import RandomPlaceAttack
from patchproof.evaluation.recording import RecordingProgress
from patchproof.models.ablation import Ablation
from patchproof.threat import MultiplePatches
from patchproof.views import AblatedViews

ATTACK = RandomPlaceAttack(SquarePatch(3), steps=3)


def whole(recording: FeatureRecording) -> Part:
    """Return all parts as one."""
    parts = list(recording.parts())
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS]
    return Part(*joined, module.Outputs.concatenate([part.outputs for part in parts]))


_TENSORS = ("index", "right", "whole")


def same(one: FeatureRecording, other: FeatureRecording) -> bool:
    ours, theirs = whole(one), whole(other)
    scores = ours.outputs.scores, theirs.outputs.scores
    return torch.equal(*scores) and all(
        torch.equal(getattr(ours, name), getattr(theirs, name)) for name in _TENSORS
    )


def test_a_recording_is_what_the_model_says_of_image_and_views(tmp_path: Path) -> None:
    dataset, model = make_squares(), Squares().eval()
    recording = make_archive(tmp_path).record()
    images = torch.stack([dataset.image(position) for position in range(len(dataset))])
    made = whole(recording)
    with torch.no_grad():
        torch.testing.assert_close(made.whole, model(images))
        scores = model.local_logits(images).flatten(2).transpose(1, 2)
    assert made.outputs.scores is not None
    torch.testing.assert_close(made.outputs.scores, scores)
    assert torch.equal(made.outputs.labels, scores.argmax(2))
    assert made.outputs.known.all()
    assert torch.equal(made.right, dataset.labels)
    assert made.vanilla.sum() == 19
    assert recording.forwards == 2 * 24


def test_ablations_are_recorded_view_by_view(tmp_path: Path) -> None:
    views = AblatedViews(Ablation("column", 4), SIZE, fill=0.25)
    dataset, model = make_squares(3), Squares().eval()
    recording = make_archive(tmp_path, views=views, dataset=dataset).record()
    scores = whole(recording).outputs.scores
    assert scores is not None
    for column in range(10):
        kept = [(column + step) % 10 for step in range(4)]
        shown = torch.full((3, 1, *SIZE), 0.25)
        for position in range(3):
            shown[position, :, :, kept] = dataset.image(position)[:, :, kept]
        with torch.no_grad():
            torch.testing.assert_close(scores[:, column], model(shown))
    assert recording.forwards == 3 * 11


def test_parts_are_small_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_archive(tmp_path).record()
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 5 * 25 * 3)
    parts = list(make_archive(tmp_path).record().parts())
    assert [len(part.right) for part in parts] == [5, 5, 5, 5, 4]
    assert torch.equal(torch.cat([part.index for part in parts]), torch.arange(24))
    assert same(make_archive(tmp_path).record(), expected)


def test_a_second_recording_costs_nothing(tmp_path: Path) -> None:
    first = make_archive(tmp_path)
    recording = first.record()
    second = make_archive(tmp_path)
    assert same(second.record(), recording)
    assert (first.forwards, second.forwards) == (48, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"model": Squares(1).eval()},
        {"dataset": make_squares().subset(range(20))},
        {"views": AblatedViews(Ablation("column", 3), SIZE)},
        {"views": AblatedViews(Ablation("column", 4), SIZE, fill=0.25)},
    ],
    ids=["weights", "images", "ablation", "fill"],
)
def test_other_content_is_another_recording(tmp_path: Path, options: dict[str, Any]) -> None:
    make_archive(tmp_path).record()
    make_archive(tmp_path, views=AblatedViews(Ablation("column", 4), SIZE)).record()
    other = make_archive(tmp_path, **options)
    other.record()
    assert other.forwards > 0


def stop_after(count: int, error: BaseException) -> Callable[[RecordingProgress], None]:
    def progress(now: RecordingProgress) -> None:
        if now.done >= count:
            raise error

    return progress


@pytest.mark.parametrize("attack", [None, ATTACK], ids=["clean", "attacked"])
def test_a_stopped_recording_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: RandomPlaceAttack | None
) -> None:
    monkeypatch.setattr(shards, "SHARD_SECONDS", 0.0)
    monkeypatch.setattr(shards, "_BLOCK_BATCHES", 2)
    complete = make_archive(tmp_path / "whole").record(attack=attack)
    stopped = make_archive(tmp_path / "part")
    with pytest.raises(KeyboardInterrupt):
        stopped.record(stop_after(6, KeyboardInterrupt()), attack)
    rest = make_archive(tmp_path / "part")
    recording = rest.record(attack=attack)
    assert 0 < rest.forwards < 48
    assert rest.forwards == 48 - stopped.forwards
    assert same(recording, complete)


def test_a_shard_is_written_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1)
    monkeypatch.setattr(shards, "_BLOCK_BATCHES", 2)
    make_archive(tmp_path).record()
    assert len(list(tmp_path.rglob("views-*.npz"))) == 6


def test_a_corrupt_image_is_left_out(tmp_path: Path) -> None:
    recording = make_archive(tmp_path, dataset=make_squares(broken=frozenset({7}))).record()
    assert (len(recording), recording.corrupt) == (23, 1)
    assert whole(recording).index.tolist() == [*range(7), *range(8, 24)]


def test_nothing_but_corrupt_images_is_a_failure(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, dataset=make_squares(3, broken=frozenset(range(3))))
    with pytest.raises(RunError, match="expected images that can be read, got none"):
        archive.record()


class NotFinite(Squares):
    """Says NaN of bright images."""

    def forward(self, images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3)) > 0.5
        return super().forward(images).masked_fill(bright[:, None], torch.nan)


def test_an_output_that_is_not_finite_is_wrong(tmp_path: Path) -> None:
    made = whole(make_archive(tmp_path, model=NotFinite().eval()).record())
    invalid = made.whole.isnan().any(1)
    assert invalid.any()
    assert not made.vanilla[invalid].any()


def attacked(model: nn.Module, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    dataset = make_squares()
    images = torch.stack([dataset.image(index) for index in indices])
    labels = dataset.labels[indices]
    return images, labels, ATTACK(model, images, labels, torch.tensor(indices))


def test_the_attack_changes_one_patch_of_each_image_and_raises_the_loss() -> None:
    model = Squares().eval()
    images, labels, changed = attacked(model, list(range(24)))
    assert changed.aminmax().min >= 0
    assert changed.aminmax().max <= 1
    places = set()
    for before, after in zip(images, changed, strict=True):
        rows, columns = (before != after)[0].nonzero().unbind(1)
        assert int(rows.max() - rows.min()) <= 2
        assert int(columns.max() - columns.min()) <= 2
        places.add((int(rows.min()), int(columns.min())))
    assert len(places) > 10
    loss = nn.functional.cross_entropy
    assert loss(model(changed), labels) > loss(model(images), labels)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_attack_on_an_image_does_not_depend_on_the_others() -> None:
    model = Squares().eval()
    _, _, together = attacked(model, [3, 4, 5])
    torch.testing.assert_close(attacked(model, [4])[2], together[1:2])


def test_other_seeds_are_other_places() -> None:
    model, dataset = Squares().eval(), make_squares(8)
    images = torch.stack([dataset.image(index) for index in range(8)])
    one, other = (
        RandomPlaceAttack(SquarePatch(3), 1, seed=seed)(
            model, images, dataset.labels, torch.arange(8)
        )
        for seed in (0, 1)
    )
    assert not torch.equal(one != images, other != images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"seed": -1}, "seed: expected"),
        ({"step_size": 0.0}, r"a size in \(0, 1\]"),
        ({"threat": MultiplePatches(2, SquarePatch(2))}, "expected one patch"),
    ],
)
def test_attacks_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchproofError, match=message):
        RandomPlaceAttack(**({"threat": SquarePatch(2)} | options))
