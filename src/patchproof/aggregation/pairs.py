"""What double masking and the challenger game share: tables of one- and two-mask labels.

A table is (N, M, M) int64: entry (m, m') is the label of the image with masks m and m' on it, the
diagonal holds the one-mask labels; pairs with the same union share a view. A patch region changes
the entries whose two masks together do not cover it. Both certificates are monotone: they can only
gain when an entry becomes right, so an entry that was not evaluated is put at its worst to prove
that a region holds, and at its best to prove that it is lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from patchproof.aggregation.base import CERTAIN, Goal
from patchproof.results import INVALID_LABEL, Outputs, Paper, Verdict


class PairAggregation(ABC):
    """An aggregation over all unions of two masks of a set.

    Args:
        pair_to_view: (M, M) int64, symmetric: the view that shows the image with masks m and m' on
            it; on the diagonal with m alone.
        tolerance: a view whose decision margin (logits) is not larger counts as corrupted.
    """

    needs_scores = False
    paper: Paper | None = "sound"

    def __init__(self, pair_to_view: Tensor, tolerance: float) -> None:
        self.pair_to_view = pair_to_view
        self.one_mask_views = pair_to_view.diagonal()
        self.tolerance = tolerance
        masks = torch.arange(len(pair_to_view))
        views = int(pair_to_view.max()) + 1
        self._a_pair = torch.empty(views, 2, dtype=torch.int64)
        self._a_pair[pair_to_view] = torch.cartesian_prod(masks, masks).view(*pair_to_view.shape, 2)

    @abstractmethod
    def predict(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the labels and the cases, (N,) int64 each, of decided images."""

    @abstractmethod
    def _wanted_for_label(self, outputs: Outputs) -> Tensor:
        """Return the priority of each view that the label still depends on, (N, V) float32.

        All one-mask views are known.
        """

    @abstractmethod
    def _holds(self, attack: Attack) -> Tensor:
        """Return whether the label stays, (N, P) bool."""

    @abstractmethod
    def _useful(self, right: Tensor, open_patterns: Tensor, covers: Tensor) -> Tensor:
        """Return the views, (N, V) bool, that an open pattern's verdict can depend on.

        Args:
            right: (N, V) bool, views that are right or not known.
            open_patterns: (N, P) bool, the patterns whose verdict is unknown.
            covers: (P, M) float32, 1 for the masks that cover each pattern's regions.
        """

    def certify(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return the verdict of each pattern, (N, P) int8 values of ``Verdict``."""
        known, weak, y = outputs.known, self._weak(outputs), labels[:, None]
        best = torch.where(known, outputs.labels, y)
        holds, not_lost = (
            self._holds(Attack(best, free, labels, patterns, outputs.classes))
            for free in (weak | ~known, weak & known)
        )
        verdict = torch.full(holds.shape, Verdict.UNKNOWN, dtype=torch.int8)
        return verdict.masked_fill(holds, Verdict.HOLDS).masked_fill(~not_lost, Verdict.LOST)

    def paper_condition(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Two-mask correctness (PatchCleanser, Definition 2, Algorithm 2), (N,) bool: sound."""
        right = (outputs.labels == labels[:, None]) & ~self._weak(outputs)
        return (outputs.known & right).all(1)

    def next_views(self, outputs: Outputs, goal: Goal | None = None) -> Tensor:
        """Return the priority of each view, (N, V) float32; all 0 means that the image is decided.

        One-mask views come first. Then, for a certificate, the pairs with the smallest sum of
        one-mask margins for the right label, since they are the likeliest to be wrong.
        """
        priority = torch.zeros(outputs.known.shape)
        priority[:, self.one_mask_views] = CERTAIN
        ready = outputs.known[:, self.one_mask_views].all(1)
        if ready.any():
            chosen = outputs.select(ready)
            later = self._wanted_for_label(chosen)
            if goal is not None:
                certifying = self._wanted_for_certificate(chosen, goal.select(ready))
                later = torch.maximum(later, certifying)
            priority[ready] = later
        return priority.masked_fill(outputs.known, 0.0)

    def _wanted_for_certificate(self, outputs: Outputs, goal: Goal) -> Tensor:
        """Return the priority of each view that the certificate still depends on, (N, V)."""
        label_is_right = outputs.labels == goal.labels[:, None]
        right = ~outputs.known | (label_is_right & ~self._weak(outputs))
        verdicts = self.certify(outputs, goal.labels, goal.patterns)
        open_patterns = verdicts == Verdict.UNKNOWN
        if goal.stop == "first_lost_region":
            open_patterns &= ~(verdicts == Verdict.LOST).any(1, keepdim=True)
        covers = (~goal.patterns[:, self.one_mask_views]).float()
        wanted = self._useful(right, open_patterns, covers)
        wanted |= right.all(1, keepdim=True)  # the paper condition is still open
        margin = outputs.margins[:, self.one_mask_views]
        margin = torch.where(label_is_right[:, self.one_mask_views], margin, -margin)
        safety = margin[:, self._a_pair].sum(2)
        return wanted * ((-safety).sigmoid() + 2.0)

    def _rows_with(self, views: Tensor) -> Tensor:
        """Return the masks in whose rows some view of (N, V) bool is, (N, M) bool."""
        return views[:, self.pair_to_view].any(2)

    def _views_in(self, rows: Tensor) -> Tensor:
        """Return the views that are in some of the rows of (N, M) bool, (N, V) bool."""
        image, mask = rows.nonzero().unbind(1)
        views = torch.zeros(len(rows), len(self._a_pair), dtype=torch.bool)
        views[image[:, None], self.pair_to_view[mask]] = True
        return views

    def _weak(self, outputs: Outputs) -> Tensor:
        """Return the views within the tolerance, (N, V) bool."""
        return (outputs.margins <= self.tolerance) | (outputs.labels == INVALID_LABEL)


@dataclass(frozen=True, eq=False)
class Attack:
    """What an attacker may do to the views of a batch of images.

    Attributes:
        outputs: (N, V) int64, the labels of the views.
        free: (N, V) bool, the views that the attacker sets wherever the patch is.
        labels: (N,) int64, the right labels.
        patterns: (P, V) bool, the views that the attacker sets by a patch.
        classes: number of classes.
    """

    outputs: Tensor
    free: Tensor
    labels: Tensor
    patterns: Tensor
    classes: int

    @property
    def right(self) -> Tensor:
        """The views that are right, (N, V) bool."""
        return ~self.free & (self.outputs == self.labels[:, None])

    def select(self, images: Tensor, patterns: Tensor) -> Attack:
        """Return the attack on some images with some of the patterns, both by index."""
        return Attack(
            self.outputs[images],
            self.free[images],
            self.labels[images],
            self.patterns[patterns],
            self.classes,
        )


def majority(one_mask: Tensor, classes: int) -> Tensor:
    """Return the most frequent of the (N, M) labels, (N,) int64: the lowest class of equal ones.

    Invalid labels do not vote; if all are invalid the label is 0.
    """
    votes = torch.zeros(len(one_mask), classes, dtype=torch.int64)
    valid = one_mask != INVALID_LABEL
    votes.scatter_add_(1, one_mask.clamp(min=0), valid.long())
    return votes.argmax(1)
