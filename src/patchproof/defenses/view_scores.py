"""Surrogates of the defenses that look at views of the image: their scores, softly combined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from patchproof.aggregation import ConfidentVotes, FeatureAggregation, Prediction
from patchproof.aggregation.soft import expected_votes, lead, masked_twice
from patchproof.defenses.surrogate import Surrogate
from patchproof.views import MaskPairViews, Views

DEFAULT_FORWARDS = 64
"""Model forwards for each image in one call, if there are so many views."""


class ViewScores(Surrogate):
    """The scores of some or all views, combined to one score for each class.

    Of more views than a call may cost, each call draws some, the same for all images: with steps
    that each draw anew an attacker ascends the expectation over the views.

    Args:
        model: what scores the views, in eval mode.
        views: of the image.
        combine: from scores (N, V', C) of the views to scores (N, C), on the CPU. One that needs to
            know which views they are takes them all.
        among: (F,) int64, the forwards that take part, see ``Views``; None for all of them.
        always: how many of these, from the first on, every call evaluates.
        forwards: the most in one call; None for all of them.
        exact: whether the class of the highest score is what the defense returns.
    """

    def __init__(
        self,
        model: nn.Module,
        views: Views,
        combine: Callable[[Tensor], Tensor],
        *,
        among: Tensor | None = None,
        always: int = 0,
        forwards: int | None = DEFAULT_FORWARDS,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.views = views
        self.combine = combine
        self.among = torch.arange(views.count // views.per_forward) if among is None else among
        self.always = always
        self.forwards = len(self.among) if forwards is None else min(forwards, len(self.among))
        self.exact = exact and self.forwards == len(self.among)
        self._generator = torch.Generator()
        self.redraw(0)
        self.eval()

    def redraw(self, seed: int) -> None:
        """Start the draws of views anew."""
        self._generator.manual_seed(seed)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores, (N, classes) float32, differentiable in the images."""
        drawn = self.among[drawn_from(len(self.among), self.forwards, self.always, self._generator)]
        scores = self.look(images, drawn.expand(len(images), -1))
        return self.combine(scores).to(images)

    def look(self, images: Tensor, forwards: Tensor) -> Tensor:
        """Return the scores of some views of each image, (N, F * per_forward, classes), on the CPU.

        Args:
            images: (N, C, H, W).
            forwards: (N, F) int64.
        """
        number = forwards.shape[1]
        repeated = images if number == 1 else images.repeat_interleave(number, 0)
        scores = self.views.evaluate(self.model, repeated, forwards.flatten().to(images.device))
        return scores.view(len(images), -1, scores.shape[2]).cpu()


def evidence_scores(
    model: nn.Module,
    views: Views,
    aggregation: FeatureAggregation,
    *,
    forwards: int | None = DEFAULT_FORWARDS,
) -> dict[str, Surrogate]:
    """Return surrogates of a defense by the evidence of its views: soft votes before hard ones.

    Args:
        model: what scores the views, in eval mode.
        views: of the image.
        aggregation: of their evidence.
        forwards: the most in one call; None for all of them, which what ranks the views needs.
    """
    exact = ViewScores(model, views, aggregation.exact_scores, forwards=forwards, exact=True)
    if not isinstance(aggregation.evidence, (Prediction, ConfidentVotes)):
        return {"soft-evidence": exact}
    soft = ViewScores(model, views, aggregation.soft_scores, forwards=forwards)
    return {"soft-votes": soft, "votes": exact}


class TwoMaskScores(ViewScores):
    """One-mask votes, and one row of two-mask views of each image (PatchCleanser, Algorithm 1).

    Whoever wins the one-mask vote still loses to a mask of another label whose whole row agrees
    with it. Each call looks at the row of such a mask, a random one of the masks that disagree with
    the vote, or the nearest to it, and draws second masks. See ``soft.masked_twice``.

    Args:
        model: what scores the views, in eval mode.
        views: of the image.
        challenger: whether masks of one label never play each other (Appendix C).
        forwards: the most in one call; at most three quarters are one-mask views.
    """

    views: MaskPairViews

    def __init__(
        self,
        model: nn.Module,
        views: MaskPairViews,
        *,
        challenger: bool = False,
        forwards: int = DEFAULT_FORWARDS,
    ) -> None:
        masks = len(views.pair_to_view)
        self.ones = min(masks, 3 * forwards // 4)
        self.seconds = min(masks, forwards - self.ones)
        super().__init__(model, views, expected_votes, among=views.pair_to_view.diagonal())
        self.forwards = self.ones + self.seconds
        self.challenger = challenger

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores, (N, classes) float32, differentiable in the images."""
        pairs, masks = self.views.pair_to_view, len(self.among)
        shown = drawn_from(masks, self.ones, 0, self._generator)
        second = drawn_from(self.ones, min(self.ones, self.seconds), 0, self._generator)
        one_mask = self.look(images, self.among[shown].expand(len(images), -1))
        row = self._row(one_mask.detach())
        two_masks = self.look(images, pairs[shown[row][:, None], shown[second]])
        own = one_mask[torch.arange(len(images)), row][:, None]
        excused = None
        if self.challenger:
            excused = lead(torch.cat([own, one_mask[:, second]], 1))
            excused[:, 0] = -torch.inf
        found = masked_twice(one_mask, torch.cat([own, two_masks], 1), excused)
        return found.to(images)

    def _row(self, one_mask: Tensor) -> Tensor:
        """Return the mask of each image whose row is looked at, (N,) int64."""
        votes = one_mask.argmax(2).mode(1).values
        ahead = lead(one_mask).gather(2, votes[:, None, None].expand(-1, one_mask.shape[1], 1))
        ahead = ahead.squeeze(2)
        candidate = ahead <= ahead.amin(1, keepdim=True).clamp(min=0.0)
        return torch.multinomial(candidate.float(), 1, generator=self._generator).squeeze(1)


def drawn_from(count: int, number: int, always: int, generator: torch.Generator) -> Tensor:
    """Return ``number`` of ``count`` indices, the first ``always`` among them, ascending."""
    if number >= count:
        return torch.arange(count)
    rest = always + torch.randperm(count - always, generator=generator)[: number - always]
    return torch.cat([torch.arange(always), rest.sort().values])
