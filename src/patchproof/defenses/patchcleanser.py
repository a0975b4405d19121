"""PatchCleanser: certifiably robust recovery for any classifier, by masking pixels twice."""

from __future__ import annotations

from typing import Literal

from torch import nn

from patchproof.aggregation import ChallengerGame, DoubleMasking
from patchproof.aggregation.soft import expected_votes
from patchproof.defenses.over_masks import OverMasks
from patchproof.defenses.saved import DEFAULT_FILL, DEFAULT_TOLERANCE
from patchproof.defenses.surrogate import Surrogate
from patchproof.defenses.view_defense import ViewDefense
from patchproof.defenses.view_scores import TwoMaskScores, ViewScores
from patchproof.errors import PatchproofError
from patchproof.threat import MaskSet, Threat
from patchproof.threat.masks import Layout
from patchproof.threat.regions import ImageSize
from patchproof.views import MaskPairViews

Inference = Literal["double", "challenger"]


class PatchCleanser(OverMasks, ViewDefense):
    """Double masking or the challenger game over an R-covering mask set (Xiang et al., 2022).

    The region certificate of double masking is necessary and sufficient against an attacker who
    sets the labels of corrupted views freely; that of the challenger game is sufficient (see
    ``aggregation``). ``paper_condition`` is two-mask correctness (Algorithm 2): sound, and never
    more than the region certificate.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what the attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        masks_per_side: the budget k of Section 3.4, one number or (rows, columns).
        multiplicity: the least number of masks per axis that cover each stretch of a patch.
        layout: ``"paper"`` for the paper's masks, or ``"balanced"`` for the smallest that still
            cover, as many as the budget allows (``MaskSet.for_threat``).
        shapes: for ``AnyRectangle``, how many covering rectangles the masks are made for.
        mask_set: the masks themselves, in place of the four arguments before; it must cover
            ``threat``.
        inference: ``"double"`` (Algorithm 1) or ``"challenger"`` (Appendix C).
        fill: the value in [0, 1] that masked pixels take in every channel.
        tolerance: a view whose margin between the two highest logits is not larger counts as
            corrupted, since the same pixels can score differently in the last bits in another batch
            or on another device. The default is more than ten times the largest difference
            measured (``docs/numerics.md``).
        batch_size: views in one forward pass; None picks one by the size of the image.
        memory_budget: bytes that the activations of one batch may take; None for no limit.

    Raises:
        PatchproofError: a model in training mode, masks that do not cover the threat, or numbers
            out of range.
    """

    _OWN = ("inference",)

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        masks_per_side: int | tuple[int, int] = 6,
        multiplicity: int | tuple[int, int] = 1,
        layout: Layout = "paper",
        shapes: int | None = None,
        mask_set: MaskSet | None = None,
        inference: Inference = "double",
        fill: float = DEFAULT_FILL,
        tolerance: float = DEFAULT_TOLERANCE,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if inference not in ("double", "challenger"):
            raise PatchproofError(
                f"inference: expected 'double' or 'challenger', got {inference!r}"
            )
        self.inference: Inference = inference
        masks = self._take_masks(
            threat,
            image_size,
            mask_set,
            fill,
            tolerance,
            masks_per_side=masks_per_side,
            multiplicity=multiplicity,
            layout=layout,
            shapes=shapes,
        )
        views = self.pairs = MaskPairViews(masks, fill)
        aggregation = DoubleMasking if inference == "double" else ChallengerGame
        super().__init__(
            model,
            threat,
            views,
            aggregation(views.pair_to_view, tolerance),
            image_size=image_size,
            batch_size=batch_size,
            memory_budget=memory_budget,
        )

    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""
        views, challenger = self.pairs, self.inference == "challenger"
        one_mask = views.pair_to_view.diagonal()
        return {
            "majority": ViewScores(self.model, views, expected_votes, among=one_mask),
            "two-mask-disagreement": TwoMaskScores(self.model, views, challenger=challenger),
        }
