"""Minority Reports' certificate against a full adversary over the deployed ``predict``.

Every table of labels and confidences of the unmasked image and of M masks is listed, for every set
of masks that may cover the region. The attacker sets all views but those of the covering masks to
any label with any confidence, or to scores that are not finite. So all tables that agree on the
covering masks are the attacker's choices from any one of them: a region truly holds if ``predict``
returns the right label or an alert on all.
"""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchproof import ALERT
from patchproof.aggregation import Goal, MinorityVote
from patchproof.results import Case, Outputs, Verdict

UNSURE, SURE = 1.0, 2.0
"""Gaps between the score of a view's label and the others, all 0."""


def confidence(gap, classes):
    """Return the softmax probability as the aggregation computes it."""
    scores = torch.zeros(1, 1, classes)
    scores[..., 0] = gap
    contradicted = torch.cat([scores, scores], 1)
    contradicted[0, 0] = torch.tensor([0.0, gap] + [0.0] * (classes - 2))
    thresholds = MinorityVote(0.5, 0.0).thresholds(
        recorded(contradicted), torch.tensor([1]), torch.tensor([[True, False]])
    )
    return float(thresholds.alert)


def recorded(scores):
    """Return outputs that know all scores, (N, V, C)."""
    images, views, classes = scores.shape
    outputs = Outputs.empty(images, views, classes, keep_scores=True)
    pairs = torch.cartesian_prod(torch.arange(images), torch.arange(views))
    outputs.record(*pairs.unbind(1), scores.flatten(0, 1))
    return outputs


def all_scores(views, classes):
    """List every table, (T, V, C), and a number for each view's entry, (T, V)."""
    entries = [torch.full((classes,), torch.nan)]
    for label, gap in product(range(classes), (UNSURE, SURE)):
        entries.append(gap * torch.nn.functional.one_hot(torch.tensor(label), classes))
    numbers = torch.cartesian_prod(*[torch.arange(len(entries))] * views).view(-1, views)
    return torch.stack(entries)[numbers], numbers


def coverings(masks):
    """List the corrupted views of every set of covering masks, (P, 1 + M) bool, but for none."""
    inside = torch.tensor(list(product([False, True], repeat=masks)))[1:]
    return torch.cat([torch.ones(len(inside), 1, dtype=torch.bool), ~inside], 1)


@pytest.mark.parametrize(("masks", "classes"), [(1, 2), (1, 3), (2, 2), (2, 3), (3, 2), (3, 3)])
@pytest.mark.parametrize("tau", ["none", "sure", "unsure", "all"])
def test_no_certificate_is_broken_and_none_is_missed(masks, classes, tau):
    tau = {
        "none": 1.0,
        "sure": confidence(SURE, classes),  # equality: a mask that is just sure enough
        "unsure": confidence(UNSURE, classes),
        "all": 0.0,
    }[tau]
    scores, numbers = all_scores(1 + masks, classes)
    outputs = recorded(scores)
    aggregation = MinorityVote(tau, 0.0)
    prediction, _ = aggregation.predict(outputs)
    weights = (2 * classes + 1) ** torch.arange(1 + masks)
    unsound = missed = held = 0
    for label in range(classes):
        labels = torch.full((len(scores),), label)
        fooled = (prediction != label) & (prediction != ALERT)
        clean = prediction == label
        for pattern in coverings(masks):
            verdict = aggregation.certify(outputs, labels, pattern[None])[:, 0]
            assert not (verdict == Verdict.UNKNOWN).any()
            thresholds = aggregation.thresholds(outputs, labels, pattern[None])
            certified = thresholds.certified_detection(tau)
            assert torch.equal(certified, clean & (verdict == Verdict.HOLDS))
            _, group = (numbers * weights * ~pattern).sum(1).unique(return_inverse=True)
            lost = torch.zeros(int(group.max()) + 1).index_add_(0, group, fooled.float())
            truth = lost[group] == 0
            unsound += int(((verdict == Verdict.HOLDS) & ~truth).sum())
            missed += int((clean & truth & ~certified).sum())
            held += int(certified.sum())
    assert (unsound, missed) == (0, 0)
    assert (held > 0) == (tau < 1)


@pytest.mark.parametrize(
    ("masks", "classes", "expected"), [(2, 2, 0), (2, 3, 2 * 7), (3, 3, (30 + 3 * 2 * 7) * 7)]
)
def test_verdicts_miss_only_regions_of_images_that_are_alerted_anyway(masks, classes, expected):
    """Two covering masks that are sure of two wrong labels alert whatever the patch shows."""
    tau = confidence(SURE, classes)
    scores, numbers = all_scores(1 + masks, classes)
    outputs = recorded(scores)
    aggregation = MinorityVote(tau, 0.0)
    prediction, _ = aggregation.predict(outputs)
    labels = torch.zeros(len(scores), dtype=torch.int64)
    fooled = (prediction != 0) & (prediction != ALERT)
    weights = (2 * classes + 1) ** torch.arange(1 + masks)
    missed = 0
    for pattern in coverings(masks):
        verdict = aggregation.certify(outputs, labels, pattern[None])[:, 0]
        _, group = (numbers * weights * ~pattern).sum(1).unique(return_inverse=True)
        lost = torch.zeros(int(group.max()) + 1).index_add_(0, group, fooled.float())
        missing = (verdict == Verdict.LOST) & (lost[group] == 0)
        assert (prediction[missing] == ALERT).all()
        missed += int(missing.sum())
    assert missed == expected


