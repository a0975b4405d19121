"""The tables of features say what the defenses themselves say, and what a plain loop finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from squares import SIZE, TOLERANCE, Squares, make_squares, make_subject
from torch import Tensor

import patchproof
from patchproof import PatchGuard, PatchproofError, SquarePatch
from patchproof.cli.feature_defenses import FEATURE_DEFENSES
from patchproof.defenses.over_features import Feature
from patchproof.evaluation import feature_analyses as analyses
from patchproof.evaluation.feature_analyses import Aggregator, Subject
from patchproof.evaluation.feature_recording import FeatureArchive
from patchproof.evaluation.local_attack import RandomPlaceAttack
from patchproof.models import SmallResNet
from patchproof.models.ablation import Ablation
from patchproof.threat import MultiplePatches
from patchproof.views import AblatedViews
from patchproof.views.cells import CellViews

PATCHES = [SquarePatch(1), SquarePatch(3)]
COLUMNS = AblatedViews(Ablation("column", 2), SIZE)


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return make_subject(tmp_path)


@pytest.fixture
def bands(tmp_path: Path) -> Subject:
    return make_subject(tmp_path, "bands", views=COLUMNS)


def data() -> tuple[Tensor, Tensor]:
    dataset = make_squares()
    return torch.stack([dataset.image(index) for index in range(24)]), dataset.labels


def guard(threat: SquarePatch, **options: Any) -> PatchGuard:
    return PatchGuard(
        Squares().eval(), threat, image_size=SIZE, **({"tolerance": TOLERANCE} | options)
    )


def check(row: Any, defense: PatchGuard) -> None:
    """Compare the accuracies of a row with those of a defense."""
    images, labels = data()
    made = defense.certify(images, labels)
    assert row["count"] == 24
    assert row["clean"] == pytest.approx(float((made.prediction == labels).float().mean()))
    assert row["certified"] == pytest.approx(float(made.certified.float().mean()))
    assert row["paper"] == pytest.approx(float(made.paper_condition.float().mean()))
    assert row["vanilla"] == pytest.approx(19 / 24)
    assert row["window"] == "x".join(map(str, defense.window))
    assert row["certified_low"] <= row["certified"] <= row["certified_high"]


def rows(table: pd.DataFrame) -> list[dict[Any, Any]]:
    return table.to_dict("records")


def test_robustness_is_that_of_the_defense(subject: Subject, bands: Subject) -> None:
    pairs, refusals = analyses.possible([subject, bands], PATCHES)
    assert not refusals
    made = rows(analyses.robustness(pairs))
    assert [(row["model"], row["patch_side"]) for row in made] == [
        ("squares", 1),
        ("squares", 3),
        ("bands", 1),
        ("bands", 3),
    ]
    assert made[0]["recipe"] == "plain"
    assert (made[0]["receptive_field"], made[0]["stride"]) == ("2x2", "2")
    assert made[2]["receptive_field"] == "10x2"
    for row, threat in zip(made[:2], PATCHES, strict=True):
        check(row, guard(threat))
    for row, threat in zip(made[2:], PATCHES, strict=True):
        check(row, guard(threat, ablation=COLUMNS.ablation))
    assert 0 < made[1]["certified"] < made[0]["certified"]


def test_patches_too_large_for_windows_are_left_out_with_the_reason(subject: Subject) -> None:
    pairs, refusals = analyses.possible([subject], [SquarePatch(3), SquarePatch(10)])
    assert [threat.label() for _, threat in pairs] == ["3x3 square"]
    assert len(refusals) == 1
    assert refusals[0].startswith("squares, 10x10 square: windows: expected less than")
    with pytest.raises(PatchproofError, match="windows: expected less than"):
        analyses.possible([subject], [SquarePatch(10)])
    with pytest.raises(PatchproofError, match="expected one patch"):
        analyses.possible([subject], [MultiplePatches(2, SquarePatch(1))])


def test_thresholds_are_those_of_the_defense(subject: Subject) -> None:
    values = [0.0, 0.3, 0.6, 1.0]
    made = rows(analyses.thresholds([(subject, PATCHES[0])], values))
    for row, value in zip(made, values, strict=True):
        assert row["threshold"] == value
        check(row, guard(PATCHES[0], threshold=value))
    detected = [row["false_positives"] for row in made]
    assert detected[0] == 1.0
    assert detected == sorted(detected, reverse=True)
    assert detected[-1] == 0.0


def test_a_false_positive_is_a_window_of_the_returned_class(subject: Subject) -> None:
    (row,) = rows(analyses.thresholds([(subject, PATCHES[0])], [0.1]))
    images, _ = data()
    with torch.no_grad():
        evidence = Squares().local_logits(images).clamp(min=0)
    found = []
    for image in evidence:
        windows = torch.stack([image[:, r, c] for r in range(5) for c in range(5)])
        total, most = image.sum((1, 2)), windows.amax(0)
        masked = torch.where(most > 0.1 * total, total - most, total)
        label = int(masked.argmax())
        found.append(bool(most[label] > 0.1 * total[label]))
    assert guard(PATCHES[0]).window == (1, 1)
    assert row["false_positives"] == pytest.approx(np.mean(found))
    assert 0 < row["false_positives"] < 1


@pytest.mark.parametrize("which", ["squares", "bands"])
@pytest.mark.parametrize("name", get_args(Aggregator))
def test_aggregations_are_those_of_the_defenses(
    subject: Subject, bands: Subject, name: Aggregator, which: str
) -> None:
    chosen, ablation = (subject, None) if which == "squares" else (bands, COLUMNS.ablation)
    (row,) = rows(analyses.aggregations([chosen], [PATCHES[1]], [name]))
    named = FEATURE_DEFENSES[name]
    options: dict[str, Any] = {"image_size": SIZE, "tolerance": TOLERANCE, "ablation": ablation}
    defense = getattr(patchproof, named.type)(
        Squares().eval(), PATCHES[1], **options, **named.fixed
    )
    images, labels = data()
    made = defense.certify(images, labels)
    assert row["defense"] == name
    assert row["clean"] == pytest.approx(float((made.prediction == labels).float().mean()))
    assert row["certified"] == pytest.approx(float(made.certified.float().mean()))
    if defense.paper is None:
        assert "paper" not in row
    else:
        assert row["paper"] == pytest.approx(float(made.paper_condition.float().mean()))


def test_several_patches_need_an_aggregation_without_windows(subject: Subject) -> None:
    two = MultiplePatches(2, SquarePatch(1))
    (row,) = rows(analyses.aggregations([subject], [two], ["bagcert"]))
    (one,) = rows(analyses.aggregations([subject], [SquarePatch(1)], ["bagcert"]))
    assert row["certified"] <= one["certified"]
    with pytest.raises(PatchproofError, match="expected one patch"):
        analyses.aggregations([subject], [two], ["patchguard"])


@pytest.mark.parametrize("feature", ["logits", "confidence", "prediction"])
def test_feature_types_are_those_of_the_defense(subject: Subject, feature: Feature) -> None:
    (row,) = rows(analyses.feature_types([(subject, PATCHES[1])], [feature]))
    assert row["feature"] == feature
    check(row, guard(PATCHES[1], feature=feature))


def test_overlarge_masks_are_those_of_the_defense(subject: Subject) -> None:
    made = rows(analyses.overlarge_masks([subject], [1, 3], [1, 3, 5]))
    assert [(row["mask_side"], row["patch_side"]) for row in made] == [
        (1, 1),
        (3, 1),
        (3, 3),
        (5, 1),
        (5, 3),
    ]
    for row in made:
        patch = SquarePatch(row["patch_side"])
        check(row, guard(patch, mask_for=SquarePatch(row["mask_side"])))
    with pytest.raises(PatchproofError, match="at least the 3 pixels"):
        analyses.overlarge_masks([subject], [3], [1, 2])


def test_the_best_classes_are_those_of_the_defense(subject: Subject) -> None:
    images, labels = data()
    made = rows(analyses.top_classes([(subject, PATCHES[1])], [1, 2, 3]))
    for row in made:
        top = guard(PATCHES[1]).certify_top(images, labels, row["k"])
        assert row["clean"] == pytest.approx(float(top.right.float().mean()))
        assert row["certified"] == pytest.approx(float(top.certified.float().mean()))
        assert "paper" not in row
    assert made[2]["certified"] == made[2]["vanilla"] == 1.0  # of three classes


def test_clipping_is_of_the_undefended_model(subject: Subject) -> None:
    bounds = [(-np.inf, np.inf), (0.0, np.inf), (0.0, 5.0)]
    made = rows(analyses.clipping([subject], bounds))
    images, labels = data()
    for row, (low, high) in zip(made, bounds, strict=True):
        with torch.no_grad():
            logits = Squares().local_logits(images).clamp(low, high)
        right = logits.sum((2, 3)).argmax(1) == labels
        assert row["vanilla"] == pytest.approx(float(right.float().mean()))
        assert (row["clipped_below"], row["clipped_above"]) == (low, high)
    assert made[0]["vanilla"] == pytest.approx(19 / 24)
    with pytest.raises(PatchproofError, match="low < high"):
        analyses.clipping([subject], [(5.0, 0.0)])


@pytest.mark.parametrize("side", [0, 1, 2, 4])
def test_masked_windows_are_what_a_plain_loop_finds(subject: Subject, side: int) -> None:
    (row,) = rows(analyses.masked_windows([subject], [side]))
    images, labels = data()
    with torch.no_grad():
        logits = Squares().local_logits(images)
    whole = logits.sum((2, 3)).argmax(1)
    right, changed = [], []
    places = range(6 - side) if side else range(1)
    for top in places:
        for left in places:
            masked = logits.clone()
            masked[:, :, top : top + side, left : left + side] = 0
            label = masked.sum((2, 3)).argmax(1)
            right.append(label == labels)
            changed.append(label != whole)
    assert row["masked_accuracy"] == pytest.approx(float(torch.stack(right).float().mean()))
    wrong = (~torch.stack(right)).any(0)
    assert row["images_wrong"] == pytest.approx(float(wrong.float().mean()))
    assert row["windows_changed"] == pytest.approx(float(torch.stack(changed).float().mean()))
    assert row["windows"] == (len(places) ** 2 if side else 0)
    assert row["windows_changed"] > 0 or side < 2


def test_windows_of_bands_are_as_long_as_the_band(bands: Subject) -> None:
    (row,) = rows(analyses.masked_windows([bands], [3]))
    assert (row["window"], row["windows"]) == ("1x3", 10)  # they wrap around


def test_windows_that_leave_nothing_are_refused(subject: Subject, bands: Subject) -> None:
    with pytest.raises(PatchproofError, match="less than the 5x5 views of squares, got 5"):
        analyses.check_windows(subject, [5])
    with pytest.raises(PatchproofError, match="less than the 1x10 views of bands, got 10"):
        analyses.masked_windows([bands], [10])


def test_an_attack_shows_in_the_logits_of_the_malicious_class(subject: Subject) -> None:
    attack = RandomPlaceAttack(SquarePatch(3), steps=20)
    made = analyses.attacked_logits([subject], attack, bins=12)
    histogram = made.histogram
    sums = histogram.groupby(["image", "evidence"])["features"].sum()
    assert len(histogram) == 12 * 4
    assert (sums == 24 * 25).all()
    clean, attacked = rows(made.summary)
    assert (clean["image"], attacked["image"]) == ("clean", "attacked")
    assert clean["vanilla"] == pytest.approx(19 / 24)
    assert attacked["vanilla"] < clean["vanilla"]
    assert attacked["clean"] > attacked["vanilla"]  # masking sees through it
    assert attacked["largest_malicious"] > clean["largest_malicious"]
    assert attacked["wrong_features"] > clean["wrong_features"]
    highest = histogram[histogram["features"] > 0]["bin_high"].max()
    assert highest == pytest.approx(attacked["largest_malicious"])


def test_wrong_local_predictions_are_counted_beside_wrong_global_ones(subject: Subject) -> None:
    attack = RandomPlaceAttack(SquarePatch(3), steps=20)
    made = analyses.attacked_logits([subject], attack, bins=2)
    clean, attacked = rows(made.summary)
    (row,) = rows(made.wrong)
    assert (row["receptive_field"], row["features"], row["count"]) == ("2x2", 25, 24)
    assert row["wrong_attacked"] == attacked["wrong_features"]
    assert row["wrong_original"] == clean["wrong_features"]
    assert row["wrong_more"] == pytest.approx(row["wrong_attacked"] - row["wrong_original"])
    assert row["wrong_global"] == pytest.approx(1 - attacked["vanilla"])
    assert row["wrong_global_low"] < row["wrong_global"] < row["wrong_global_high"]
    assert row["wrong_global_original"] == pytest.approx(5 / 24)


def test_a_network_that_sees_everything_has_no_masking(subject: Subject, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = SmallResNet(3, 1, (4, 4)).eval()
    dataset = make_squares()
    views = CellViews(network, SIZE, 1)
    archive = FeatureArchive(tmp_path / "large", network, dataset, views)
    large = Subject("large", views, lambda attack: archive.record(attack=attack), SIZE, TOLERANCE)
    made = analyses.attacked_logits([large, subject], RandomPlaceAttack(PATCHES[1], 2), bins=3)
    assert made.summary["clean"].isna().tolist() == [True, True, False, False]
    assert made.wrong["features"].tolist() == [25, 25]
    images, labels = data()
    with torch.inference_mode():
        wrong = network.cell_logits(images).argmax(1) != labels[:, None, None]
    assert made.wrong["wrong_original"][0] == pytest.approx(float(wrong.float().mean()))
    with pytest.raises(PatchproofError, match="features that each see a small part"):
        analyses.robustness([(large, PATCHES[0])])


def test_what_is_impossible_is_refused_before_anything_is_recorded(tmp_path: Path) -> None:
    subject = make_subject(tmp_path / "none")
    with pytest.raises(PatchproofError):
        analyses.robustness([(subject, SquarePatch(10))])
    with pytest.raises(PatchproofError):
        analyses.thresholds([(subject, PATCHES[0])], [1.5])
    with pytest.raises(PatchproofError):
        analyses.masked_windows([subject], [2, 9])
    assert not (tmp_path / "none").exists()
