"""The majority vote of crops, and its deterministic certificate (randomized cropping).

Every crop votes for one class; the class with most votes wins, the lowest of equal ones. A patch
region corrupts the crops that meet it, which may then vote for anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Votes:
    """How many crops of each image vote for each class, in all and among those a region corrupts.

    Attributes:
        counts: (N, C) int64, votes for each class that rounding cannot change.
        unsure: (N,) int64, votes that rounding may change: they count as corrupted at every region.
        corrupted: (N, C, R) int64, the part of ``counts`` that region r corrupts.
    """

    counts: Tensor
    unsure: Tensor
    corrupted: Tensor

    def benign(self) -> Tensor:
        """Return what is left of ``counts`` at each region, (N, C, R)."""
        return self.counts[..., None] - self.corrupted

    def attacked(self) -> Tensor:
        """Return how many votes the patch decides at each region, (N, R)."""
        return self.corrupted.sum(1) + self.unsure[:, None]


def majority(labels: Tensor, classes: int) -> Tensor:
    """Return the class with most votes, (N,) int64, the lowest of equal ones.

    Args:
        labels: (N, n) int64, the class that each crop votes for; negative for none.
        classes: C.
    """
    return count_votes(labels, classes)[:, :classes].argmax(1)


def count_votes(labels: Tensor, classes: int) -> Tensor:
    """Count the votes for each class, and last those for none, (N, C + 1) int64."""
    votes = torch.where(labels < 0, classes, labels)
    counts = torch.zeros(len(labels), classes + 1, dtype=torch.int64)
    return counts.scatter_add_(1, votes, torch.ones_like(votes))


def leads(votes: Votes, labels: Tensor, patches: int = 1) -> Tensor:
    """Return by how many votes the label stays ahead, (N, R) int64: not negative if it wins.

    It is the least over the other classes of the label's benign votes minus that class's and all
    that the patch decides; one less where the other class wins ties. The patch can do just this, so
    that a negative lead is a lost region (were no vote unsure).

    With several patches, each takes from the lead what it takes alone, at most: a crop that two
    of them meet is counted for both.

    Args:
        votes: of N images.
        labels: (N,) int64.
        patches: how many patches there are; the lead at a region is with the others at the worst.
    """
    others = _others(votes.counts, labels)
    wins_ties = (torch.arange(votes.counts.shape[1]) < labels[:, None]).long()
    own = votes.counts.gather(1, labels[:, None])
    alone = own - votes.counts - votes.unsure[:, None] - wins_ties  # (N, C), no patch
    taken = votes.corrupted.gather(1, labels[:, None, None].expand(-1, 1, votes.corrupted.shape[2]))
    taken = taken - votes.corrupted + votes.corrupted.sum(1, keepdim=True)
    if patches > 1:
        taken = taken + _worst_others(taken, patches)
    ahead = alone[..., None] - taken
    return ahead.masked_fill(~others[..., None], torch.iinfo(torch.int64).max).amin(1)


def counting_condition(counts: Tensor, labels: Tensor, overlapping: int) -> Tensor:
    """Return where the votes to turn (Equation 5) are more than a patch meets crops, (N,) bool.

    The criterion of the paper for all crops. It takes a tie for safe, so it is not sound.

    Args:
        counts: (N, C) int64, all votes.
        labels: (N,) int64.
        overlapping: the most crops that a patch meets.
    """
    return (overlapping < votes_to_turn(counts)) & (counts.argmax(1) == labels)


def votes_to_turn(counts: Tensor) -> Tensor:
    """Return n_2to1 = (n_1 - n_2) // 2 + 1 of counts (N, C), (N,) int64 (Equation 5)."""
    first, second = counts.topk(2, dim=1).values.unbind(1)
    return (first - second) // 2 + 1


def _others(counts: Tensor, labels: Tensor) -> Tensor:
    """Return which classes are not the label, (N, C) bool."""
    return functional.one_hot(labels, counts.shape[1]) == 0


def _worst_others(taken: Tensor, patches: int) -> Tensor:
    """Return the most that ``patches - 1`` other regions than each take together, as (..., R)."""
    most = taken.topk(min(patches, taken.shape[-1]), dim=-1).values
    without_last = most[..., : patches - 1].sum(-1, keepdim=True)
    is_among = taken >= most[..., -1:]
    return torch.where(is_among, most.sum(-1, keepdim=True) - taken, without_last)
