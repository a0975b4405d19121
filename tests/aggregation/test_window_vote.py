"""PatchGuard++ against a full adversary over the deployed ``predict``."""

import pytest
import torch
from tables import attacked, boxes, integer_scores, recorded

from patchproof import ALERT
from patchproof.aggregation import Windows, WindowVote
from patchproof.results import Verdict

CHOICES = (-40.0, -2.0, 0.0, 2.0, 40.0, 1e30, torch.nan)


@pytest.mark.parametrize("tau", [0.0, 0.55, 0.8, 0.95, 1.0])
@pytest.mark.parametrize(
    "windows",
    [Windows((1, 5), (1, 2)), Windows((1, 6), (1, 3)), Windows((1, 5), (1, 2), (False, True))],
    ids=str,
)
def test_no_certified_detection_is_broken_and_none_is_missed(windows, tau):
    scores = integer_scores(windows.grid[1]) + torch.tensor([0.5, 0.0])
    patterns = boxes(windows.grid, (1, 2), windows.wraps)
    vote, outputs = WindowVote(windows, tau, 0.0), recorded(scores)
    prediction, _ = vote.predict(outputs)
    certified = unsound = missed = 0
    for label in (0, 1):
        labels = torch.full((len(scores),), label)
        thresholds = vote.thresholds(outputs, labels, patterns)
        claimed = thresholds.certified_detection(tau)
        verdicts = vote.certify(outputs, labels, patterns) == Verdict.HOLDS
        holds = prediction == label
        assert torch.equal(claimed, verdicts.all(1) & holds)
        for pattern in patterns:
            tables = attacked(scores, pattern, CHOICES)
            answers = vote.predict(recorded(tables.flatten(0, 1)))[0].view(tables.shape[:2])
            holds &= ((answers == label) | (answers == ALERT)).all(1)
        certified += int(claimed.sum())
        unsound += int((claimed & ~holds).sum())
        missed += int((holds & ~claimed).sum())
    assert unsound == 0
    assert missed <= 2  # contents between those tried
    assert certified or tau in (0.0, 1.0)


def test_alert_and_certificate_agree_at_equality():
    """A masked view exactly as sure as tau raises an alert, and so it certifies."""
    windows = Windows((1, 3), (1, 1))
    scores = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]])
    patterns = torch.eye(3, dtype=torch.bool)
    labels = torch.zeros(1, dtype=torch.int64)
    thresholds = WindowVote(windows, 0.5, 0.0).thresholds(recorded(scores), labels, patterns)
    exact = thresholds.certified
    at, above = (
        WindowVote(windows, float(tau), 0.0) for tau in (exact, exact.nextafter(exact + 1))
    )
    assert (at.certify(recorded(scores), labels, patterns) == Verdict.HOLDS).all()
    assert (above.certify(recorded(scores), labels, patterns) == Verdict.LOST).all()
    scores[0, 0] = torch.tensor([-90.0, 90.0])
    for place in range(3):
        assert at.predict(recorded(scores.roll(place, 1)))[0] in (0, ALERT)
