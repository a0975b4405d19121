"""What a run amounts to: accuracies with Wilson intervals, cases, cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from patchproof.results import RunError


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


@dataclass(frozen=True)
class Summary:
    """The figures of one run. Accuracies are over the images that could be read.

    Attributes:
        count: images with a result.
        corrupt: images that could not be read; in no accuracy.
        vanilla_accuracy: the undefended model is right on the clean image.
        clean_accuracy: the defense is right on the clean image.
        certified_accuracy: the defense is right whatever a patch shows, wherever it is.
        paper_accuracy: the criterion of the defense's paper is met.
        cases: how many images each exit of the inference algorithm decided.
        forwards_per_image: mean number of model forward passes.
        forwards_per_certified_image: the same over certified images; None where there are none.
        images_per_second: count / seconds.
        seconds: wall time of certification, all sessions of the run together.
        batch_size: images per model forward pass; None where the defense chose it.
    """

    count: int
    corrupt: int
    vanilla_accuracy: Proportion
    clean_accuracy: Proportion
    certified_accuracy: Proportion
    paper_accuracy: Proportion
    cases: dict[str, int]
    forwards_per_image: float
    forwards_per_certified_image: float | None
    images_per_second: float
    seconds: float
    batch_size: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return asdict(self)


def summarize(
    examples: pd.DataFrame, timing: pd.DataFrame, batch_size: int | None = None
) -> Summary:
    """Return the figures of a run from its tables.

    Args:
        examples: one row an image, as in ``examples-*.parquet``.
        timing: one row an image, as in ``timing-*.parquet``.
        batch_size: what the run used.

    Raises:
        RunError: no image could be read.
    """
    read = examples[examples["status"] == "ok"]
    corrupt = len(examples) - len(read)
    if read.empty:
        raise RunError(f"expected images that can be read, got none ({corrupt} corrupt)")
    cost = timing.set_index("index")
    right = read["prediction"] == read["label"]
    forwards = cost.loc[read["index"], "forwards"]
    certified_forwards = cost.loc[read.loc[read["certified"], "index"], "forwards"]
    seconds = float(timing["seconds"].sum())

    def proportion(hits: pd.Series[bool]) -> Proportion:
        return Proportion.of(int(hits.sum()), len(read))

    return Summary(
        count=len(read),
        corrupt=corrupt,
        vanilla_accuracy=proportion(read["vanilla"] == read["label"]),
        clean_accuracy=proportion(right),
        certified_accuracy=proportion(read["certified"]),
        paper_accuracy=proportion(read["paper_condition"]),
        cases={str(case): int(count) for case, count in read["case"].value_counts().items()},
        forwards_per_image=float(forwards.mean()),
        forwards_per_certified_image=(
            None if certified_forwards.empty else float(certified_forwards.mean())
        ),
        images_per_second=len(read) / seconds if seconds else 0.0,
        seconds=seconds,
        batch_size=batch_size,
    )