def random_scores(images, views, classes, seed):
    """Return scores of views that mostly agree on class 0, of all degrees of confidence."""
    generator = torch.Generator().manual_seed(seed)
    scores = 1.5 * torch.randn(images, views, classes, generator=generator)
    scores[..., 0] += 2.5
    return scores


@pytest.mark.parametrize("tau", [0.3, 0.5, 0.7, 0.9])
def test_a_certificate_holds_for_the_worst_rounding_and_for_no_worse(tau):
    """Any two scores of a view may come closer, or part, by the tolerance."""
    tolerance = 0.25
    scores = random_scores(3000, 4, 3, seed=0).double()
    labels = torch.zeros(len(scores), dtype=torch.int64)
    patterns = torch.tensor([[True, False, True, True], [True, True, False, False]])
    certified = MinorityVote(tau, tolerance).thresholds(recorded(scores), labels, patterns)
    certified = certified.certified_detection(tau)

    exact = MinorityVote(tau, 0.0)
    moved = torch.full_like(scores, tolerance / 2)
    moved[..., 0] *= -1
    less_right = recorded(scores + moved)  # every view as unsure of class 0 as it can get
    holds = (exact.certify(less_right, labels, patterns) == Verdict.HOLDS).all(1)
    holds &= less_right.labels[:, 0] == 0
    moved = torch.full_like(scores, -tolerance / 2)
    moved.scatter_(2, 1 + scores[..., 1:].argmax(2, keepdim=True), tolerance / 2)
    moved[:, 0] = 0.0
    more_wrong = exact.predict(recorded(scores + moved))[0]  # every mask as sure of a wrong class
    quiet = (more_wrong != ALERT) & (less_right.labels[:, 0] == 0)
    assert torch.equal(certified, holds & quiet)

    careless = exact.thresholds(recorded(scores), labels, patterns).certified_detection(tau)
    assert 0 < certified.sum() < careless.sum()


def test_scores_too_large_for_the_tolerance_get_a_slack_of_their_size():
    """A margin of 12 at 1e6 may be one of 2, whose confidence is 0.88."""
    scores = torch.tensor([[[1e6, 1e6 - 12.0], [1e6, 1e6 - 12.0]], [[12.0, 0.0], [12.0, 0.0]]])
    labels = torch.zeros(2, dtype=torch.int64)
    patterns = torch.tensor([[True, False]])
    thresholds = MinorityVote(0.9, 1e-3).thresholds(recorded(scores), labels, patterns)
    assert thresholds.certified_detection(0.9).tolist() == [False, True]
    trusting = MinorityVote(0.9, 0.0).thresholds(recorded(scores), labels, patterns)
    assert trusting.certified_detection(0.9).tolist() == [True, True]


def test_thresholds_and_the_trade_off_are_what_every_tau_gives():
    scores = random_scores(400, 5, 3, seed=1)
    scores[:5, 2] = torch.nan
    scores[5:8, 0] = torch.inf
    labels = torch.randint(3, (400,), generator=torch.Generator().manual_seed(2))
    labels[torch.rand(400, generator=torch.Generator().manual_seed(3)) < 0.8] = 0
    outputs = recorded(scores)
    patterns = coverings(4)[[0, 3, 6]]
    for tolerance in (0.0, 0.05):
        thresholds = MinorityVote(0.5, tolerance).thresholds(outputs, labels, patterns)
        curve = thresholds.trade_off(labels)
        breaks = curve.tau
        assert breaks[0] == 0
        assert breaks[-1] == 1
        assert len(breaks) > 300
        middles = (breaks[1:] + breaks[:-1]) / 2
        taus = torch.cat([breaks, middles])[torch.arange(0, 2 * len(breaks) - 1, 7)]
        counted = thresholds.trade_off(labels, taus)
        for place, tau in enumerate(taus.tolist()):
            aggregation = MinorityVote(tau, tolerance)
            prediction, _ = aggregation.predict(outputs)
            holds = (aggregation.certify(outputs, labels, patterns) == Verdict.HOLDS).all(1)
            assert counted.clean[place] == (prediction == labels).sum()
            assert counted.alert[place] == (prediction == ALERT).sum()
            certified = holds & (prediction == labels)
            assert not (thresholds.certified_detection(tau) & ~certified).any()
            assert counted.certified_detection[place] == thresholds.certified_detection(tau).sum()
            if tolerance == 0:
                assert counted.certified_detection[place] == certified.sum()
        assert (curve.certified_detection <= curve.clean).all()
        # Between two breaks nothing changes: the curve has every point.
        middle = thresholds.trade_off(labels, middles)
        assert torch.equal(middle.clean, curve.clean[1:])
        assert torch.equal(middle.certified_detection, curve.certified_detection[1:])
        assert torch.equal(middle.alert, curve.alert[1:])


