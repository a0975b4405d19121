"""What a view says for each class, as a number in a fixed range: its evidence.

PatchGuard (Section 3.4) takes local logits, confidences or predictions as features and clips them.
A bounded range is what makes a certificate possible: it is all that an attacker can do to a
corrupted view.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from patchproof.aggregation.soft import log_odds
from patchproof.errors import PatchproofError
from patchproof.results import INVALID_LABEL, ROUNDING, Outputs

LARGEST = 1e6
"""The default bound of logits: finite, so that no attacked view can drown the others in rounding,
and larger than the logits of any network that is not attacked."""

_STEPS = 33
"""Evidence is a whole multiple of the largest value times 2 to the minus this: with 20 bits for the
number of views, sums of up to a million are whole multiples that float64 holds."""


class Evidence(ABC):
    """From the scores of a view to its evidence for each class, in [``low``, ``high``].

    Evidence is rounded to multiples of a power of two, so that every sum of it is exact, in any
    order and as a total minus a part. An attacker could otherwise decide ties by rounding.

    A view whose scores are not finite has evidence 0 (or the end of the range next to it) in
    ``values``; in ``bounds`` it may say anything, as a corrupted view.
    """

    low: float
    high: float

    def values(self, outputs: Outputs) -> Tensor:
        """Return the evidence of every view, (N, V, C) float64."""
        values = self._rounded(self._of(self._basis(outputs), None))
        invalid = outputs.labels == INVALID_LABEL
        nothing = min(max(0.0, self.low), self.high)
        return values.masked_fill(invalid[..., None], nothing) if invalid.any() else values

    def soft(self, scores: Tensor) -> Tensor:
        """Return what ``values`` does, about, with gradients where a view may say more or less.

        Args:
            scores: (N, V, C), finite.

        Returns:
            (N, V, C) float64.
        """
        return self._of(self._basis(_recorded(scores)), None)

    def straight_through(self, scores: Tensor) -> Tensor:
        """Return ``values`` with the gradients of ``soft``, (N, V, C) float64 of finite scores."""
        return with_gradients(self.values(_recorded(scores.detach())), self.soft(scores))

    def bounds(self, outputs: Outputs, labels: Tensor, tolerance: float) -> Bounds:
        """Return what rounding can make of the evidence of clean images.

        Any score of a view, and the difference of any two, may be off by up to e: the tolerance, or
        ``ROUNDING`` times the largest score of the view if that is more. A tolerance of 0 trusts
        the arithmetic: e is 0.

        Args:
            outputs: of N images, all views known.
            labels: (N,) int64.
            tolerance: of scores.
        """
        error = torch.zeros(outputs.labels.shape, dtype=torch.float64)
        if tolerance > 0:
            error = (ROUNDING * _scores(outputs).abs().amax(2).double()).clamp(min=tolerance)
        basis = self._basis(outputs)
        chosen = labels[:, None, None].expand(-1, basis.shape[1], 1)
        low, most = (
            self._rounded(self._of(basis.gather(2, chosen), change[..., None])).squeeze(2)
            for change in (-error, error)
        )
        invalid = outputs.labels == INVALID_LABEL

        def high(classes: slice | Tensor) -> Tensor:
            most = self._rounded(self._of(basis[..., classes], error[..., None]))
            return most.masked_fill(invalid[..., None], self.high) if invalid.any() else most

        return Bounds(
            low.masked_fill(invalid, self.low), most.masked_fill(invalid, self.high), high
        )

    def _rounded(self, values: Tensor) -> Tensor:
        """Round values, which may be changed in place, to whole multiples of a step."""
        # What is left of a value next to a number whose last bit is the step.
        shift = 1.5 * 2.0**52 * step_of(self.low, self.high)
        return values.add_(shift).sub_(shift)

    def _basis(self, outputs: Outputs) -> Tensor:
        """Return what the evidence of each class alone follows from, (N, V, C)."""
        return _scores(outputs)

    @abstractmethod
    def _of(self, basis: Tensor, error: Tensor | None) -> Tensor:
        """Return the evidence before it is rounded, a new (N, V, K) float64, of some classes.

        Args:
            basis: (N, V, K).
            error: (N, V, 1), by how much the scores of these classes are higher; None for nothing.
        """


@dataclass(frozen=True)
class Bounds:
    """What the views of N clean images say at least for the label, and at most for each class.

    Attributes:
        low: (N, V) float64, at least, for the label.
        high_of_label: (N, V) float64, at most, for the label.
        high: from K classes, as a slice or (K,) int64, to what is said for them at most, (N, V, K).
    """

    low: Tensor
    high_of_label: Tensor
    high: Callable[[slice | Tensor], Tensor]


@dataclass(frozen=True)
class Logits(Evidence):
    """The scores themselves, clipped to [``low``, ``high``], which are rounded as all evidence.

    Raises:
        PatchproofError: an empty or infinite range.
    """

    low: float = 0.0
    high: float = LARGEST

    def __post_init__(self) -> None:
        if -LARGEST <= self.low < self.high <= LARGEST:
            step = step_of(self.low, self.high)
            low, high = (round(end / step) * step for end in (self.low, self.high))
            if low < high:
                object.__setattr__(self, "low", low)
                object.__setattr__(self, "high", high)
                return
        raise PatchproofError(
            f"expected clipping bounds within {LARGEST:,.0f}, low < high, got {self.low} and "
            f"{self.high}"
        )

    def soft(self, scores: Tensor) -> Tensor:
        """Return the evidence, with the gradients of the scores on both sides of the bounds."""
        scores = scores.double()
        return with_gradients(scores.clamp(self.low, self.high), scores)

    def _of(self, basis: Tensor, error: Tensor | None) -> Tensor:
        scores = basis.double() if error is None else basis + error
        return scores.clamp_(self.low, self.high)


@dataclass(frozen=True)
class TanhLogits(Evidence):
    """tanh(0.05 u - 1) of each score u, in (-1, 1) (Clipped BagNet, Zhang et al., 2020)."""

    low: float = -1.0
    high: float = 1.0

    def _of(self, basis: Tensor, error: Tensor | None) -> Tensor:
        return torch.tanh(0.05 * (basis.double() if error is None else basis + error) - 1.0)


@dataclass(frozen=True)
class Confidence(Evidence):
    """The softmax probabilities of the scores."""

    low: float = 0.0
    high: float = 1.0

    def _basis(self, outputs: Outputs) -> Tensor:
        """Return the log-odds, log p / (1 - p), which change by ``error`` at most."""
        return log_odds(_scores(outputs).double())

    def _of(self, basis: Tensor, error: Tensor | None) -> Tensor:
        return (basis if error is None else basis + error).sigmoid()


@dataclass(frozen=True)
class Prediction(Evidence):
    """One vote for the class of the highest score (the lowest class of equal ones).

    In the bounds a view whose margin is not larger than the tolerance may vote for any class.
    """

    low: float = 0.0
    high: float = 1.0

    def soft(self, scores: Tensor) -> Tensor:
        """Return the softmax probabilities."""
        return scores.double().softmax(2)

    def bounds(self, outputs: Outputs, labels: Tensor, tolerance: float) -> Bounds:
        """Return what rounding can make of the votes of clean images."""
        sure = (outputs.labels != INVALID_LABEL) & (outputs.margins > tolerance)
        right = outputs.labels == labels[:, None]
        votes = self._basis(outputs)
        return Bounds(
            (sure & right).double(),
            (~sure | right).double(),
            lambda classes: torch.where(sure[..., None], votes[..., classes], 1.0),
        )

    def _basis(self, outputs: Outputs) -> Tensor:
        return functional.one_hot(outputs.labels.clamp(min=0), outputs.classes).double()

    def _of(self, basis: Tensor, error: Tensor | None) -> Tensor:
        return basis


@dataclass(frozen=True)
class ConfidentVotes(Confidence):
    """A vote for each class whose confidence is at least ``least``: none, one, or several.

    Views without a class of that confidence abstain (de-randomized smoothing, Levine and Feizi,
    2020).

    Raises:
        PatchproofError: a confidence outside [0, 1].
    """

    least: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.least <= 1.0:
            raise PatchproofError(f"expected a confidence in [0, 1], got {self.least!r}")

    def soft(self, scores: Tensor) -> Tensor:
        """Return votes that begin with the log-odds: one half at the least confidence."""
        least = torch.tensor(self.least, dtype=torch.float64).logit(1e-9)
        return (log_odds(scores.double()) - least).sigmoid()

    def _of(self, basis: Tensor, error: Tensor | None) -> Tensor:
        return (super()._of(basis, error) >= self.least).double()


def step_of(low: float, high: float) -> float:
    """Return the step, a power of two, that evidence in [low, high] is a multiple of."""
    return float(2.0 ** (math.frexp(max(-low, high))[1] - _STEPS))


def _recorded(scores: Tensor) -> Outputs:
    """Return outputs of views that are all known, with the scores themselves, not a copy."""
    best = scores.topk(2, dim=2)
    known = torch.ones(scores.shape[:2], dtype=torch.bool)
    return Outputs(
        scores.argmax(2), best.values[..., 0] - best.values[..., 1], known, scores.shape[2], scores
    )


def with_gradients(values: Tensor, of: Tensor) -> Tensor:
    """Return values with the gradients of something else (straight-through)."""
    return of + (values - of).detach()


def _scores(outputs: Outputs) -> Tensor:
    assert outputs.scores is not None, "needs_scores makes the loop keep them"
    return outputs.scores
