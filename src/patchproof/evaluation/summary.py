"""What a run amounts to: accuracies with Wilson intervals, cases, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from scipy.stats import binomtest

from patchproof.detection import Thresholds
from patchproof.errors import RunError
from patchproof.results import ALERT, Kind, Paper


@dataclass(frozen=True)
class Proportion:
    """A share of images with its 95% Wilson interval.

    Attributes:
        value: hits / count.
        low: lower end of the interval.
        high: upper end of the interval.
        count: how many images it is a share of.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, hits: int, count: int) -> Proportion:
        """Return ``hits`` out of ``count`` >= 1 with the interval."""
        interval = binomtest(hits, count).proportion_ci(confidence_level=0.95, method="wilson")
        return cls(hits / count, float(interval.low), float(interval.high), count)

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The figures of one run, whatever it certifies. Accuracies are over the readable images.

    Attributes:
        count: images with a result.
        corrupt: images that could not be read; in no accuracy.
        vanilla_accuracy: the undefended model is right on the clean image.
        clean_accuracy: the defense is right on the clean image; an alert is not.
        cases: how many images each exit of the inference algorithm decided.
        forwards_per_image: mean number of model forward passes.
        images_per_second: count / seconds.
        seconds: wall time of certification, all sessions of the run together.
        batch_size: images per model forward pass; None where the defense chose it.
    """

    count: int
    corrupt: int
    vanilla_accuracy: Proportion
    clean_accuracy: Proportion
    cases: dict[str, int]
    forwards_per_image: float
    images_per_second: float
    seconds: float
    batch_size: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Summary(RunSummary):
    """The figures of a run that certifies recovery.

    Attributes:
        certified_accuracy: the defense is right whatever a patch shows, wherever it is.
        paper_accuracy: the criterion of the defense's paper is met; None where it states none.
        paper: whether that criterion is sound; None where there is none.
        forwards_per_certified_image: mean number of model forward passes of certified images; None
            where there are none.
    """

    certified_accuracy: Proportion
    paper_accuracy: Proportion | None
    paper: Paper | None
    forwards_per_certified_image: float | None


@dataclass(frozen=True, kw_only=True)
class DetectionSummary(RunSummary):
    """The figures of a run that certifies detection.

    Attributes:
        certified_detection_accuracy: the clean image gets the right label and no alert, and
            whatever a patch shows, wherever it is, the image keeps the label or is alerted.
        alert_rate: clean images that are alerted, which is false.
    """

    certified_detection_accuracy: Proportion
    alert_rate: Proportion


@dataclass(frozen=True, kw_only=True)
class ProbableSummary(RunSummary):
    """The figures of a run that certifies recovery with a probability.

    Attributes:
        certified_with_probability_accuracy: a prediction is right with the probability that was
            asked for, whatever a patch shows, wherever it is.
        mean_success_probability: mean of the lower bounds of that probability.
        paper_accuracy: the criterion of the defense's paper is met; None where it states none.
        paper: whether that criterion is sound; None where there is none.
    """

    certified_with_probability_accuracy: Proportion
    mean_success_probability: float
    paper_accuracy: Proportion | None
    paper: Paper | None


@dataclass(frozen=True, kw_only=True)
class AttackSummary(RunSummary):
    """The figures of a run that attacks. Its forwards are images that went through a surrogate.

    Attributes:
        robust_accuracy: right on the clean image, and right or alerted on the attacked one: no less
            than what any certificate of the same threat may claim.
        attacked_accuracy: right on the attacked image.
        hit_target: of the images with a target, those that get it; None where none has.
        tries_per_image: mean number of places and restarts tried on images that were attacked; None
            where none was.
    """

    robust_accuracy: Proportion
    attacked_accuracy: Proportion
    hit_target: Proportion | None
    tries_per_image: float | None


AnySummary = Summary | DetectionSummary | ProbableSummary
"""The figures of a run that certifies."""


def summarize(
    examples: pd.DataFrame,
    timing: pd.DataFrame,
    batch_size: int | None = None,
    kind: Kind = "recovery",
    paper: Paper | None = "sound",
) -> AnySummary:
    """Return the figures of a run from its tables.

    Args:
        examples: one row an image, as in ``examples-*.parquet``.
        timing: one row an image, as in ``timing-*.parquet``.
        batch_size: what the run used.
        kind: what the run's certificates promise.
        paper: whether the criterion of the defense's paper is sound; None where it states none.

    Raises:
        RunError: no image could be read.
    """
    read, shared = _read_and_shared(examples, timing, batch_size)
    cost = timing.set_index("index")

    if kind == "detection":
        return DetectionSummary(
            **shared,
            certified_detection_accuracy=_share(read["certified_detection"]),
            alert_rate=_share(read["prediction"] == ALERT),
        )
    criterion: dict[str, Any] = {
        "paper_accuracy": None if paper is None else _share(read["paper_condition"]),
        "paper": paper,
    }
    if kind == "probable":
        return ProbableSummary(
            **shared,
            **criterion,
            certified_with_probability_accuracy=_share(read["certified_with_probability"]),
            mean_success_probability=float(read["success_probability"].mean()),
        )
    certified_forwards = cost.loc[read.loc[read["certified"], "index"], "forwards"]
    return Summary(
        **shared,
        **criterion,
        certified_accuracy=_share(read["certified"]),
        forwards_per_certified_image=(
            None if certified_forwards.empty else float(certified_forwards.mean())
        ),
    )


def summarize_attack(
    examples: pd.DataFrame, timing: pd.DataFrame, batch_size: int | None = None
) -> AttackSummary:
    """Return the figures of a run that attacks from its tables; see ``summarize``."""
    read, shared = _read_and_shared(examples, timing, batch_size)

    targeted, tried = read[read["target"] >= 0], read.loc[read["tries"] > 0, "tries"]
    return AttackSummary(
        **shared,
        robust_accuracy=_share((read["prediction"] == read["label"]) & ~read["broken"]),
        attacked_accuracy=_share(read["attacked_prediction"] == read["label"]),
        hit_target=(None if targeted.empty else _share(targeted["hit_target"])),
        tries_per_image=None if tried.empty else float(tried.mean()),
    )


def _read_and_shared(
    examples: pd.DataFrame, timing: pd.DataFrame, batch_size: int | None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the rows of readable images, and the values of ``RunSummary``."""
    read = examples[examples["status"] == "ok"]
    corrupt = len(examples) - len(read)
    if read.empty:
        raise RunError(f"expected images that can be read, got none ({corrupt} corrupt)")
    cost = timing.set_index("index")
    seconds = float(timing["seconds"].sum())

    shared: dict[str, Any] = {
        "count": len(read),
        "corrupt": corrupt,
        "vanilla_accuracy": _share(read["vanilla"] == read["label"]),
        "clean_accuracy": _share(read["prediction"] == read["label"]),
        "cases": {str(case): int(count) for case, count in read["case"].value_counts().items()},
        "forwards_per_image": float(cost.loc[read["index"], "forwards"].mean()),
        "images_per_second": len(read) / seconds if seconds else 0.0,
        "seconds": seconds,
        "batch_size": batch_size,
    }
    return read, shared


