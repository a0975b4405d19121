"""Sums of bounded evidence: Clipped BagNet, de-randomized smoothing, BagCert.

Each says differently what a view says for a class; all add it up over the views. What a patch can
do is bounded by the range of the evidence and the number of views that it corrupts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchproof.aggregation.evidence import (
    Confidence,
    ConfidentVotes,
    Prediction,
    TanhLogits,
)
from patchproof.aggregation.features import FeatureAggregation, stays
from patchproof.results import Outputs, Paper


class BoundedSum(FeatureAggregation):
    """The label is the class of the largest sum of evidence over all views.

    **Certificate.** Let A be the views that a region corrupts. At worst they say the least for the
    label y and the most for another class c, so the region holds if for every c

        sum of y outside A + low |A|  >  sum of c outside A + high |A|

    or equal with y the lower index. It is necessary where a view can do both at once: for votes and
    confidences it can; for tanh only in the limit of infinite logits.

    **Tolerance.** Outside A the label's evidence counts at least, the others' at most
    (``Evidence.bounds``).
    """

    def combine(self, values: Tensor) -> Tensor:
        """Return the sum of the evidence of each class, (N, C) float64."""
        return values.sum(1)

    def bounds(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least score of the label, (N, P), and the most of every class, (N, P, C)."""
        at = self.evidence.bounds(outputs, labels, self.tolerance)
        benign, corrupted = (~patterns).double(), patterns.sum(1).double()
        lowest = at.low @ benign.T + self.evidence.low * corrupted
        highest = benign @ at.high(slice(None)) + self.evidence.high * corrupted[:, None]
        return lowest, highest


class ClippedSum(BoundedSum):
    """The largest sum of tanh(0.05 u - 1) over the local logits u (Clipped BagNet).

    ``paper_condition`` (PatchGuard, Section 6.1): outside the corrupted views the sum of the label
    is ahead of the sum of the runner-up of the clean image by more than 2k, where k is the largest
    number of corrupted views. It is unsound: without the corrupted views a third class may lead.

    Args:
        tolerance: how far rounding may move a score of a view.
    """

    paper: Paper | None = "unsound"

    def __init__(self, tolerance: float) -> None:
        super().__init__(TanhLogits(), tolerance)

    def paper_condition(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return whether the label is ahead of the runner-up by more than 2k, (N,) bool."""
        values = self.evidence.values(outputs)
        scores = values.sum(1)
        right = scores.argmax(1) == labels
        runner_up = scores.scatter(1, labels[:, None], -torch.inf).argmax(1)
        lead = values.gather(2, _columns(labels, values)) - values.gather(
            2, _columns(runner_up, values)
        )
        most = 2 * int(patterns.sum(1).max())
        ahead = (lead.squeeze(2) @ (~patterns).double().T > most).all(1)
        return right & ahead & outputs.known.all(1)


class CountedVotes(BoundedSum):
    """The class with most votes of the views (de-randomized smoothing).

    A view votes for its label, or, with ``least``, for each class of at least that confidence:
    for none, one, or several.

    ``paper_condition`` (Levine and Feizi, 2020; PatchGuard, Section 6.1): the label has at least 2k
    votes more than any other class, one more than that where the other has the lower index; k is
    the largest number of corrupted views. It is sound, and never more than the region certificate.

    Args:
        least: the confidence that a vote needs; None to vote for the label.
        tolerance: how far rounding may move a score of a view.
    """

    paper: Paper | None = "sound"

    def __init__(self, least: float | None, tolerance: float) -> None:
        super().__init__(Prediction() if least is None else ConfidentVotes(least=least), tolerance)

    def paper_condition(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return whether the label is ahead by 2k votes, (N,) bool."""
        at = self.evidence.bounds(outputs, labels, self.tolerance)
        reach = 2 * int(patterns.sum(1).max())
        lowest, highest = at.low.sum(1)[:, None], at.high(slice(None)).sum(1)[:, None] + reach
        return stays(lowest, highest, labels)[:, 0] & outputs.known.all(1)


class SpatialVotes(BoundedSum):
    """The class with most votes of the local features (BagCert, Metzen and Yatsura, 2021).

    A vote lies in [0, 1]: 1 for the label of the feature, or its confidence. ``paper_condition`` is
    the region certificate without tolerance: BagCert's own criterion looks, as ours, at which
    votes each region corrupts.

    Args:
        evidence: what a local feature says for each class.
        tolerance: how far rounding may move a score of a view.
    """

    paper: Paper | None = "sound"

    def __init__(self, evidence: Prediction | Confidence, tolerance: float) -> None:
        super().__init__(evidence, tolerance)

    def paper_condition(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return whether the votes outside of every region decide, (N,) bool."""
        exact = BoundedSum(self.evidence, 0.0)
        holds = [
            exact._holds(outputs.select(chunk), labels[chunk], patterns, 1).all(1)
            for chunk in self._chunks(outputs, patterns)
        ]
        return torch.cat(holds) & outputs.known.all(1)


def _columns(classes: Tensor, values: Tensor) -> Tensor:
    """Return the indices that gather one class an image from (N, V, C), (N, V, 1)."""
    return classes[:, None, None].expand(-1, values.shape[1], 1)
