"""Alert where leaving a window out changes the label (PatchGuard++, Xiang and Mittal, 2021)."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from patchproof.aggregation.base import CERTAIN, Goal
from patchproof.aggregation.minority import MinorityVote
from patchproof.aggregation.windows import Windows
from patchproof.detection import Thresholds
from patchproof.results import INVALID_LABEL, Outputs, Paper


class WindowVote:
    """Return the label of all local features, or ``ALERT`` if without some window it is another.

    The mean of the local logits outside of a window is a masked view of the image. With the mean of
    all of them, these are the views of ``MinorityVote``: there is an alert if a masked view has
    another label than the unmasked one, with a softmax confidence of at least tau, and detection is
    certified if the unmasked label is right without an alert and at every region some window that
    contains all corrupted cells leaves a view that is right with a confidence of at least tau. Its
    proof is the same; alert and certificate compare the same confidences by the same >=.

    Logits need no clipping, since a window that contains the corrupted cells leaves nothing of
    them; a mean over cells that are not finite makes a view without a label.

    Args:
        windows: sliding windows over the local features.
        tau: the least confidence, in [0, 1], with which a masked view is believed.
        tolerance: how far rounding may move a local logit, and so a mean of them.
    """

    needs_scores = True
    paper: Paper | None = None

    def __init__(self, windows: Windows, tau: float, tolerance: float) -> None:
        self.windows = windows
        self.tau = tau
        self.tolerance = tolerance
        self._vote = MinorityVote(tau, tolerance)

    def next_views(self, outputs: Outputs, goal: Goal | None = None) -> Tensor:
        """Return the priority of each view, (N, V) float32: every view is needed."""
        return torch.full(outputs.known.shape, CERTAIN).masked_fill(outputs.known, 0.0)

    def predict(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the labels and the cases, (N,) int64 each, of images whose views are all known."""
        return self._vote.predict(self._masked(outputs))

    def soft_scores(self, scores: Tensor) -> Tensor:
        """Return (N, C), positive where ``predict`` returns the class, of scores (N, V, C)."""
        means = self._sums(scores.double()) / self._cells[:, None]
        return self._vote.soft_scores(means)

    def certify(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return the verdict of each pattern, (N, P) int8 values of ``Verdict``."""
        return self._vote.certify(self._masked(outputs), labels, self._corrupted(patterns))

    def paper_condition(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return False, (N,) bool: the paper states no other criterion."""
        return torch.zeros(len(labels), dtype=torch.bool)

    def thresholds(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Thresholds:
        """Return for which tau each image is alerted and certified; every view is known."""
        return self._vote.thresholds(self._masked(outputs), labels, self._corrupted(patterns))

    def _masked(self, outputs: Outputs) -> Outputs:
        """Return the unmasked mean, then the mean without each window, as views of their own."""
        assert outputs.scores is not None, "needs_scores makes the loop keep them"
        valid = (outputs.labels != INVALID_LABEL)[..., None]
        values = torch.where(valid, outputs.scores.double(), 0.0)
        holes = self._sums((~valid).double()) > 0
        scores = (self._sums(values) / self._cells[:, None]).masked_fill(holes, torch.nan)
        made = Outputs.empty(len(scores), scores.shape[1], outputs.classes, keep_scores=True)
        images = torch.arange(len(scores))[:, None].expand(-1, scores.shape[1])
        made.record(images, torch.arange(scores.shape[1]).expand_as(images), scores)
        made.known &= outputs.known.all(1, keepdim=True)
        return made

    @cached_property
    def _cells(self) -> Tensor:
        """How many cells are in each of these views, (1 + W,) int64."""
        cells = torch.full((1 + math.prod(self.windows.positions),), math.prod(self.windows.grid))
        cells[1:] -= math.prod(self.windows.size)
        return cells

    def _sums(self, values: Tensor) -> Tensor:
        """Return the sum of all cells, then the sums outside of each window, (N, 1 + W, K)."""
        outside = self.windows.outside(values).flatten(1, 2)
        return torch.cat([values.sum(1, keepdim=True), outside], 1)

    def _corrupted(self, patterns: Tensor) -> Tensor:
        """Return which of these views each pattern corrupts, (P, 1 + W) bool."""
        unmasked = torch.ones(len(patterns), 1, dtype=torch.bool)
        return torch.cat([unmasked, ~self.windows.containing(patterns)], 1)