def _share(hits: pd.Series[bool]) -> Proportion:
    return Proportion.of(int(hits.sum()), len(hits))


def trade_off_table(examples: pd.DataFrame, taus: Sequence[float] | None = None) -> pd.DataFrame:
    """Return what each tau costs and gives, from the examples of one run that certifies detection.

    Args:
        examples: one row an image, as in ``examples-*.parquet``; the run's own tau is of no matter.
        taus: confidences in [0, 1]; by default every one at which a figure changes, and 0 and 1.

    Returns:
        One row a tau, in their order: tau, clean_accuracy, certified_detection_accuracy and
        alert_rate, each a share of the readable images.
    """
    read = examples[examples["status"] == "ok"]
    label, unmasked, alert, above, certified = (
        torch.from_numpy(read[name].to_numpy(copy=True))
        for name in (
            "label",
            "unmasked",
            "alert_threshold",
            "certified_above",
            "certified_threshold",
        )
    )
    given = None if taus is None else torch.tensor(list(taus), dtype=torch.float64)
    counted = Thresholds(unmasked, alert, above, certified).trade_off(label, given)
    return pd.DataFrame(
        {
            "tau": counted.tau.numpy(),
            "clean_accuracy": counted.clean.numpy() / counted.count,
            "certified_detection_accuracy": counted.certified_detection.numpy() / counted.count,
            "alert_rate": counted.alert.numpy() / counted.count,
        }
    )
