"""Robust statistics of the evidence: median, trimmed mean, the sum without the largest.

PatchGuard names the median and the trimmed mean as alternatives to masking (Section 6.2), and the
masking of the largest single features for several patches (Appendix E). All three are sums over
some ranks of a class's evidence, and so monotone in every cell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchproof.aggregation.evidence import Evidence, with_gradients
from patchproof.aggregation.features import FeatureAggregation
from patchproof.errors import PatchproofError
from patchproof.results import Outputs

_NEAR_RANKS = 0.25
"""Share of the views within which ranks have gradients for attackers, less and less."""


class RankSum(FeatureAggregation):
    """The label is the class of the largest sum of evidence over some ranks.

    The V cells of a class are sorted from the least evidence, rank 0, to the most, rank V - 1; the
    score is the sum of the ranks from ``first`` to ``last``.

    **Certificate.** No evidence that grows makes a sum over ranks smaller. So the label's score is
    the least with all corrupted cells at the low end of the range, which are then the lowest ranks,
    and another class's score is the most with all at the high end, the highest ranks. A region
    holds if the first is larger than the second for every other class, or equal with the label the
    lower index. It is necessary against attackers who set the evidence of all classes
    independently, as of logits; of confidences and predictions it is sufficient.

    **Tolerance.** The other cells of the label count at least, those of other classes at most
    (``Evidence.bounds``); by the same monotony.

    Args:
        evidence: what a view says for each class.
        views: V.
        first: the lowest rank that counts.
        last: the highest.
        tolerance: how far rounding may move a score of a view.
    """

    def __init__(
        self, evidence: Evidence, views: int, first: int, last: int, tolerance: float
    ) -> None:
        super().__init__(evidence, tolerance)
        if not 0 <= first <= last < views:
            raise PatchproofError(
                f"expected some of {views} views to count, got ranks {first} to {last}"
            )
        self.views = views
        self.first = first
        self.last = last

    def combine(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, (N, C) float64."""
        ordered = values.sort(dim=1).values
        return ordered[:, self.first : self.last + 1].sum(1)

    def _ascended(self, values: Tensor) -> Tensor:
        """Return the sums with gradients in other ranks, too, the nearer the more.

        The gradients of the median alone would move one view of all that a patch can move.
        """
        rank = torch.arange(self.views, dtype=torch.float64)
        beyond = torch.maximum(self.first - rank, rank - self.last).clamp(min=0)
        near = 1.0 - beyond / (_NEAR_RANKS * self.views + 1.0)
        weighted = values.sort(dim=1).values * near.clamp(min=0)[:, None]
        return with_gradients(self.combine(values), weighted.sum(1))

    def bounds(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least score of the label, (N, P), and the most of every class, (N, P, C)."""
        at = self.evidence.bounds(outputs, labels, self.tolerance)
        corrupted = patterns.sum(1)
        none = torch.zeros_like(corrupted)
        lowest = self._benign(at.low[..., None], patterns, corrupted)[..., 0]
        lowest = lowest + self.evidence.low * self._among(none, corrupted)
        highest = self._benign(at.high(slice(None)), patterns, none)
        filled = self._among(self.views - corrupted, corrupted)
        return lowest, highest + (self.evidence.high * filled)[:, None]

    def _benign(self, values: Tensor, patterns: Tensor, below: Tensor) -> Tensor:
        """Return the part of the sums that benign cells make up, (N, P, K) of (N, V, K).

        Args:
            values: the evidence of K classes in clean images.
            patterns: (P, V) bool, the other cells.
            below: (P,), how many corrupted cells take lower ranks than all of these.
        """
        benign = self.views - patterns.sum(1)
        first, end = (
            (rank - below).clamp(min=0).minimum(benign) for rank in (self.first, self.last + 1)
        )
        values = values.transpose(1, 2).contiguous()
        ordered, cells = values.sort(dim=2)
        nothing = torch.zeros_like(ordered[..., :1])
        sums = torch.cat([nothing, ordered.cumsum(2)], 2)
        corrupted = _listed(patterns)
        each = torch.ones(corrupted.shape[1])
        rank = torch.cat([cells.argsort(dim=2), torch.full_like(cells[..., :1], self.views)], 2)
        rank_of_corrupted = rank.float()[..., corrupted]  # (N, K, P, k): small whole numbers
        corrupted_values = torch.cat([values, nothing], 2)[..., corrupted]

        def smallest(count: Tensor) -> Tensor:
            """Return the sum of the ``count`` lowest benign cells of each pattern, (N, K, P)."""
            reach = count.expand(*sums.shape[:2], -1)
            while True:  # among this many lowest cells of all, some are corrupted: go on by these
                inside = (rank_of_corrupted < reach[..., None]).float()
                further = count + (inside @ each).long()
                if torch.equal(further, reach):
                    break
                reach = further
            return sums.gather(2, reach) - (inside * corrupted_values) @ each.double()

        total = smallest(end) - smallest(first) if bool(first.any()) else smallest(end)
        return total.transpose(1, 2)

    def _among(self, start: Tensor, count: Tensor) -> Tensor:
        """Return how many of ``count`` ranks from ``start`` on are summed, (P,) float64."""
        first, last = start.clamp(min=self.first), (start + count - 1).clamp(max=self.last)
        return (last - first + 1).clamp(min=0).double()

    def _entries(self, patterns: Tensor) -> int:
        return max(1, len(patterns) * int(patterns.sum(1).max()))


def _listed(patterns: Tensor) -> Tensor:
    """Return the cells of each pattern, (P, k) int64; V to fill up."""
    order = patterns.int().sort(dim=1, descending=True, stable=True).indices
    order = order[:, : int(patterns.sum(1).max())]
    return torch.where(patterns.gather(1, order), order, patterns.shape[1])


def median(evidence: Evidence, views: int, tolerance: float) -> RankSum:
    """Return the lower median: of an even number of views the lower one of the middle two."""
    middle = (views - 1) // 2
    return RankSum(evidence, views, middle, middle, tolerance)


def trimmed_sum(evidence: Evidence, views: int, trim: int, tolerance: float) -> RankSum:
    """Return the sum, as good as the mean, without the ``trim`` lowest and highest views."""
    if type(trim) is not int or not 0 <= 2 * trim < views:
        raise PatchproofError(
            f"trim: expected from 0 to less than half of {views} views at each end, got {trim!r}"
        )
    return RankSum(evidence, views, trim, views - 1 - trim, tolerance)


def without_largest(evidence: Evidence, views: int, count: int, tolerance: float) -> RankSum:
    """Return the sum without the ``count`` views of largest evidence (PatchGuard, Appendix E).

    It needs no window, and so masks the views that several patches corrupt.
    """
    if type(count) is not int or not 0 <= count < views:
        raise PatchproofError(f"count: expected from 0 to less than {views} views, got {count!r}")
    return RankSum(evidence, views, 0, views - 1 - count, tolerance)
