"""The probabilities of drawn votes against plain enumeration."""

from __future__ import annotations

from functools import partial
from math import comb, factorial, perm, prod

import pytest
import torch
from scipy.stats import binom, multivariate_hypergeom
from torch import Tensor

from patchproof.aggregation.crop_draws import (
    ChanceTable,
    hit_shares,
    hit_tail,
    overtaking,
    success_by_shares,
    success_probability,
)
from patchproof.aggregation.crop_votes import Votes


def draws_of(
    votes: tuple[int, ...], number: int, replacement: bool
) -> dict[tuple[int, ...], float]:
    """Return the probability of each count of drawn votes, by counting ordered draws."""
    places = sum(votes)
    found = {}
    for drawn in splits(number, len(votes)):
        orders = factorial(number) // prod(map(factorial, drawn))
        if replacement:
            ways = prod(count**k for count, k in zip(votes, drawn, strict=True))
            found[drawn] = orders * ways / places**number
        else:
            ways = prod(perm(count, k) for count, k in zip(votes, drawn, strict=True))
            found[drawn] = orders * ways / perm(places, number)
    return found


def splits(total: int, parts: int) -> list[tuple[int, ...]]:
    """Return every way to write a number as a sum of so many."""
    if parts == 1:
        return [(total,)]
    return [(k, *rest) for k in range(total + 1) for rest in splits(total - k, parts - 1)]


def right(votes: tuple[int, ...], label: int, number: int, replacement: bool) -> float:
    """Return the probability that the label has strictly the most of the drawn votes."""
    return sum(
        chance
        for drawn, chance in draws_of(votes, number, replacement).items()
        if all(drawn[label] > other for c, other in enumerate(drawn) if c != label)
    )


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_overtaking_is_the_enumerated_chance(number: int, replacement: bool) -> None:
    places = 6
    for own in range(places + 1):
        for other in range(places + 1 - own):
            votes = (own, other, places - own - other)
            expected = sum(
                chance
                for drawn, chance in draws_of(votes, number, replacement).items()
                if drawn[1] >= drawn[0]
            )
            [found] = overtaking(
                torch.tensor([own]), torch.tensor([other]), places, number, replacement
            ).tolist()
            assert expected <= found + 1e-12
            assert found == pytest.approx(expected, abs=1e-9)


def test_many_draws_without_replacement_agree_with_scipy() -> None:
    places, draws, own, other = 529, 40, 220, 150
    exact = sum(
        multivariate_hypergeom.pmf([i, j, draws - i - j], [own, other, places - own - other], draws)
        for i in range(draws + 1)
        for j in range(i, draws + 1 - i)
    )
    [found] = overtaking(
        torch.tensor([own]), torch.tensor([other]), places, draws, replacement=False
    ).tolist()
    assert found == pytest.approx(exact, abs=1e-8)


def test_many_draws_with_replacement_keep_their_precision() -> None:
    # Two classes of equal chance: at least as many with the chance (1 + that of a tie) / 2.
    tie = comb(512, 256) / 2**512
    [found] = overtaking(torch.tensor([8]), torch.tensor([8]), 16, 512).tolist()
    assert found == pytest.approx((1 + tie) / 2, abs=1e-9)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_the_bound_holds_for_every_way_to_vote(number: int, replacement: bool) -> None:
    """All ways in which corrupted and unsure crops can vote, the label and no class among them."""
    for benign in [(4, 1, 0), (3, 1, 1), (2, 2, 0), (5, 0, 0)]:
        for hit, unsure in [(1, 0), (2, 0), (1, 1), (3, 0)]:
            places = sum(benign) + hit + unsure
            # What the corrupted crops voted for on the clean image does not matter: here, label 0.
            counts = torch.tensor([[benign[0] + hit, *benign[1:]]])
            corrupted = torch.tensor([[[hit], [0], [0]]])
            votes = Votes(counts, torch.tensor([unsure]), corrupted)
            chance = partial(overtaking, places=places, draws=number, replacement=replacement)
            [[bound]] = success_probability(votes, torch.tensor([0]), places, chance).tolist()
            worst = min(
                right(
                    tuple(b + s for b, s in zip((*benign, 0), split, strict=True)),
                    0,
                    number,
                    replacement,
                )
                for split in splits(hit + unsure, 4)
            )
            assert bound <= worst + 1e-12


