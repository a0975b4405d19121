"""Soft aggregations: their signs are those of the hard ones, and their gradients are finite."""

from __future__ import annotations

import pytest
import torch
from tables import recorded
from torch import Tensor
from torch.nn import functional

from patchproof.aggregation import (
    Confidence,
    ConfidentVotes,
    DoubleMasking,
    Evidence,
    Logits,
    MinorityVote,
    Prediction,
    RobustMasking,
    TanhLogits,
    Windows,
    WindowVote,
    median,
)
from patchproof.aggregation.soft import all_of, any_of, expected_votes, lead, log_odds, masked_twice
from patchproof.results import ALERT, Case

CLASSES = 3


def scores_of(images: int, views: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(images, views, CLASSES, generator=generator)


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_a_positive_class_is_what_the_detectors_return(tau: float) -> None:
    scores = scores_of(300, 5)
    scores[:100] = scores[:100, :1] + scores_of(100, 5, 0.5, seed=1)
    vote = MinorityVote(tau, 0.0)
    window = WindowVote(Windows((1, 5), (1, 2)), tau, 0.0)
    for how in (vote, window):
        label, _ = how.predict(recorded(scores))
        found = how.soft_scores(scores)
        positive = found > 0
        assert positive.sum(1).le(1).all()
        assert torch.equal(positive.any(1), label != ALERT)
        assert torch.equal(found.argmax(1)[label != ALERT], label[label != ALERT])
        assert (label != ALERT).any()


def test_the_class_that_double_masking_returns_is_highest() -> None:
    """Every table of four masks with at most one that disagrees, whose row is looked at."""
    masks = 4
    rows, columns = torch.triu_indices(masks, masks)
    pairs = torch.empty(masks, masks, dtype=torch.int64)
    pairs[rows, columns] = pairs[columns, rows] = torch.arange(len(rows))
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (4000, len(rows)), generator=generator)
    # Rows of one label are rare in random tables.
    labels[:2000, pairs[0]] = torch.where(
        torch.rand(2000, masks, generator=generator) < 0.8,
        labels[:2000, pairs[0, :1]],
        labels[:2000, pairs[0]],
    )
    one_mask = labels[:, pairs.diagonal()]
    vote = functional.one_hot(one_mask, CLASSES).sum(1)
    disagrees = one_mask != vote.argmax(1, keepdim=True)
    fits = (vote.topk(2).values.diff().squeeze(1) < 0) & (disagrees.sum(1) <= 1)
    labels, one_mask, disagrees = labels[fits], one_mask[fits], disagrees[fits]
    scores = 50.0 * functional.one_hot(labels, CLASSES)
    row = disagrees.int().argmax(1)
    views = pairs[row][:, [0, 1, 2, 3]]
    of_row = scores[torch.arange(len(scores))[:, None], views]
    found = masked_twice(scores[:, pairs.diagonal()], of_row)
    label, case = DoubleMasking(pairs, 0.0).predict(recorded(scores))
    assert (case == int(Case.DISAGREER)).sum() > 50
    assert (case == int(Case.MAJORITY)).sum() > 50
    assert torch.equal(found.argmax(1), label)
    assert (found.gather(1, label[:, None]) > 0).all()
    assert ((found > 0).sum(1) == 1).all()


def test_what_the_challenger_game_never_asks_does_not_count() -> None:
    one_mask = 9.0 * functional.one_hot(torch.tensor([[0, 0, 1, 1]]), CLASSES)
    row = 9.0 * functional.one_hot(torch.tensor([[1, 1, 1, 0]]), CLASSES)
    excused = lead(one_mask[:, [2, 0, 1, 3]]).index_fill(1, torch.tensor([0]), -torch.inf)
    assert masked_twice(one_mask, row)[0, 1] < 0
    assert masked_twice(one_mask[:, :3], row, excused)[0, 1] > 0


