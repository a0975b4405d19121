"""Runs that certify detection: tables and figures of their own, and the whole curve over tau."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from halves import make_defense, make_detector, make_halves

from patchproof import ALERT, PatchproofError
from patchproof.evaluation import (
    DetectionSummary,
    certify,
    certify_dataset,
    read_result,
    summarize,
    trade_off_table,
)

RECOVERY_ONLY = {"certified", "paper_condition"}
DETECTION_ONLY = {
    "certified_detection",
    "unmasked",
    "alert_threshold",
    "certified_above",
    "certified_threshold",
}


def test_the_tables_say_what_the_detector_says(tmp_path: Path) -> None:
    detector, halves = make_detector(tau=0.7), make_halves(40)
    summary = certify_dataset(detector, halves, tmp_path)
    images = torch.stack([halves.image(position) for position in range(len(halves))])
    expected = detector.certify(images, halves.labels)
    result = read_result(tmp_path)
    assert result.kind == "detection"
    assert result.manifest["identity"]["kind"] == "detection"
    assert result.examples["prediction"].tolist() == expected.prediction.tolist()
    assert result.examples["case"].value_counts().to_dict() == summary.cases
    for name in DETECTION_ONLY:
        column = result.examples[name].to_numpy()
        np.testing.assert_allclose(column, getattr(expected, name).numpy(), rtol=1e-6)
    assert isinstance(summary, DetectionSummary)
    alerts = int((expected.prediction == ALERT).sum())
    assert summary.alert_rate.value == alerts / 40
    assert summary.clean_accuracy.value == (expected.prediction == halves.labels).double().mean()
    certified = expected.certified_detection.double().mean()
    assert summary.certified_detection_accuracy.value == certified
    assert 0 < alerts < 40
    assert 0 < certified < summary.clean_accuracy.value < 1
    assert json.loads((tmp_path / "summary.json").read_text()) == summary.to_dict()
    assert summary == result.summary


def test_detection_and_recovery_share_no_column_and_no_figure(tmp_path: Path) -> None:
    names = {}
    for name, defense in (("recovery", make_defense()), ("detection", make_detector())):
        certify_dataset(defense, make_halves(6), tmp_path / name)
        columns = set(pq.read_table(tmp_path / name / "examples-00000.parquet").column_names)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        names[name] = columns | summary.keys()
    only = {"certified_accuracy", "paper_accuracy", "paper", "forwards_per_certified_image"}
    assert names["recovery"] - names["detection"] == RECOVERY_ONLY | only
    only = {"certified_detection_accuracy", "alert_rate"}
    assert names["detection"] - names["recovery"] == DETECTION_ONLY | only


def test_one_run_tells_what_running_at_every_tau_gives(tmp_path: Path) -> None:
    halves = make_halves(40)
    certify_dataset(make_detector(tau=0.5), halves, tmp_path / "once")
    examples = read_result(tmp_path / "once").examples
    curve = trade_off_table(examples)
    taus = [*curve["tau"][::9], 0.55, 0.8, 1.0]
    told = trade_off_table(examples, taus).set_index("tau")
    assert told.index.tolist() == taus
    for place, tau in enumerate(taus):
        summary = certify_dataset(make_detector(tau=tau), halves, tmp_path / str(place), gallery=0)
        assert isinstance(summary, DetectionSummary)
        assert told["clean_accuracy"].iloc[place] == summary.clean_accuracy.value
        assert told["alert_rate"].iloc[place] == summary.alert_rate.value
        assert (
            told["certified_detection_accuracy"].iloc[place]
            == summary.certified_detection_accuracy.value
        )
    assert curve["clean_accuracy"].is_monotonic_increasing
    assert curve["alert_rate"].iloc[-1] == 0


def test_corrupt_images_are_in_no_figure(tmp_path: Path) -> None:
    halves = make_halves(12, frozenset({3}))
    summary = certify_dataset(make_detector(), halves, tmp_path)
    examples = read_result(tmp_path).examples
    assert (summary.count, summary.corrupt) == (11, 1)
    row = examples.set_index("index").loc[3]
    assert (row["status"], row["prediction"], row["certified_detection"]) == ("corrupt", -1, False)
    assert np.isnan(row["alert_threshold"])
    assert isinstance(summary, DetectionSummary)
    assert summary.alert_rate.count == 11
    curve = trade_off_table(examples)
    assert (curve["clean_accuracy"] * 11 % 1 < 1e-9).all()


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "SHARD_IMAGES", 3)
    certify_dataset(make_detector(), make_halves(), tmp_path / "whole")

    def stop(progress: certify.Progress) -> None:
        if progress.done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify_dataset(make_detector(), make_halves(), tmp_path / "run", progress=stop)
    assert 8 <= len(read_result(tmp_path / "run").examples) < 20
    certify_dataset(make_detector(), make_halves(), tmp_path / "run")
    resumed, whole = read_result(tmp_path / "run"), read_result(tmp_path / "whole")
    pd.testing.assert_frame_equal(resumed.examples, whole.examples, rtol=1e-6)


def test_another_tau_and_another_kind_are_other_runs(tmp_path: Path) -> None:
    certify_dataset(make_detector(tau=0.7), make_halves(4), tmp_path)
    with pytest.raises(PatchproofError, match=r"defense\.tau is 0\.7 there and 0\.6 here"):
        certify_dataset(make_detector(tau=0.6), make_halves(4), tmp_path)
    with pytest.raises(PatchproofError, match='kind is "detection" there and "recovery" here'):
        certify_dataset(make_defense(), make_halves(4), tmp_path)


def test_a_run_from_before_there_were_kinds_is_one_of_recovery(tmp_path: Path) -> None:
    certify_dataset(make_defense(), make_halves(4), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["identity"]["kind"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_result(tmp_path).kind == "recovery"
    certify_dataset(make_defense(), make_halves(4), tmp_path)  # the same run


def test_a_kind_of_the_future_is_refused(tmp_path: Path) -> None:
    certify_dataset(make_defense(), make_halves(4), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["identity"]["kind"] = "telepathy"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(PatchproofError, match="probable or attack, got 'telepathy'"):
        read_result(tmp_path)


def test_the_gallery_shows_certified_quiet_and_wrong_images(tmp_path: Path) -> None:
    certify_dataset(make_detector(tau=0.7), make_halves(40), tmp_path, gallery=6)
    result = read_result(tmp_path)
    assert result.gallery is not None
    rows = result.examples.set_index("index").loc[result.gallery.index]
    certified = rows["certified_detection"].to_numpy()
    assert certified.sum() == 2
    assert (rows["prediction"] == ALERT).any()
    assert (result.gallery.vulnerability[certified] == 0).all()


def test_summaries_count_alerts_as_errors() -> None:
    examples = pd.DataFrame(
        {
            "index": [0, 1, 2, 3],
            "label": [1, 1, 1, -1],
            "vanilla": [1, 1, 0, -1],
            "prediction": [1, ALERT, 0, -1],
            "certified_detection": [True, False, False, False],
            "case": ["agreed", "alert", "overruled", "none"],
            "status": ["ok", "ok", "ok", "corrupt"],
        }
    )
    timing = pd.DataFrame({"index": range(4), "forwards": [5, 5, 5, 0], "seconds": [1.0] * 4})
    summary = summarize(examples, timing, kind="detection")
    assert isinstance(summary, DetectionSummary)
    assert summary.clean_accuracy.value == pytest.approx(1 / 3)
    assert summary.alert_rate.value == pytest.approx(1 / 3)
    assert summary.certified_detection_accuracy.value == pytest.approx(1 / 3)
    assert summary.cases == {"agreed": 1, "alert": 1, "overruled": 1}
