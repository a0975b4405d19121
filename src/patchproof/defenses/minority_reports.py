"""Minority Reports: certified detection for any classifier, by masking pixels once."""

from __future__ import annotations

from torch import Tensor, nn

from patchproof.aggregation import MinorityVote
from patchproof.defenses.checks import check_tau
from patchproof.defenses.over_masks import OverMasks
from patchproof.defenses.saved import DEFAULT_FILL, DEFAULT_TOLERANCE
from patchproof.defenses.surrogate import Surrogate
from patchproof.defenses.view_defense import ViewDetector
from patchproof.defenses.view_scores import ViewScores
from patchproof.detection import TradeOff
from patchproof.threat import MaskSet, Threat
from patchproof.threat.masks import Layout
from patchproof.threat.regions import ImageSize
from patchproof.views import UnmaskedAndMaskedViews

DEFAULT_TAU = 0.8


class MinorityReports(OverMasks, ViewDetector):
    """Alert where a masked image confidently gets another label (McCoyd et al., 2020).

    As PatchCleanser, Section 5.2, has it: the masks of an R-covering set go on the image one at a
    time, with no retraining. ``predict`` returns the label of the unmasked image, or ``ALERT`` (-1)
    if the label of some masked image differs with a softmax probability of at least ``tau``.

    The certificate is one of detection: whatever the patch shows, the right label or an alert. An
    attacker can still force alerts. It is necessary and sufficient against an attacker who sets the
    labels and confidences of corrupted views freely (see ``aggregation.MinorityVote``). A larger
    ``tau`` alerts fewer clean images and certifies fewer; one certification tells the figures at
    every ``tau``. For that ``certify`` evaluates every view, whatever its ``stop``.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what the attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        tau: the least confidence, in [0, 1], with which a masked image raises an alert.
        masks_per_side: the budget of masks, as for ``PatchCleanser``.
        multiplicity: the least number of masks per axis that cover each stretch of a patch.
        layout: ``"paper"`` or ``"balanced"`` masks.
        shapes: for ``AnyRectangle``, how many covering rectangles the masks are made for.
        mask_set: the masks themselves, in place of the four arguments before; it must cover
            ``threat``.
        fill: the value in [0, 1] that masked pixels take in every channel.
        tolerance: how far (logits) rounding may move a difference of two scores; a certificate
            holds for any such rounding.
        batch_size: views in one forward pass; None picks one by the size of the image.
        memory_budget: bytes that the activations of one batch may take; None for no limit.

    Raises:
        PatchproofError: a model in training mode, masks that do not cover the threat, or numbers
            out of range.
    """

    _OWN = ("tau",)
    aggregation: MinorityVote

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        tau: float = DEFAULT_TAU,
        masks_per_side: int | tuple[int, int] = 6,
        multiplicity: int | tuple[int, int] = 1,
        layout: Layout = "paper",
        shapes: int | None = None,
        mask_set: MaskSet | None = None,
        fill: float = DEFAULT_FILL,
        tolerance: float = DEFAULT_TOLERANCE,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.tau = check_tau(tau)
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
        super().__init__(
            model,
            threat,
            UnmaskedAndMaskedViews(masks, fill),
            MinorityVote(self.tau, tolerance),
            image_size=image_size,
            batch_size=batch_size,
            memory_budget=memory_budget,
        )

    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""
        combine = self.aggregation.soft_scores
        return {"agreement": ViewScores(self.model, self.views, combine, always=1)}

    def trade_off(self, images: Tensor, labels: Tensor, taus: Tensor | None = None) -> TradeOff:
        """Count what each tau costs and gives on labelled images, from one pass over them.

        Args:
            images: (N, C, H, W) float32 in [0, 1].
            labels: (N,) integers, the right classes.
            taus: (T,) float64; by default every tau at which a figure changes.
        """
        return self.certify(images, labels).thresholds().trade_off(labels.cpu().long(), taus)