@pytest.mark.parametrize(
    "evidence",
    [
        Logits(),
        Logits(0.0, 2.0),
        TanhLogits(),
        Confidence(),
        Prediction(),
        ConfidentVotes(least=0.3),
        ConfidentVotes(least=0.0),
    ],
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 200.0])
def test_straight_through_evidence_has_the_values_and_soft_gradients(
    evidence: Evidence, scale: float
) -> None:
    scores = scores_of(4, 6, scale).requires_grad_()
    values = evidence.straight_through(scores)
    exact = evidence.values(recorded(scores.detach()))
    torch.testing.assert_close(values, exact, rtol=0, atol=1e-9)
    soft = evidence.soft(scores)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).double()
    through, of_soft = (
        torch.autograd.grad((part * weights).sum(), scores)[0] for part in (values, soft)
    )
    assert through.isfinite().all()
    assert torch.equal(through, of_soft)
    assert scale > 100 or through.abs().amax() > 0


def test_soft_evidence_is_the_evidence_where_that_has_gradients() -> None:
    scores = scores_of(4, 6)
    for evidence in (Logits(), TanhLogits(), Confidence()):
        torch.testing.assert_close(
            evidence.soft(scores), evidence.values(recorded(scores)), rtol=0, atol=1e-4
        )
    confident = scores.softmax(2) >= 0.3
    assert torch.equal(ConfidentVotes(least=0.3).soft(scores) >= 0.5, confident)


def test_clipped_logits_have_gradients_on_both_sides() -> None:
    scores = torch.tensor([[[-3.0, 1.0, 7.0]]], requires_grad=True)
    soft = Logits(0.0, 2.0).soft(scores)
    assert soft.tolist() == [[[0.0, 1.0, 2.0]]]
    (gradient,) = torch.autograd.grad(soft.sum(), scores)
    assert gradient.tolist() == [[[1.0, 1.0, 1.0]]]


def test_the_median_moves_views_near_it() -> None:
    scores = scores_of(3, 9).requires_grad_()
    how = median(Confidence(), 9, 0.0)
    found = how.soft_scores(scores)
    expected = scores.softmax(2).double().median(1).values / 9
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), scores)
    assert ((gradient.abs().amax(2) > 0).sum(1) == 7).all()


def test_evidence_that_stands_out_counts_for_nothing_below_detection() -> None:
    scores = torch.ones(1, 6, 2)
    scores[0, 0] = 3.0
    how = RobustMasking(Windows((1, 6), (1, 2)), Logits(), tolerance=0.0)
    scores.requires_grad_()
    (gradient,) = torch.autograd.grad(how.undetected_scores(scores).sum(), scores)
    assert gradient[0, 0].abs().amax() < 1e-4
    assert gradient[0, 3:].amin() > 0.15
    # Below the threshold everything counts; above it the window does not.
    share = RobustMasking(Windows((1, 6), (1, 2)), Logits(), threshold=0.6, tolerance=0.0)
    for factor, detected in ((1.0, False), (20.0, True)):
        changed = scores.detach() * torch.tensor([factor, 1, 1, 1, 1, 1])[:, None]
        whole, rest = changed[0, :, 0].sum() / 6, changed[0, 2:, 0].sum() / 6
        found = share.undetected_scores(changed)[0, 0]
        near, far = (rest, whole) if detected else (whole, rest)
        assert (found - near).abs() < 0.2 * (found - far).abs()


def test_conditions_keep_their_signs() -> None:
    conditions = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    assert torch.equal(all_of(conditions, 1) > 0, (conditions > 0).all(1))
    assert torch.equal(any_of(conditions, 1) > 0, (conditions > 0).any(1))
    missing = conditions.requires_grad_()
    (gradient,) = torch.autograd.grad(all_of(missing, 1).sum(), missing)
    assert (gradient[conditions < 0] > 0).all()


def test_votes_and_odds_are_those_of_probabilities() -> None:
    scores = scores_of(4, 6).double()
    p = scores.softmax(2)
    torch.testing.assert_close(expected_votes(scores), p.mean(1).log())
    torch.testing.assert_close(log_odds(scores), p.logit())
    far = torch.tensor([[0.0, 900.0, -5.0]], requires_grad=True)
    odds = log_odds(far)
    assert 899.9 < odds[0, 1] < 900.0
    (gradient,) = torch.autograd.grad(odds.sum(), far)
    assert gradient.isfinite().all()