@pytest.mark.parametrize("replacement", [True, False])
def test_the_bound_agrees_to_four_digits_where_it_matters(replacement: bool) -> None:
    number, places = 40, 50
    for votes in [(33, 7, 0), (30, 6, 4), (34, 3, 3)]:
        counts = torch.tensor([[votes[0] + 10, *votes[1:]]])
        counted = Votes(counts, torch.tensor([0]), torch.tensor([[[10], [0], [0]]]))
        chance = ChanceTable(places, number, replacement)
        [[bound]] = success_probability(counted, torch.tensor([0]), places, chance).tolist()
        attacked = (votes[0], votes[1] + 10, votes[2])
        exact = right(attacked, 0, number, replacement)
        assert exact > 0.8
        assert bound == pytest.approx(exact, abs=1e-4)
        assert bound <= exact


def test_several_patches_are_at_least_as_bad_as_any_two_regions() -> None:
    generator = torch.Generator().manual_seed(0)
    places, classes, number = 12, 3, 5
    labels = torch.randint(1, classes, (40, places), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.8] = 0
    regions = torch.rand(4, places, generator=generator) < 0.15
    one_hot = torch.nn.functional.one_hot(labels, classes).transpose(1, 2)

    def votes(patterns: Tensor) -> Votes:
        corrupted = (one_hot[..., None, :] & patterns.long()).sum(-1)
        return Votes(one_hot.sum(2), torch.zeros(40, dtype=torch.int64), corrupted)

    chance = ChanceTable(places, number)
    zeros = torch.zeros(40, dtype=torch.int64)
    pairs = torch.stack([regions[a] | regions[b] for a in range(4) for b in range(a)])
    exact = success_probability(votes(pairs), zeros, places, chance).amin(1)
    bound = success_probability(votes(regions), zeros, places, chance, patches=2).amin(1)
    assert (bound <= exact + 1e-12).all()
    assert (bound > 0.1).any()


def test_bounds_of_the_votes_give_no_more_than_the_votes() -> None:
    places, number = 20, 9
    chance = ChanceTable(places, number)
    counts = torch.tensor([[15, 3, 2], [12, 8, 0], [6, 7, 7], [18, 1, 1]])
    label = torch.zeros(4, dtype=torch.int64)
    for hit in (0, 2, 4):
        corrupted = torch.zeros(4, 3, 1, dtype=torch.int64)
        corrupted[:, 0] = hit  # the worst that is possible: all of them voted for the label
        votes = Votes(counts, torch.zeros(4, dtype=torch.int64), corrupted)
        exact = success_probability(votes, label, places, chance).squeeze(1)
        rivals = counts.clone()
        rivals[:, 0] = -1
        bound = success_by_shares(counts[:, 0], rivals, hit, places, chance)
        assert (bound <= exact + 1e-12).all()
        likely = exact > 0.5
        assert likely.any()
        assert torch.allclose(bound[likely], exact[likely], atol=1e-9)


def test_hits_of_equal_draws_are_binomial() -> None:
    tail = hit_tail(hit_shares(196, 529, 128))
    assert tail.numpy() == pytest.approx(binom.cdf(range(129), 128, 196 / 529), abs=1e-12)


def test_draws_of_the_paper_without_replacement_become_certain_to_hit() -> None:
    shares = hit_shares(196, 529, 512, replacement=False)
    assert shares[0] == pytest.approx(196 / 528)
    assert shares[-1] == 1.0
    assert hit_tail(shares)[100] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("chance", "expected"),
    [("paper", 0.37), ("worst", 0.29)],
)
def test_the_papers_probability_is_optimistic(chance: str, expected: float) -> None:
    """At 85% of the votes, 128 of 529 crops of which a patch meets 196."""
    counts = torch.tensor([[450, 79]])
    if chance == "paper":
        turn = (round(0.85 * 128) - round(0.15 * 128)) // 2 + 1
        found = float(hit_tail(hit_shares(196, 529, 128))[turn - 1])
    else:
        votes = Votes(counts, torch.zeros(1, dtype=torch.int64), torch.tensor([[[196], [0]]]))
        table = ChanceTable(529, 128)
        found = float(success_probability(votes, torch.tensor([0]), 529, table))
    assert found == pytest.approx(expected, abs=0.01)
