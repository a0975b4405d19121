"""The analyses say what the defense itself says, from recordings and without a model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from patchproof import MaskSet, PatchCleanser, PatchproofError, SquarePatch
from patchproof.datasets import ImageDataset
from patchproof.datasets.images import ArrayPictures
from patchproof.evaluation import analyses
from patchproof.evaluation.analyses import Setup, Study
from patchproof.evaluation.recording import Archive, Recording
from patchproof.evaluation.replay import BATCH_SIZE, RecordedViews, Replay
from patchproof.views import MaskPairViews

SIZE = (8, 8)
FILL = 0.5
TOLERANCE = 1e-3


class Random(nn.Module):
    """A network with random weights, whose labels change under some masks and stay under others.

    ``coarse`` rounds its scores, so that the highest two are often equal; ``broken`` makes them NaN
    for some views.
    """

    def __init__(self, coarse: bool = False, broken: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.Parameter(torch.randn(64, 4, generator=generator))
        self.coarse, self.broken = coarse, broken
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        scores = (images.flatten(1) - FILL) @ self.weights
        if self.broken:
            scores = scores.masked_fill((images.mean((1, 2, 3)) > 0.53)[:, None], torch.nan)
        return scores.round() if self.coarse else scores


def make_images(model: Random, count: int = 16) -> ImageDataset:
    """Return noise with traces of a class, from none (the first) to plain (the last)."""
    random = np.random.default_rng(1)
    labels = random.integers(0, 4, count)
    traces = model.weights.detach().T[labels].reshape(count, *SIZE).numpy()
    strength = np.linspace(0, 40, count)[:, None, None]
    pixels = 128 + random.normal(0, 40, (count, *SIZE)) + strength * traces
    return ImageDataset(
        name="random",
        split="test",
        class_names=tuple("abcd"),
        image_size=SIZE,
        channels=1,
        labels=torch.from_numpy(labels),
        indices=torch.arange(count),
        pictures=ArrayPictures(pixels.clip(0, 255).astype(np.uint8), "random"),
    )


def make_archive(folder: Path, model: Random) -> Archive:
    return Archive(folder, model, make_images(model), fill=FILL, batch_size=64)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return make_archive(tmp_path, Random())


@pytest.fixture
def study(archive: Archive) -> Study:
    return Study(archive.record, SIZE, FILL, TOLERANCE)


def images_of(archive: Archive) -> Tensor:
    return torch.stack([archive.dataset.image(number) for number in range(len(archive.dataset))])


def make_defense(archive: Archive, mask_set: MaskSet, **options: Any) -> PatchCleanser:
    settings = {"image_size": SIZE, "fill": FILL, "tolerance": TOLERANCE, "batch_size": BATCH_SIZE}
    threat = options.pop("threat", mask_set.threat)
    return PatchCleanser(archive.model, threat, mask_set=mask_set, **(settings | options))


@pytest.mark.filterwarnings("ignore:the model's output is not finite")
@pytest.mark.parametrize("inference", ["double", "challenger"])
@pytest.mark.parametrize("setup", [Setup((4, 2)), Setup((4, 4), (2, 1), "balanced")])
@pytest.mark.parametrize("model", [Random(), Random(coarse=True), Random(broken=True)])
def test_a_replay_is_what_the_defense_does(
    tmp_path: Path, model: Random, setup: Setup, inference: Any
) -> None:
    archive = make_archive(tmp_path, model)
    mask_set = setup.mask_set(SquarePatch(2), SIZE)
    defense = make_defense(archive, mask_set, inference=inference)
    recorded = RecordedViews(archive.record(mask_set), MaskPairViews(mask_set, FILL))
    replay = Replay(recorded, SquarePatch(2), inference, TOLERANCE)

    prediction, expected = replay.infer(), defense.infer(images_of(archive))
    assert torch.equal(prediction.label, expected.label)
    assert torch.equal(prediction.case, expected.case)
    assert torch.equal(prediction.forwards, expected.forwards)
    assert expected.forwards.unique().numel() > 1

    certified, paper = replay.certify(prediction.label)
    certification = defense.certify(images_of(archive), archive.dataset.labels)
    assert torch.equal(certified, certification.certified)
    assert torch.equal(paper, certification.paper_condition)
    assert model.broken or 0 < int(certified.sum()) < len(certified)


def test_large_recordings_are_certified_in_parts(
    archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask_set = Setup((3, 3)).mask_set(SquarePatch(2), SIZE)
    recorded = RecordedViews(archive.record(mask_set), MaskPairViews(mask_set, FILL))
    replay = Replay(recorded, SquarePatch(2), "double", TOLERANCE)
    labels = replay.infer().label
    whole = replay.certify(labels)
    monkeypatch.setattr("patchproof.evaluation.recording._VALUES_AT_ONCE", 1)
    for part, all_at_once in zip(replay.certify(labels), whole, strict=True):
        assert torch.equal(part, all_at_once)


def share(hits: Tensor) -> float:
    return float(hits.double().mean())


def check_row(row: pd.Series[Any], archive: Archive, mask_set: MaskSet, inference: Any) -> None:
    """Check a row of a table against the defense."""
    defense = make_defense(archive, mask_set, inference=inference)
    images, labels = images_of(archive), archive.dataset.labels
    prediction, certification = defense.infer(images), defense.certify(images, labels)
    with torch.no_grad():
        vanilla = archive.model(images).argmax(1)
    assert row["count"] == len(images)
    assert row["vanilla"] == pytest.approx(share(vanilla == labels))
    assert row["clean"] == pytest.approx(share(prediction.label == labels))
    assert row["certified"] == pytest.approx(share(certification.certified))
    assert row["paper"] == pytest.approx(share(certification.paper_condition))
    assert row["forwards"] == pytest.approx(share(prediction.forwards))
    assert row["forwards_most"] == int(prediction.forwards.amax())
    for name in ("vanilla", "clean", "certified", "paper"):
        assert 0 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= 1
    assert row["masks"] == len(mask_set)


SETUPS = [Setup((2, 2)), Setup((3, 3)), Setup((4, 4), (2, 2))]


def test_budgets(archive: Archive, study: Study) -> None:
    table = analyses.budget(study, SquarePatch(2), SETUPS)
    assert table["masks_per_side"].tolist() == ["2", "2", "3", "3", "4", "4"]
    assert table["multiplicity"].tolist() == ["1", "1", "1", "1", "2", "2"]
    assert table["inference"].tolist() == ["double", "challenger"] * 3
    for number, row in table.iterrows():
        setup = SETUPS[int(number) // 2]
        check_row(row, archive, setup.mask_set(SquarePatch(2), SIZE), row["inference"])
    for (_, row), (_, other) in itertools.product(table.iterrows(), table.iterrows()):
        beaten = other["certified"] >= row["certified"] and other["forwards"] < row["forwards"]
        beaten |= other["certified"] > row["certified"] and other["forwards"] <= row["forwards"]
        assert not (beaten and row["efficient"])
    assert table["efficient"].any()


def test_the_time_of_an_image_is_that_of_its_forwards(archive: Archive) -> None:
    recordings: list[Recording] = []

    def slow(mask_set: MaskSet) -> Recording:
        recording = archive.record(mask_set)
        object.__setattr__(recording, "seconds", 0.002 * recording.forwards)
        recordings.append(recording)
        return recording

    table = analyses.budget(Study(slow, SIZE, FILL, TOLERANCE), SquarePatch(2), SETUPS)
    assert len(recordings) == len(SETUPS)
    np.testing.assert_allclose(table["milliseconds"], 2 * table["forwards"])


def test_inference_algorithms(archive: Archive, study: Study) -> None:
    table = analyses.inference(study, SquarePatch(2), SETUPS)
    for number, setup in enumerate(SETUPS):
        rows = table.iloc[2 * number : 2 * number + 2]
        mask_set = setup.mask_set(SquarePatch(2), SIZE)
        labels = [
            make_defense(archive, mask_set, inference=name).predict(images_of(archive))
            for name in ("double", "challenger")
        ]
        assert rows["agreement"].tolist() == pytest.approx([share(labels[0] == labels[1])] * 2)
    assert (table["agreement"] < 1).any()


def test_sizes_up_to_the_whole_image(archive: Archive, study: Study) -> None:
    sides = [1, 2, 4, 8]
    table = analyses.sizes(study, sides, Setup((3, 3)))
    assert table["patch"].tolist() == sides
    assert table["patch_share"].tolist() == [1 / 64, 4 / 64, 16 / 64, 1.0]
    for side, (_, row) in zip(sides, table.iterrows(), strict=True):
        check_row(row, archive, MaskSet.for_threat(SquarePatch(side), SIZE, 3), "double")
    assert table["mask_pixels"].iloc[-1] == 64
    assert table["masks"].iloc[-1] == 1


def test_overestimates(archive: Archive, study: Study) -> None:
    estimates = [2, 4, 5]
    table = analyses.overestimate(study, 2, estimates, Setup((4, 4)), "challenger")
    assert table["area_ratio"].tolist() == [1.0, 4.0, 6.25]
    images, labels = images_of(archive), archive.dataset.labels
    for estimate, (_, row) in zip(estimates, table.iterrows(), strict=True):
        mask_set = MaskSet.for_threat(SquarePatch(estimate), SIZE, 4)
        actual, estimated = (
            make_defense(archive, mask_set, threat=SquarePatch(side), inference="challenger")
            for side in (2, estimate)
        )
        assert row["certified"] == pytest.approx(share(actual.certify(images, labels).certified))
        assert row["certified_estimate"] == pytest.approx(
            share(estimated.certify(images, labels).certified)
        )
        assert row["certified"] >= row["certified_estimate"]
    assert table["certified"].iloc[0] == table["certified_estimate"].iloc[0]


@pytest.mark.parametrize("algorithm", ["double", "challenger"])
def test_a_smaller_patch_may_be_certified_where_the_estimate_is_not(algorithm: Any) -> None:
    """By hand: 6x6 masks that start in rows and columns 0, 1 and 2 of 8.

    A 6x6 patch in the middle is hidden by the middle mask alone, whose row has an error. Every 2x2
    patch is also hidden by a mask in a corner, whose row has none.
    """
    mask_set = MaskSet.for_threat(SquarePatch(6), SIZE, 3)
    views = MaskPairViews(mask_set, FILL)
    labels = torch.zeros(1, 1 + views.count, dtype=torch.int16)
    labels[0, 1 + views.pair_to_view[4, 1]] = 1
    recording = Recording(
        index=torch.tensor([0]),
        right=torch.tensor([0]),
        labels=labels,
        margins=torch.ones(labels.shape),
        confidences=torch.ones(labels.shape),
        classes=2,
        corrupt=0,
        forwards=labels.numel(),
        seconds=1.0,
        machines=("abacus",),
    )
    study = Study(lambda _: recording, SIZE, FILL, TOLERANCE)
    (row,) = analyses.overestimate(study, 2, [6], Setup((3, 3)), algorithm).to_dict("records")
    assert (row["certified"], row["certified_estimate"], row["paper"]) == (1.0, 0.0, 0.0)


def test_analyses_with_the_same_masks_share_their_recordings(
    archive: Archive, study: Study
) -> None:
    analyses.sizes(study, [2, 3, 4], Setup((4, 4)))
    spent = archive.forwards
    analyses.overestimate(study, 2, [2, 3, 4], Setup((4, 4)))
    analyses.budget(study, SquarePatch(2), [Setup((4, 4))])
    assert archive.forwards == spent


def test_an_estimate_below_the_patch_is_refused(study: Study) -> None:
    with pytest.raises(PatchproofError, match="at least the 3 pixels of the patch's side, got 2"):
        analyses.overestimate(study, 3, [4, 2], Setup((3, 3)))


def boxes(*rows: tuple[int, ...]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(analyses.BOX_COLUMNS))


def test_the_size_of_objects_is_the_union_of_their_boxes() -> None:
    table = boxes((3, 0, 0, 4, 5), (3, 2, 3, 4, 4), (7, 9, 9, 1, 1))
    pixels = analyses.object_pixels(table, (10, 10))
    # 20 + 16 pixels, less the 2x2 that both have
    assert pixels.to_dict() == {3: 32, 7: 1}


EXAMPLES = pd.DataFrame(
    {
        "index": [10, 11, 12, 13, 14],
        "label": [0, 1, 0, 1, 2],
        "prediction": [0, 1, 1, 1, 2],
        "certified": [True, False, False, True, True],
    }
)


def test_object_sizes_by_hand() -> None:
    """Shares 5%, 10%, 11%, 100% of 100 pixels; image 14 has no box, box 99 no image."""
    pixels = pd.Series({10: 5, 11: 10, 12: 11, 13: 100, 99: 50})
    table = analyses.by_object_size(EXAMPLES, pixels, (10, 10), bins=10)
    assert table["size_low"].tolist() == pytest.approx([0.0, 0.1, 0.9])
    assert table["size_high"].tolist() == pytest.approx([0.1, 0.2, 1.0])
    assert table["count"].tolist() == [2, 1, 1]
    assert table["certified"].tolist() == [0.5, 0.0, 1.0]
    assert table["clean"].tolist() == [1.0, 0.0, 1.0]
    # Wilson: 1 of 2 lies in (1 +- 1.96 sqrt(1 / (2 + 1.96^2))) / 2
    half = 1.96 / (2 + 1.96**2) ** 0.5 / 2
    assert table["certified_low"].iloc[0] == pytest.approx(0.5 - half, abs=1e-4)
    assert table["certified_high"].iloc[0] == pytest.approx(0.5 + half, abs=1e-4)


def test_classes_by_hand() -> None:
    pixels = pd.Series({10: 5, 11: 10, 12: 11})
    table = analyses.by_class(EXAMPLES, "xyz".__getitem__, pixels, (10, 10))
    assert table["label"].tolist() == [2, 0, 1]
    assert table["name"].tolist() == ["z", "x", "y"]
    assert table["count"].tolist() == [1, 2, 2]
    assert table["certified"].tolist() == [1.0, 0.5, 0.5]
    assert table["objects"].tolist() == [0, 2, 1]
    assert table["object_share"].tolist() == pytest.approx([np.nan, 0.08, 0.1], nan_ok=True)


def test_certified_detection_keeps_its_name() -> None:
    detected = EXAMPLES.rename(columns={"certified": "certified_detection"})
    table = analyses.by_class(detected, str, None, (10, 10))
    assert "certified" not in table.columns
    assert table["certified_detection"].tolist() == [1.0, 0.5, 0.5]
    assert "object_share" not in table.columns


def test_boxes_of_other_images_are_refused() -> None:
    with pytest.raises(PatchproofError, match="boxes of images of the run, got none of its 5"):
        analyses.by_object_size(EXAMPLES, pd.Series({99: 50}), (10, 10), bins=10)


HEADER = "index,top,left,height,width\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,top,left,height\n1,0,0,3\n", "expected the columns .* got none named width"),
        ("", "expected a CSV file of boxes"),
        (HEADER, "expected boxes, got no rows"),
        (f"{HEADER}1,0,0,3,4\n2,0,0,8,3\n3,6,0,3,3\n", "inside the 8x8 image, got .* in line 4"),
        (f"{HEADER}1,0,6,3,3\n", "inside the 8x8 image"),
        (f"{HEADER}1,-1,0,3,3\n", "inside the 8x8 image"),
        (f"{HEADER}1,0,0,0,3\n", "inside the 8x8 image"),
        (f"{HEADER}-1,0,0,3,3\n", "an index from 0"),
        (f"{HEADER}1,0.5,0,3,3\n", "expected whole numbers, got .*top 0.5"),
        (f"{HEADER}cat,0,0,3,3\n", "expected whole numbers, got index cat"),
        (f"{HEADER}1,0,0,,3\n", "expected whole numbers"),
    ],
)
def test_boxes_that_cannot_be_used_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "boxes.csv").write_text(text)
    with pytest.raises(PatchproofError, match=message):
        analyses.read_boxes(tmp_path / "boxes.csv", SIZE)


def test_boxes_are_read(tmp_path: Path) -> None:
    (tmp_path / "boxes.csv").write_text("width,name,index,top,left,height\n4,dog,7,1,2,3\n")
    table = analyses.read_boxes(tmp_path / "boxes.csv", SIZE)
    assert table.to_dict("records") == [{"index": 7, "top": 1, "left": 2, "height": 3, "width": 4}]
    with pytest.raises(PatchproofError, match=r"nowhere\.csv"):
        analyses.read_boxes(tmp_path / "nowhere.csv", SIZE)
