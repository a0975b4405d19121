"""How likely a fresh draw of crops is right under the worst patch (randomized cropping).

The crops are drawn after the patch is there, secretly, and each prediction draws anew. With the
vote of every place known, the votes of n drawn crops are multinomial, or multivariate
hypergeometric without replacement, and the patch decides only for what the places vote that it
meets. The prediction is surely right if the label has strictly the most votes.

That is least likely if all places that the patch decides vote for the class c* with most benign
votes: given how many drawn crops vote for the label, the chance that no other class has as many is
Schur-concave in the numbers of places of the other classes, for both kinds of draw, and giving all
to the largest majorises every other way to share them out. For that worst case

    P(right) >= 1 - sum over c != y of P(N_c >= N_y),

and each term depends on how many places vote for y, and how many for c, alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from patchproof.aggregation.crop_votes import Votes, _others, _worst_others

_SLACK = 1e-10
"""More than rounding can take from a probability of ``overtaking``."""

_VALUES = 2**20
"""Float64 values that are computed at once."""

LARGEST_TABLE = 4095
"""The most places for which the chances of all pairs of vote counts are kept."""

Chance = Callable[[Tensor, Tensor], Tensor]
"""From how many places vote for the label, and for another class, to ``overtaking``."""


def overtaking(
    own: Tensor, other: Tensor, places: int, draws: int, replacement: bool = True
) -> Tensor:
    """Return the probability that a class has at least as many of the drawn votes as the label.

    Args:
        own: (...) int64, places that vote for the label.
        other: (...) int64, places that vote for the class; at most ``places - own``.
        places: V, all of them.
        draws: n, how many are drawn.
        replacement: whether a place can be drawn twice.

    Returns:
        (...) float64, no less than the exact value by rounding.
    """
    at_once = max(1, _VALUES // (draws + 1))
    parts = zip(
        torch.split(own.flatten(), at_once), torch.split(other.flatten(), at_once), strict=True
    )
    chances = [
        _overtaking(some_own, some_other, places, draws, replacement)
        for some_own, some_other in parts
    ]
    return (torch.cat(chances).view(own.shape) + _SLACK).clamp(max=1.0)


def _overtaking(own: Tensor, other: Tensor, places: int, draws: int, replacement: bool) -> Tensor:
    """Return ``overtaking`` of (P,) pairs but for the slack.

    Let m of the drawn votes be for either of the two, one after the other. That the class has at
    least as many becomes less likely when the label gets ahead of a tie, and more likely when a
    vote for the class makes a tie, which of all orders with that tie are half.
    """
    k = torch.arange(draws // 2 + 1, dtype=torch.float64)  # votes for each at a tie
    used = torch.zeros_like(k) if replacement else k
    left = (own + other)[:, None] - 2 * used
    ahead = (own[:, None] - used).clamp(min=0) / left.clamp(min=1)
    left = left if replacement else left - 1
    back = (other[:, None] - used).clamp(min=0) / left.clamp(min=1)
    ties = functional.pad((ahead * back * (4 * k + 2) / (k + 1)).cumprod(1), (1, 0), value=1.0)
    steps = torch.stack([-ties[:, :-1] * ahead, ties[:, 1:] / 2], 2).flatten(1)[:, :draws]
    at_least = 1 + functional.pad(steps.cumsum(1), (1, 0))  # after m = 0 to n of these votes
    sums, index = torch.unique(own + other, return_inverse=True)
    return (at_least * _drawn_of(sums, places, draws, replacement)[index]).sum(1)


def _drawn_of(votes: Tensor, places: int, draws: int, replacement: bool) -> Tensor:
    """Return the probability that m = 0 to n drawn places are of (S,), (S, n + 1) float64."""
    rest = places - votes[:, None]
    if not replacement:
        return (_log_choose(votes[:, None], draws) + _log_choose(rest, draws).flip(1)).softmax(1)
    m = torch.arange(draws + 1, dtype=torch.float64)
    logs = m.xlogy(votes[:, None]) + (draws - m).xlogy(rest)
    return (logs + _log_choose(torch.tensor([[draws]]), draws)).softmax(1)


def _log_choose(of: Tensor, most: int) -> Tensor:
    """Return the logarithms of C(of, k) for k = 0 to ``most``, (S, most + 1), of (S, 1)."""
    k = torch.arange(most, dtype=torch.float64)
    return functional.pad(((of - k).clamp(min=0) / (k + 1)).log().cumsum(1), (1, 0))


class ChanceTable:
    """``overtaking`` for one kind of draw, of pairs of vote counts; each pair is computed once.

    Args:
        places: V, at most ``LARGEST_TABLE``.
        draws: n.
        replacement: whether a place can be drawn twice.
    """

    def __init__(self, places: int, draws: int, replacement: bool = True) -> None:
        self._draw = (places, draws, replacement)
        self._chances = torch.full(((places + 1) ** 2,), torch.nan, dtype=torch.float64)

    def __call__(self, own: Tensor, other: Tensor) -> Tensor:
        """Return the chances of (...) int64 pairs, (...) float64."""
        side = self._draw[0] + 1
        codes = own * side + other
        asked = torch.zeros(len(self._chances), dtype=torch.bool)
        asked[codes.flatten()] = True
        new = (asked & self._chances.isnan()).nonzero().squeeze(1)
        self._chances[new] = overtaking(new // side, new % side, *self._draw)
        return self._chances[codes]


def success_probability(
    votes: Votes, labels: Tensor, places: int, chance: Chance, patches: int = 1
) -> Tensor:
    """Return a lower bound of the probability that a fresh draw is right, whatever the patch shows.

    Args:
        votes: of all places of N images; without regions for clean images.
        labels: (N,) int64.
        places: V.
        chance: ``overtaking`` of so many places, by pairs of vote counts.
        patches: how many there are; the probability at a region is with the others at the worst.

    Returns:
        (N, R) float64, at each region.
    """
    chosen = labels[:, None, None].expand(-1, 1, votes.corrupted.shape[2])
    rivals, attacked = votes.benign(), votes.attacked()
    own = rivals.gather(1, chosen).squeeze(1)
    if patches > 1:
        taken = votes.corrupted.sum(1)
        own = own - _worst_others(votes.corrupted.gather(1, chosen).squeeze(1), patches)
        attacked = attacked + _worst_others(taken, patches)
    own = own.clamp(min=0)
    rivals = rivals.masked_fill(~_others(votes.counts, labels)[..., None], -1)
    runner_up = rivals.argmax(1, keepdim=True)
    rivals = rivals.scatter_add(1, runner_up, attacked[:, None].to(rivals.dtype))
    rivals = torch.minimum(rivals, (places - own[:, None]).to(rivals.dtype))
    failing = chance(own[:, None].expand_as(rivals), rivals.clamp(min=0))
    return (1 - failing.masked_fill(rivals < 0, 0.0).sum(1)).clamp(min=0.0)


def success_by_shares(
    own: Tensor, rivals: Tensor, attacked: int, places: int, chance: Chance
) -> Tensor:
    """Return what ``success_probability`` does, from bounds of the votes instead of the votes.

    Which class gains most from what the patch decides is not known, so that each is tried.

    Args:
        own: (N,) int64, at least so many places vote for the label.
        rivals: (N, C) int64, at most so many for each class; negative for the label.
        attacked: places that the patch decides; any of them may vote for the label without it.
        places: V.
        chance: ``overtaking`` of so many places, by pairs of vote counts.

    Returns:
        (N,) float64, at the worst region.
    """
    left = (own - attacked).clamp(min=0)[:, None].expand_as(rivals)
    apart, joined = (
        chance(left, torch.minimum(rivals.clamp(min=0) + more, places - left)).masked_fill(
            rivals < 0, 0.0
        )
        for more in (0, attacked)
    )
    return (1 - apart.sum(1) - (joined - apart).amax(1)).clamp(min=0.0)


def hit_tail(shares: Tensor) -> Tensor:
    """Return the probability that at most k of n independent draws hit, for k = 0 to n.

    Args:
        shares: (n,) float64, the probability of each draw to hit.

    Returns:
        (n + 1,) float64.
    """
    chances = torch.ones(1, dtype=torch.float64)
    for share in shares.tolist():
        missed, hit = functional.pad(chances, (0, 1)), functional.pad(chances, (1, 0))
        chances = missed * (1 - share) + hit * share
    return chances.cumsum(0).clamp(max=1.0)


def hit_shares(overlapping: int, places: int, draws: int, replacement: bool = True) -> Tensor:
    """Return the probability that the paper gives each draw to meet the patch, (n,) float64.

    Args:
        overlapping: n_adv, the most places whose crops meet a patch (Equations 2 and 7).
        places: n_all.
        draws: n.
        replacement: p_a (Equation 4), or p_a^i of the i-th draw (Equation 9), i from 1, which
            lessens the places but not those that meet the patch.
    """
    left = torch.full((draws,), float(places), dtype=torch.float64)
    if not replacement:
        left -= torch.arange(1, draws + 1)
    return torch.where(left > 0, overlapping / left, 1.0).clamp(max=1.0)
