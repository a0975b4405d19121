"""Localized and visible adversarial noise (LaVAN; Karmon, Zoran and Goldberg, 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from patchproof.attacks.base import Problem
from patchproof.attacks.gradient import GradientAttack, Schedule, ascend, first_content


@dataclass(frozen=True, kw_only=True)
class LaVAN(GradientAttack):
    """Steps along the gradient itself, that raise one class's score over that of the label.

    The class is the target; without one, it is the best wrong class of what the patch shows first,
    and stays so, while any wrong class is a success. Pixels move as far as their part in the
    gradient says, the foremost of each row by the step size. The noise stays in [0, 1], as a
    threat demands (the paper's image domain); ``loss`` is not used.
    """

    steps: int = 60
    step_size: float = 0.5
    schedule: Schedule = "linear"

    name: ClassVar[str] = "lavan"

    def optimise(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Ascend the difference of two scores, and keep the best content of each row."""
        content = first_content(problem, self.start)
        rivals = problem.targets
        if rivals is None:
            assert problem.scores is not None, "needs_scores"
            with torch.no_grad():
                scores = problem.scores(problem.paste(content))
            rivals = scores.scatter(1, problem.labels[:, None], -torch.inf).argmax(1)
        known = {entry.name: getattr(problem, entry.name) for entry in fields(problem)}
        duel = _Duel(**known, rivals=rivals)
        return ascend(duel, content, self.steps, self.size_at, self.momentum, by_slope)


@dataclass(frozen=True, eq=False)
class _Duel(Problem):
    """Tries to raise the score of one class, ``rivals`` (B,) int64, over that of the label."""

    rivals: Tensor = field(kw_only=True)

    def select(self, rows: Tensor) -> Self:
        """Return some of the rows, by (n,) indices."""
        return replace(super().select(rows), rivals=self.rivals[rows])

    def loss(self, scores: Tensor) -> Tensor:
        """Return the rival's score less the label's, (B,)."""
        pair = torch.stack([self.rivals, self.labels], 1)
        rival, label = scores.gather(1, pair).unbind(1)
        return rival - label


def by_slope(content: Tensor, direction: Tensor, size: float) -> Tensor:
    """Move each pixel by its part of the direction, the largest by the step size, in [0, 1]."""
    largest = direction.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return (content + size * direction / largest).clamp_(0.0, 1.0)
