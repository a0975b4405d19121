"""Aggregations that attackers can ascend: their classes' scores with gradients in every view.

A condition is a number that is positive where it holds. Conditions keep their signs when they are
joined, so that a class whose score is positive here is what the hard aggregation returns, as far as
votes are counted by probabilities and views are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SURE = 1e-9
"""Confidences are this far from 0 and 1 at least, where their log-odds are finite."""


def lead(scores: Tensor) -> Tensor:
    """Return by how much each class leads the best other one, (..., C) of (..., C >= 2)."""
    return scores - best_other(scores)


def best_other(scores: Tensor) -> Tensor:
    """Return the highest score of the other classes, (..., C) of (..., C >= 2)."""
    best = scores.topk(2, dim=-1)
    is_best = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best.indices[..., :1], True)
    return torch.where(is_best, best.values[..., 1:], best.values[..., :1])


def all_of(conditions: Tensor, dim: int) -> Tensor:
    """Return a condition that holds where all do: the worst, and the mean of what is missing.

    Its gradient reaches every condition that does not hold.
    """
    return conditions.amin(dim) + conditions.clamp(max=0.0).mean(dim)


def any_of(conditions: Tensor, dim: int) -> Tensor:
    """Return a condition that holds where some does; see ``all_of``."""
    return -all_of(-conditions, dim)


def expected_votes(scores: Tensor) -> Tensor:
    """Return the logarithm of the mean probability of each class, (N, C), of views (N, V, C)."""
    return scores.log_softmax(2).logsumexp(1) - torch.tensor(scores.shape[1]).log()


def masked_twice(one_mask: Tensor, row: Tensor, excused: Tensor | None = None) -> Tensor:
    """Return what one- and two-mask votes say for each class, (N, C); see ``DoubleMasking``.

    A class wins the vote and no other has a row of its own, or it has one without the vote.

    Args:
        one_mask: (N, M, C) scores under one mask.
        row: (N, L, C) scores of views that hide a certain mask of each image and another one; the
            first hides it alone.
        excused: (N, L, C) where views of the row need not have a class (positive), as the
            challenger game never asks about masks of one label; None for nowhere.
    """
    votes = lead(expected_votes(one_mask))
    of_row = lead(row)
    if excused is not None:
        of_row = torch.maximum(of_row, excused)
    unanimous = all_of(of_row, 1)
    by_vote = all_of(torch.stack([votes, -best_other(unanimous)]), 0)
    by_row = all_of(torch.stack([-votes, unanimous]), 0)
    return any_of(torch.stack([by_vote, by_row]), 0).asinh()


def uncontradicted(scores: Tensor, tau: float) -> Tensor:
    """Return what ``MinorityVote`` says for each class, (N, C): positive where it returns it.

    A class leads in the unmasked view, and no masked one has a confidence of ``tau`` in another
    that leads there. Where there is an alert the class that is nearest to being returned is
    highest; the inverse hyperbolic sine counts what is far away for less.

    Args:
        scores: (N, 1 + M, C), the unmasked view first.
        tau: in [0, 1].
    """
    confident = torch.tensor(tau).clamp(_SURE, 1 - _SURE).logit()
    masked = scores[:, 1:]
    quiet = confident - best_other(log_odds(masked))
    conditions = torch.cat([lead(scores[:, :1]), torch.maximum(lead(masked), quiet)], 1)
    return all_of(conditions, 1).asinh()


def log_odds(scores: Tensor) -> Tensor:
    """Return log p / (1 - p) of the softmax probabilities p, (..., C) of (..., C >= 2)."""
    log_p = scores.log_softmax(-1)
    # Of all classes but the best p is at most 1/2; without the bound that of the best, which is not
    # taken, would have infinite gradients.
    odds = log_p - torch.log1p(-log_p.exp().clamp(max=0.75))
    best, first = scores.max(-1, keepdim=True)  # its 1 - p may be too small for p
    others = scores.scatter(-1, first, -torch.inf).logsumexp(-1, keepdim=True)
    return odds.scatter(-1, first, best - others)
