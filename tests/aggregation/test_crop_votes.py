"""The deterministic certificate of votes against every way to vote."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn import functional

from patchproof.aggregation.crop_votes import (
    Votes,
    counting_condition,
    leads,
    majority,
    votes_to_turn,
)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_region_holds_if_and_only_if_no_votes_of_its_crops_win(classes: int) -> None:
    """A full adversary over the deployed majority, its ties included: 0 unsound, 0 missed."""
    unsound = missed = held = 0
    for labels in product(range(classes), repeat=5):
        votes = torch.tensor([labels])
        one_hot = functional.one_hot(votes, classes).transpose(1, 2)
        for pattern in ((), (0,), (0, 1), (1, 2, 4)):
            inside = torch.zeros(5, dtype=torch.int64)
            inside[list(pattern)] = 1
            corrupted = (one_hot * inside).sum(2)[..., None]
            counted = Votes(one_hot.sum(2), torch.zeros(1, dtype=torch.int64), corrupted)
            attacked = torch.tensor(
                [
                    [
                        changed[pattern.index(place)] if place in pattern else label
                        for place, label in enumerate(labels)
                    ]
                    for changed in product(range(-1, classes), repeat=len(pattern))
                ]
            )
            said = majority(attacked, classes)
            for label in range(classes):
                holds = bool(leads(counted, torch.tensor([label])) >= 0)
                stays = bool((said == label).all())
                unsound += holds and not stays
                missed += stays and not holds
                held += holds
    assert (unsound, missed) == (0, 0)
    assert held > 50


def test_unsure_votes_count_as_corrupted_everywhere() -> None:
    counts = torch.tensor([[5, 2]])
    nothing = torch.zeros(1, 2, 1, dtype=torch.int64)
    for unsure, lead in [(0, 3), (3, 0), (4, -1)]:
        votes = Votes(counts, torch.tensor([unsure]), nothing)
        assert int(leads(votes, torch.tensor([0]))) == lead


@pytest.mark.parametrize("patches", [2, 3])
def test_several_patches_hold_only_where_every_union_does(patches: int) -> None:
    generator = torch.Generator().manual_seed(patches)
    places, regions = 60, 5
    labels = (torch.rand(300, places, generator=generator) < 0.25).long()
    patterns = torch.rand(regions, places, generator=generator) < 0.06
    one_hot = functional.one_hot(labels, 2).transpose(1, 2)
    zeros = torch.zeros(300, dtype=torch.int64)

    def lead(patterns: torch.Tensor, patches: int) -> torch.Tensor:
        corrupted = (one_hot[..., None, :] & patterns.long()).sum(-1)
        return leads(Votes(one_hot.sum(2), zeros, corrupted), zeros, patches)

    unions = torch.stack(
        [patterns[list(chosen)].any(0) for chosen in product(range(regions), repeat=patches)]
    )
    exact, bound = lead(unions, 1).amin(1), lead(patterns, patches).amin(1)
    assert (bound <= exact).all()
    apart = patterns.sum(0).amax() <= 1
    assert ((bound >= 0) & (exact >= 0)).any()
    assert not apart or torch.equal(bound, exact)


def test_the_papers_condition_takes_a_tie_for_safe() -> None:
    counts = torch.tensor([[20, 100]])
    assert int(votes_to_turn(counts)) == 41
    assert counting_condition(counts, torch.tensor([1]), 40).all()
    votes = Votes(counts, torch.tensor([0]), torch.tensor([[[0], [40]]]))
    assert int(leads(votes, torch.tensor([1]))) < 0  # at 60 to 60 the lower class wins
    assert not counting_condition(counts, torch.tensor([1]), 41).any()
