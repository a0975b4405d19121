"""Sums of evidence are exact, so that no attacker decides by rounding; and other narrow escapes."""

import copy

import pytest
import torch
from tables import recorded

from patchproof.aggregation import (
    CountedVotes,
    RobustMasking,
    Windows,
    trimmed_sum,
    without_largest,
)
from patchproof.aggregation.evidence import Confidence, Logits, Prediction
from patchproof.errors import PatchproofError
from patchproof.results import Verdict


def pattern(cells, views):
    """Return one pattern of corrupted views, (1, V) bool."""
    corrupted = torch.zeros(1, views, dtype=torch.bool)
    corrupted[0, cells] = True
    return corrupted


def holds(aggregation, scores, label, patterns):
    """Return whether one image, (V, C) scores, is right and certified."""
    outputs, labels = recorded(scores[None]), torch.tensor([label])
    verdicts = aggregation.certify(outputs, labels, patterns)
    right = aggregation.predict(outputs)[0] == labels
    return bool(right) and bool((verdicts == Verdict.HOLDS).all())


def predicted(aggregation, scores):
    return int(aggregation.predict(recorded(scores[None]))[0])


@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_a_tiny_value_does_not_hide_behind_a_large_one(tolerance):
    # Both windows hold 1e6 in float64, and the first would leave the tiny value of class 1.
    masking = RobustMasking(Windows((1, 6), (1, 2)), Logits(), tolerance=tolerance)
    clean = torch.full((6, 2), -1.0)
    attacked = clean.clone()
    attacked[1, 1], attacked[2, 1] = 1e6, 5e-11
    certified = holds(masking, clean, 0, pattern([1, 2], 6))
    assert not certified or predicted(masking, attacked) == 0


@pytest.mark.parametrize("high", [0.05, 0.1, 0.3, 0.7, 1.3, 3.7])
@pytest.mark.parametrize("trim", [0, 1])
def test_ties_at_any_clipping_bound_are_ties(high, trim):
    for half in range(2, 12):
        statistic = trimmed_sum(Logits(high=high), 2 * half, trim, 1e-3)
        clean = torch.tensor([-1.0, 9.0]).repeat(2 * half, 1)
        attacked = clean.clone()
        attacked[:half] = clean[:half].flip(1)
        assert predicted(statistic, attacked) == 0
        assert not holds(statistic, clean, 1, pattern(range(half), 2 * half))


def test_sums_of_evidence_are_exact_in_any_order():
    scores = torch.randn(3, 200, 4, generator=torch.Generator().manual_seed(0)) * 100
    for evidence in (Logits(), Logits(high=0.3), Confidence()):
        values = evidence.values(recorded(scores))
        assert torch.equal(values.sum(1), values.flip(1).cumsum(1)[:, -1])
        assert (values >= evidence.low).all()
        assert (values <= evidence.high).all()
        assert torch.equal(values.sum(1) - values[:, :50].sum(1), values[:, 50:].sum(1))


def test_a_range_within_a_step_is_refused():
    with pytest.raises(PatchproofError, match="low < high"):
        Logits(low=1e6 - 1e-9, high=1e6)


def test_huge_clean_scores_do_not_certify_confidences():
    # The rounding of 1e8 is 1e3 logits, whose exponential is infinite.
    masking = RobustMasking(Windows((1, 6), (1, 2)), Confidence(), tolerance=1e-3)
    clean = torch.tensor([[0, 0], [50, 0], [50, 0], [0, 1], [0, 1], [1e8, 0]])
    attacked = clean.clone()
    attacked[1:3] = torch.tensor([0.0, 50.0])
    assert predicted(masking, clean) == 0
    assert predicted(masking, attacked) == 1
    assert not holds(masking, clean, 0, pattern([1, 2], 6))


def test_rounding_can_take_the_vote_of_a_confidence_of_one():
    votes = CountedVotes(1.0, 1e-3)
    clean = torch.tensor([0.0, 36.7375]).repeat(3, 1)
    moved = clean - torch.tensor([0.0, 1e-3])
    if predicted(votes, clean) == 1 and predicted(votes, moved) == 0:
        assert not holds(votes, clean, 1, pattern([], 3))
    sure = torch.tensor([0.0, 60.0]).repeat(3, 1)
    assert holds(votes, sure, 1, pattern([0], 3))


def test_a_pattern_that_no_window_holds_is_lost_whatever_the_other_classes_say():
    masking = RobustMasking(Windows((1, 8), (1, 2)), Prediction(), tolerance=0.0)
    clean = torch.tensor([5.0, 0.0, 0.0]).repeat(8, 1)
    assert holds(masking, clean, 0, pattern([1, 2], 8))
    assert not holds(masking, clean, 0, pattern([0, 3, 6], 8))


def test_statistics_hold_where_no_view_is_corrupted():
    assert (
        holds(trimmed_sum(Logits(), 4, 0, 1e-3), torch.eye(2).repeat(2, 1) * 3, 0, pattern([], 4))
        is False
    )
    assert holds(
        trimmed_sum(Logits(), 4, 0, 1e-3),
        torch.tensor([[2.0, 0.0]]).repeat(4, 1),
        0,
        pattern([], 4),
    )


def test_a_copy_does_not_take_other_patterns_for_its_own():
    masking = RobustMasking(Windows((1, 4), (1, 2)), Logits(), tolerance=0.0)
    first, second = pattern([0, 1], 4), pattern([0, 3], 4)
    scores = torch.tensor([[3.0, 1.0]]).repeat(4, 1)
    holds(masking, scores, 0, first)
    other = copy.deepcopy(masking)
    other._overlaps[id(second)] = other._overlaps.pop(id(first))  # as where an address is reused
    assert not holds(other, scores, 0, second)


@pytest.mark.parametrize("count", [1.5, True, "1", None])
@pytest.mark.parametrize("make", [trimmed_sum, without_largest])
def test_views_are_left_out_in_whole_numbers(make, count):
    with pytest.raises(PatchproofError, match="expected from 0 to less than"):
        make(Logits(), 8, count, 1e-3)
