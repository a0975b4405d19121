"""What double masking and the challenger game share: tables of one- and two-mask labels.

A table is (N, M, M) int64: entry (m, m') is the label of the image with masks m and m' on it, the
diagonal holds the one-mask labels. A patch region changes the entries whose two masks together
do not cover it. Both certificates are monotone: they can only gain when an entry becomes right, so
an entry that was not evaluated is put at its worst to prove that a region holds, and at its best
to prove that it is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from patchproof.aggregation.base import CERTAIN, Goal
from patchproof.results import INVALID_LABEL, Outputs, Verdict


class PairAggregation(ABC):
    """An aggregation over all unions of two masks of a set.

    Args:
        pair_to_view: (M, M) int64, symmetric: the view that shows the image with masks m and m' on
            it; on the diagonal with m alone.
        tolerance: a view whose decision margin (logits) is not larger counts as corrupted.
    """

    needs_scores = False

    def __init__(self, pair_to_view: Tensor, tolerance: float) -> None:
        self.pair_to_view = pair_to_view
        self.one_mask_views = pair_to_view.diagonal()
        self.tolerance = tolerance

    @abstractmethod
    def predict(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the labels and the cases, (N,) int64 each, of decided images."""

    @abstractmethod
    def _wanted_for_label(self, table: Tensor, known: Tensor, margins: Tensor) -> Tensor:
        """Return the priorities, (N, M, M), of the pairs that the label still depends on."""

    @abstractmethod
    def _holds(
        self, table: Tensor, free: Tensor, labels: Tensor, patterns: Tensor, classes: int
    ) -> Tensor:
        """Return whether the label stays if ``free`` entries are the attacker's too, (N, P)."""

    @abstractmethod
    def _useful(self, right: Tensor, open_patterns: Tensor, covers: Tensor) -> Tensor:
        """Return the entries, (N, M, M) bool, that an open pattern's verdict can depend on.

        Args:
            right: (N, M, M) bool, entries that are right or not known.
            open_patterns: (N, P) bool, the patterns whose verdict is unknown.
            covers: (P, M) bool, the masks that cover each pattern's regions.
        """

    def certify(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return the verdict of each pattern, (N, P) int8 values of ``Verdict``."""
        table, known, free = self._tables(outputs)
        y = labels[:, None, None]
        holds = self._holds(table, free | ~known, labels, patterns, outputs.classes)
        best = torch.where(known, table, y)
        lost = ~self._holds(best, free & known, labels, patterns, outputs.classes)
        verdict = torch.full(holds.shape, Verdict.UNKNOWN, dtype=torch.int8)
        return verdict.masked_fill(holds, Verdict.HOLDS).masked_fill(lost, Verdict.LOST)

    def paper_condition(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Two-mask correctness (PatchCleanser, Definition 2, Algorithm 2), (N,) bool: sound."""
        table, known, free = self._tables(outputs)
        return (known & ~free & (table == labels[:, None, None])).flatten(1).all(1)

    def next_views(self, outputs: Outputs, goal: Goal | None = None) -> Tensor:
        """Return the priority of each view, (N, V) float32; all 0 means that the image is decided.

        One-mask views come first. Then, for a certificate, the pairs with the smallest sum of
        one-mask margins for the right label, since they are the likeliest to be wrong.
        """
        table, known, free = self._tables(outputs)
        margins = outputs.margins[:, self.pair_to_view]
        one_mask_known = known.diagonal(dim1=1, dim2=2)
        priority = self._wanted_for_label(table, known, margins)
        if goal is not None:
            right = ~known | (~free & (table == goal.labels[:, None, None]))
            verdicts = self.certify(outputs, goal.labels, goal.patterns)
            open_patterns = verdicts == Verdict.UNKNOWN
            if goal.stop == "first_lost_region":
                open_patterns &= ~(verdicts == Verdict.LOST).any(1, keepdim=True)
            covers = ~goal.patterns[:, self.one_mask_views]
            wanted = self._useful(right, open_patterns, covers)
            wanted |= right.flatten(1).all(1)[:, None, None]  # the paper condition is still open
            own = table.diagonal(dim1=1, dim2=2)
            signed = margins.diagonal(dim1=1, dim2=2)
            signed = torch.where(own == goal.labels[:, None], signed, -signed)
            safety = signed[:, :, None] + signed[:, None, :]
            priority = torch.where(wanted, (-safety).sigmoid() + 2.0, priority)
        ready = one_mask_known.all(1)[:, None, None]
        diagonal = torch.eye(len(self.pair_to_view), dtype=torch.bool)
        first = torch.where(diagonal, CERTAIN, 0.0)
        priority = torch.where(ready, priority, first).masked_fill(known, 0.0)
        views = self.pair_to_view.flatten().expand(len(priority), -1)
        none = torch.zeros_like(outputs.margins)
        return none.scatter_reduce_(1, views, priority.flatten(1), "amax")

    def _tables(self, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return labels, known entries and entries within the tolerance, (N, M, M) each."""
        table = outputs.labels[:, self.pair_to_view]
        weak = (outputs.margins <= self.tolerance) | (outputs.labels == INVALID_LABEL)
        return table, outputs.known[:, self.pair_to_view], weak[:, self.pair_to_view]


def majority(one_mask: Tensor, classes: int) -> Tensor:
    """Return the most frequent of the (N, M) labels, (N,) int64: the lowest class of equal ones.

    Invalid labels do not vote; if all are invalid the label is 0.
    """
    votes = torch.zeros(len(one_mask), classes, dtype=torch.int64)
    valid = one_mask != INVALID_LABEL
    votes.scatter_add_(1, one_mask.clamp(min=0), valid.long())
    return votes.argmax(1)
