"""What the aggregations over the evidence of all views share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from patchproof.aggregation.base import CERTAIN, Goal
from patchproof.aggregation.evidence import Evidence
from patchproof.errors import PatchproofError
from patchproof.results import Case, Outputs, Paper, Verdict

_MOST_ENTRIES = 2**18
"""Float64 values of an intermediate result: images are taken a few at a time, to stay in caches."""


class FeatureAggregation(ABC):
    """Evidence of every view for every class, aggregated to a score for each class.

    The label is the class of the highest score, the lowest of equal ones. A certificate compares
    the least that a patch can make of the label's score with the most that it can make of another.

    Args:
        evidence: what a view says for each class.
        tolerance: how far rounding may move a score of a view (``Evidence.bounds``).
    """

    needs_scores = True
    paper: Paper | None = None
    """Whether the criterion that the defense's paper states is sound; None: it states none."""

    def __init__(self, evidence: Evidence, tolerance: float) -> None:
        if not tolerance >= 0:
            raise PatchproofError(f"tolerance: expected a number >= 0, got {tolerance!r}")
        self.evidence = evidence
        self.tolerance = tolerance

    def next_views(self, outputs: Outputs, goal: Goal | None = None) -> Tensor:
        """Return the priority of each view, (N, V) float32: every view is needed."""
        return torch.full(outputs.known.shape, CERTAIN).masked_fill(outputs.known, 0.0)

    def predict(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the labels and the cases, (N,) int64 each, of images whose views are all known."""
        label = self.class_scores(outputs).argmax(1)
        agreed = (outputs.labels == label[:, None]).all(1)
        return label, torch.where(agreed, int(Case.AGREED), int(Case.MAJORITY))

    def top(self, outputs: Outputs, count: int) -> Tensor:
        """Return the ``count`` classes of highest scores, (N, count) int64, best first."""
        scores = self.class_scores(outputs)
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]

    def certify(self, outputs: Outputs, labels: Tensor, patterns: Tensor, top: int = 1) -> Tensor:
        """Return the verdict of each pattern, (N, P) int8 values of ``Verdict``.

        Args:
            outputs: of N images; one with views that are not known gets ``UNKNOWN``.
            labels: (N,) int64.
            patterns: (P, V) bool.
            top: the label stays among this many classes of highest scores (PatchGuard, Appendix D).
        """
        holds = torch.empty(len(labels), len(patterns), dtype=torch.bool)
        for chunk in self._chunks(outputs, patterns):
            holds[chunk] = self._holds(outputs.select(chunk), labels[chunk], patterns, top)
        verdict = torch.where(holds, int(Verdict.HOLDS), int(Verdict.LOST)).to(torch.int8)
        return verdict.masked_fill(~outputs.known.all(1, keepdim=True), Verdict.UNKNOWN)

    def paper_condition(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return whether the paper's criterion holds, (N,) bool; False where it states none."""
        return torch.zeros(len(labels), dtype=torch.bool)

    def class_scores(self, outputs: Outputs) -> Tensor:
        """Return what decides the label, (N, C) float64."""
        return self.combine(self.evidence.values(outputs))

    def soft_scores(self, scores: Tensor) -> Tensor:
        """Return the combined soft evidence of a view, (N, C), of finite scores (N, V, C).

        It has gradients in all scores, see ``Evidence.soft``.
        """
        return self._ascended(self.evidence.soft(scores)) / scores.shape[1]

    def exact_scores(self, scores: Tensor) -> Tensor:
        """Return ``class_scores`` by the number of views with the gradients of soft evidence."""
        return self._ascended(self.evidence.straight_through(scores)) / scores.shape[1]

    @abstractmethod
    def combine(self, values: Tensor) -> Tensor:
        """Return the score of each class, (N, C) float64, of evidence (N, V, C) float64."""

    def _ascended(self, values: Tensor) -> Tensor:
        """Return ``combine`` of evidence with the gradients that attackers ascend, (N, C)."""
        return self.combine(values)

    @abstractmethod
    def bounds(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a patch can make of the class scores at each pattern of corrupted views.

        Args:
            outputs: of N images, all views known.
            labels: (N,) int64.
            patterns: (P, V) bool.

        Returns:
            The least score of the label, (N, P), and the most of every class, (N, P, C), float64.
        """

    def _holds(self, outputs: Outputs, labels: Tensor, patterns: Tensor, top: int) -> Tensor:
        """Return whether the label stays among the ``top``, (n, P) bool, for a few images."""
        lowest, highest = self.bounds(outputs, labels, patterns)
        return stays(lowest, highest, labels, top=top)

    def _chunks(self, outputs: Outputs, patterns: Tensor) -> Iterator[Tensor]:
        """Yield the indices of a few images at a time."""
        images = torch.arange(len(outputs.labels))
        at_once = _MOST_ENTRIES // (self._entries(patterns) * outputs.classes)
        return iter(torch.split(images, max(1, at_once)))

    def _entries(self, patterns: Tensor) -> int:
        """Return how many values an image takes for each class."""
        return max(patterns.shape)


def stays(lowest: Tensor, highest: Tensor, labels: Tensor, top: int = 1) -> Tensor:
    """Return whether the label stays among the ``top`` classes, (N, P) bool.

    Args:
        lowest: (N, P), the least score of the label.
        highest: (N, P, C), the most of every class; the label's own is not read.
        labels: (N,) int64.
        top: how many classes of highest scores, the lower class first of equal ones.
    """
    return ahead(lowest, highest, labels, torch.arange(highest.shape[2])[None]) < top


def ahead(lowest: Tensor, highest: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Return how many of some classes may be ahead of the label, (N, P).

    Args:
        lowest: (N, P), the least score of the label.
        highest: (N, P, K), the most of K classes; the label's own is not read.
        labels: (N,) int64.
        classes: (N or 1, K) int64, which classes they are.
    """
    y, lowest = labels[:, None], lowest[..., None]
    before = ~(highest <= lowest)  # NaN is ahead
    before |= (highest == lowest) & (classes < y)[:, None]
    return (before & (classes != y)[:, None]).sum(2)
