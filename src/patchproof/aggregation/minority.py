"""Alert where a mask changes the label (Minority Reports, McCoyd et al., 2020).

PatchCleanser, Section 5.2, compares with it. View 0 is the unmasked image; views 1 to M show it
with one mask of an R-covering set each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchproof.aggregation.base import CERTAIN, Goal
from patchproof.aggregation.soft import uncontradicted
from patchproof.detection import Thresholds
from patchproof.results import ALERT, INVALID_LABEL, ROUNDING, Case, Outputs, Paper, Verdict

_MOST_ENTRIES = 2**22
"""Images times patterns times masks that are compared at once."""


class MinorityVote:
    """Return the unmasked label, or ``ALERT`` if some mask contradicts it confidently.

    A mask's confidence is the softmax probability of its own label. There is an alert if and only
    if some mask has another label than the unmasked image, with a confidence of at least tau.

    **Certificate (detection).** The image with label y is certified if

    - (a) its unmasked label is y, and no mask with another label reaches tau: it gets y, no alert;
    - (b) at every region r some mask that covers r is right with a confidence of at least tau.

    *Sufficient.* Such a mask in (b) shows nothing of the patch, so it says y as confidently under
    attack. If the unmasked label still is y, ``predict`` returns y or an alert; if not, that mask
    contradicts it, and there is an alert.

    *Necessary.* If (a) fails the clean image is an error. If (a) holds and (b) fails at r, then no
    mask that covers r reaches tau, as those that do are right by (a). So no benign view can raise
    an alert. The attacker lets the unmasked image and all other masks have the same wrong label,
    which is then returned.

    The verdict at a region is (b) alone. Where (a) fails it may be LOST although no attack can win:
    two masks that cover r and are sure of different labels always raise an alert, on the clean
    image too.

    **Tolerance.** The promise must survive rounding: that the difference of any two scores of a
    view is off by up to e, the tolerance, or ``ROUNDING`` times the largest score of the view if
    that is more. A label then stays if the margin is larger than e. The odds of a class, p / (1 -
    p), are 1 / sum of exp(z_j - z) over the other classes j, so they change by at most a factor
    exp(e): the log-odds by at most e. In the certificate a right mask therefore counts with its
    confidence at e less of log-odds, and only if its margin exceeds the tolerance. A mask that may
    not be right counts against (a) with the confidence of the likeliest wrong class, at e more. A
    tolerance of 0 trusts the arithmetic (e = 0): alert and certificate then compare the same
    confidences with tau by the same >=; exact ties of scores still count as not right.

    **Outputs that are not finite.** Without a valid unmasked label there is no class to return, and
    so there is an alert. A mask without a valid label neither raises an alert nor certifies.

    Args:
        tau: the least confidence, in [0, 1], with which a mask is believed.
        tolerance: a view whose decision margin (logits) is not larger counts as not right.
    """

    needs_scores = True
    paper: Paper | None = None

    def __init__(self, tau: float, tolerance: float) -> None:
        self.tau = tau
        self.tolerance = tolerance

    def next_views(self, outputs: Outputs, goal: Goal | None = None) -> Tensor:
        """Return the priority of each view, (N, V) float32; all 0 means that the image is decided.

        For a label the masks are tried in order until there is an alert. For a certificate every
        view is needed, since its thresholds tell for which tau there is one.
        """
        priority = torch.full(outputs.known.shape, CERTAIN)
        if goal is None:
            masks = priority.shape[1] - 1
            priority[:, 1:] = 2.0 - torch.arange(masks) / max(1, masks)
            priority[self._reaches(self._alert_threshold(outputs))] = 0.0
        return priority.masked_fill(outputs.known, 0.0)

    def predict(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the labels and the cases, (N,) int64 each, of decided images."""
        unmasked = outputs.labels[:, 0]
        alert = self._reaches(self._alert_threshold(outputs))
        label = torch.where(alert, ALERT, unmasked)
        agreed = (outputs.labels == unmasked[:, None]).all(1)
        case = torch.where(agreed, int(Case.AGREED), int(Case.OVERRULED))
        return label, torch.where(alert, int(Case.ALERT), case)

    def soft_scores(self, scores: Tensor) -> Tensor:
        """Return (N, C), positive where ``predict`` returns the class, of scores (N, V, C)."""
        return uncontradicted(scores, self.tau)

    def certify(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return the verdict of each pattern, (N, P) int8 values of ``Verdict``."""
        convincing = self._reaches(self._right_confidence(outputs, labels))
        covers = (~patterns[:, 1:]).float().T
        holds = convincing.float() @ covers > 0
        not_lost = (convincing | ~outputs.known[:, 1:]).float() @ covers > 0
        verdict = torch.full(holds.shape, Verdict.UNKNOWN, dtype=torch.int8)
        return verdict.masked_fill(~not_lost, Verdict.LOST).masked_fill(holds, Verdict.HOLDS)

    def paper_condition(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return False, (N,) bool: the paper states no other criterion."""
        return torch.zeros(len(labels), dtype=torch.bool)

    def thresholds(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Thresholds:
        """Return for which tau each image is alerted and certified; every view must be known."""
        right = self._right_confidence(outputs, labels)
        covers = ~patterns[:, 1:]
        weakest = torch.empty(len(right), dtype=right.dtype)
        step = max(1, _MOST_ENTRIES // covers.numel())
        for start in range(0, len(right), step):
            chunk = right[start : start + step, None]
            best = torch.where(covers, chunk, -torch.inf).amax(2)
            weakest[start : start + step] = best.amin(1)
        unmasked = self._surely_right(outputs, labels)[:, 0]
        return Thresholds(
            unmasked=outputs.labels[:, 0],
            alert=self._alert_threshold(outputs),
            certified_above=self._wrong_confidence(outputs, labels).amax(1),
            certified=weakest.masked_fill(~unmasked, -torch.inf),
        )

    def _reaches(self, confidence: Tensor) -> Tensor:
        """Return whether a confidence is enough: for an alert as for a certificate."""
        return confidence >= self.tau

    def _alert_threshold(self, outputs: Outputs) -> Tensor:
        """Return the highest tau with an alert, by the views that are known, (N,) float64."""
        unmasked = outputs.labels[:, :1]
        contradicts = (
            outputs.known & (outputs.labels != INVALID_LABEL) & (outputs.labels != unmasked)
        )
        contradicts &= outputs.known[:, :1]
        threshold = self._confidence(outputs, contradicts, outputs.labels).amax(1)
        invalid = outputs.known[:, 0] & (unmasked[:, 0] == INVALID_LABEL)
        return threshold.masked_fill(invalid, torch.inf)

    def _right_confidence(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return how sure each mask is of the right label at least, (N, M); -inf if it may err."""
        y = labels[:, None].expand_as(outputs.labels)
        return self._confidence(outputs, self._surely_right(outputs, labels), y, slack=-1)[:, 1:]

    def _wrong_confidence(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return how sure each mask is of a wrong label at most, (N, M); -inf if it has none."""
        may_err = outputs.known & (outputs.labels != INVALID_LABEL)
        may_err &= ~self._surely_right(outputs, labels)
        image, _ = may_err.nonzero().unbind(1)
        wrong = torch.zeros_like(outputs.labels)
        scores = _scores(outputs)[may_err].scatter(1, labels[image, None], -torch.inf)
        wrong[may_err] = scores.argmax(1)
        return self._confidence(outputs, may_err, wrong, slack=1)[:, 1:]

    def _surely_right(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the views that have the right label whatever the rounding, (N, V) bool."""
        right = outputs.known & (outputs.labels == labels[:, None])
        return right & (outputs.margins > self.tolerance)

    def _confidence(
        self, outputs: Outputs, views: Tensor, classes: Tensor, slack: int = 0
    ) -> Tensor:
        """Return the softmax probability of a class in some views, (N, V) float64.

        Args:
            outputs: of N images.
            views: (N, V) bool; -inf is returned for the others.
            classes: (N, V) int64, the class.
            slack: -1 for the least, 1 for the greatest that rounding can make of it.
        """
        scores, chosen = _scores(outputs)[views].double(), classes[views][:, None]
        others = scores.scatter(1, chosen, -torch.inf).logsumexp(1)
        log_odds = scores.gather(1, chosen).squeeze(1) - others
        if self.tolerance > 0:
            rounding = ROUNDING * scores.abs().amax(1)
            log_odds = log_odds + slack * rounding.clamp(min=self.tolerance)
        confidence = torch.full(views.shape, -torch.inf, dtype=torch.float64)
        confidence[views] = log_odds.sigmoid()
        return confidence


def _scores(outputs: Outputs) -> Tensor:
    assert outputs.scores is not None, "needs_scores makes the loop keep them"
    return outputs.scores
