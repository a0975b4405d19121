"""Ascent by gradients: the loop that PGD, IFGSM and LaVAN share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from patchproof.attacks.base import CLEAR_LEAD, PatchAttack, Problem
from patchproof.errors import PatchproofError

Start = Literal["random", "black-white", "image", "grey"]
"""What a patch shows first: uniform noise, noise of black and white, what was there, or grey."""
Schedule = Literal["constant", "linear", "cosine", "halving"]
"""How step sizes fall: not at all, to a tenth on a line or a cosine, or by half five times."""
_ALWAYS_THE_SAME = ("image", "grey")
"""Starts in which nothing is random: a restart would find the same again."""

_LAST = 0.1
_HALVINGS = 5


@dataclass(frozen=True, kw_only=True)
class GradientAttack(PatchAttack):
    """An attack that follows the gradient of the surrogate's loss in the pixels of the patch.

    Attributes:
        steps: of the ascent.
        step_size: how far the first step moves each pixel, in [0, 1].
        schedule: how the step sizes fall.
        momentum: how much of the last direction stays, from 0 (Dong et al., 2018).
        start: what the patch shows first.

    Raises:
        PatchproofError: numbers out of range.
    """

    steps: int = 40
    step_size: float = 0.1
    schedule: Schedule = "cosine"
    momentum: float = 0.0
    start: Start = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.steps, int) or self.steps < 1:
            raise PatchproofError(f"steps: expected at least 1, got {self.steps!r}")
        if not 0.0 < self.step_size <= 1.0:
            raise PatchproofError(f"step_size: expected in (0, 1], got {self.step_size!r}")
        if not 0.0 <= self.momentum < float("inf"):
            raise PatchproofError(f"momentum: expected a number >= 0, got {self.momentum!r}")
        for name, value, known in (
            ("schedule", self.schedule, get_args(Schedule)),
            ("start", self.start, get_args(Start)),
        ):
            if value not in known:
                raise PatchproofError(f"{name}: expected {' or '.join(known)}, got {value!r}")
        if self.restarts > 1 and self.start in _ALWAYS_THE_SAME:
            raise PatchproofError(
                f"restarts: expected 1 where all start from the same, {self.start!r}, "
                f"got {self.restarts}: take start 'random' or 'black-white'"
            )

    def optimise(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Ascend, and keep the best content of each row."""
        return ascend(
            problem, first_content(problem, self.start), self.steps, self.size_at, self.momentum
        )

    def size_at(self, step: int) -> float:
        """Return the size of a step, from 0 on."""
        done = step / self.steps
        factor = {
            "constant": 1.0,
            "linear": 1.0 - (1.0 - _LAST) * done,
            "cosine": _LAST + (1.0 - _LAST) * (1.0 + math.cos(math.pi * done)) / 2,
            "halving": 0.5 ** int(_HALVINGS * done),
        }
        return self.step_size * factor[self.schedule]


def first_content(problem: Problem, start: Start) -> Tensor:
    """Return what the patches show first, (B, C, H, W)."""
    if start == "image":
        return problem.images.clone()
    if start == "grey":
        return torch.full_like(problem.images, 0.5)
    drawn = problem.uniform()
    return drawn.round() if start == "black-white" else drawn


def by_sign(content: Tensor, direction: Tensor, size: float) -> Tensor:
    """Move each pixel by the step size, as the sign of the direction says, within [0, 1]."""
    return (content + size * direction.sign()).clamp_(0.0, 1.0)


def ascend(
    problem: Problem,
    content: Tensor,
    steps: int,
    size_at: Callable[[int], float],
    momentum: float = 0.0,
    move: Callable[[Tensor, Tensor, float], Tensor] = by_sign,
) -> tuple[Tensor, Tensor]:
    """Follow the gradient of ``problem.loss`` in the pixels of the patch.

    Rows in which a surrogate that is exact says that the attacker clearly leads stop there.

    Args:
        problem: B rows.
        content: (B, C, H, W), what the patches show first.
        steps: of the ascent.
        size_at: the step size from the number of the step.
        momentum: how much of the last direction stays; directions are scaled to a mean absolute
            value of 1 in the patch before they are added up.
        move: from the content, a direction and the step size to the next content.

    Returns:
        The attacked images of highest objective of each row, and that objective, (B,).
    """
    scores = problem.scores
    assert scores is not None, "needs_scores"
    exact = bool(getattr(scores, "exact", False))
    best = problem.paste(content)
    best_objective = torch.full((len(best),), -torch.inf, device=best.device)
    velocity = torch.zeros_like(content)
    rows = torch.arange(len(best), device=best.device)
    left = problem
    for step in range(steps + 1):
        given = content.detach().requires_grad_()
        with torch.set_grad_enabled(step < steps):
            images = left.paste(given)
            found = scores(images)
            objective = left.objective(found.detach())
            loss = left.loss(found).sum() if step < steps else None
        better = objective > best_objective[rows]
        best[rows[better]] = images.detach()[better]
        best_objective[rows] = torch.maximum(objective, best_objective[rows])
        if loss is None:
            break
        (slope,) = torch.autograd.grad(loss, given)
        slope = slope.nan_to_num_()
        if momentum:
            scale = slope.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
            velocity = momentum * velocity + slope / scale
            slope = velocity
        content = move(given.detach(), slope, size_at(step))
        if exact and bool((won := objective > CLEAR_LEAD).any()):
            going_on = (~won).nonzero().squeeze(1)
            if not len(going_on):
                break
            rows, content, velocity = rows[going_on], content[going_on], velocity[going_on]
            left = left.select(going_on)
    return best, best_objective