def test_an_exact_tie_counts_as_not_right_even_at_tolerance_zero():
    tie, sure = [4.0, 4.0, 0.0], [4.0, 0.0, 0.0]
    labels = torch.zeros(3, dtype=torch.int64)
    outputs = recorded(torch.tensor([[sure, sure], [tie, sure], [sure, tie]]))
    aggregation = MinorityVote(0.3, 0.0)
    assert aggregation.predict(outputs)[0].tolist() == [0, 0, 0]
    thresholds = aggregation.thresholds(outputs, labels, torch.tensor([[True, False]]))
    assert thresholds.certified_detection(0.3).tolist() == [True, False, False]


def test_without_a_valid_unmasked_label_there_is_an_alert():
    scores = torch.zeros(1, 3, 2)
    scores[0, 0] = torch.nan
    for tau in (0.0, 0.5, 1.0):
        assert MinorityVote(tau, 0.0).predict(recorded(scores))[0].tolist() == [ALERT]


def test_a_mask_without_a_valid_label_neither_alerts_nor_certifies():
    scores = torch.tensor([[[5.0, 0.0], [torch.inf, 0.0], [5.0, 0.0]]])
    aggregation = MinorityVote(0.9, 0.0)
    outputs = recorded(scores)
    labels = torch.zeros(1, dtype=torch.int64)
    label, case = aggregation.predict(outputs)
    assert label.tolist() == [0]
    assert case.tolist() == [Case.OVERRULED]
    patterns = torch.tensor([[True, False, True], [True, True, False]])
    verdicts = aggregation.certify(outputs, labels, patterns)
    assert verdicts.tolist() == [[Verdict.LOST, Verdict.HOLDS]]


def test_the_three_cases():
    scores = torch.tensor(
        [
            [[1.0, 0.0], [1.0, 0.0], [9.0, 0.0]],  # agreed
            [[9.0, 0.0], [0.0, 1.0], [9.0, 0.0]],  # a mask disagrees, and is not sure
            [[1.0, 0.0], [1.0, 0.0], [0.0, 9.0]],  # a mask disagrees, and is sure
        ]
    )
    label, case = MinorityVote(0.9, 0.0).predict(recorded(scores))
    assert label.tolist() == [0, 0, ALERT]
    assert case.tolist() == [Case.AGREED, Case.OVERRULED, Case.ALERT]


def test_a_label_needs_no_more_views_after_an_alert():
    scores = torch.tensor([[[1.0, 0.0], [0.0, 9.0], [1.0, 0.0]]]).repeat(3, 1, 1)
    outputs = recorded(scores)
    outputs.known = torch.tensor([[True, True, False], [True, False, False], [False, True, False]])
    aggregation = MinorityVote(0.9, 0.0)
    wanted = aggregation.next_views(outputs) > 0
    assert wanted.tolist() == [[False, False, False], [False, True, True], [True, False, True]]
    assert aggregation.predict(outputs)[0][0] == ALERT
    goal = Goal(torch.zeros(3, dtype=torch.int64), coverings(2), "first_lost_region")
    assert torch.equal(aggregation.next_views(outputs, goal) > 0, ~outputs.known)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_verdict_on_part_of_the_views_stands_for_every_completion(data):
    scores, _ = all_scores(1, 3)
    entry = st.integers(0, len(scores) - 1)
    table = scores[data.draw(st.lists(entry, min_size=4, max_size=4)), 0][None].clone()
    hidden = data.draw(st.sets(st.integers(0, 3), max_size=2))
    partial = recorded(table)
    partial.known[0, list(hidden)] = False
    aggregation = MinorityVote(confidence(SURE, 3), 0.0)
    right = torch.zeros(1, dtype=torch.int64)
    verdict = aggregation.certify(partial, right, coverings(3))[0]
    decided = not aggregation.next_views(partial).any()
    label = aggregation.predict(partial)[0]
    for values in product(scores[:, 0], repeat=len(hidden)):
        for view, value in zip(hidden, values, strict=True):
            table[0, view] = value
        whole = recorded(table)
        settled = verdict != Verdict.UNKNOWN
        assert torch.equal(
            aggregation.certify(whole, right, coverings(3))[0][settled], verdict[settled]
        )
        if decided:
            assert torch.equal(aggregation.predict(whole)[0], label)
