"""Clipped BagNet: recovery by the sum of clipped local logits."""

from __future__ import annotations

from torch import nn

from patchproof.aggregation import ClippedSum
from patchproof.defenses.over_features import OverFeatures
from patchproof.defenses.saved import DEFAULT_FILL, DEFAULT_TOLERANCE
from patchproof.defenses.surrogate import Surrogate
from patchproof.defenses.view_defense import ViewDefense
from patchproof.defenses.view_scores import evidence_scores
from patchproof.models.ablation import Ablation
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize


class ClippedBagNet(OverFeatures, ViewDefense):
    """The largest sum of tanh(0.05 u - 1) over the local logits u (Zhang et al., 2020).

    A corrupted view moves the difference of two classes by less than 2 (PatchGuard, Section 6.1).
    The region certificate counts the views that each patch region corrupts; see
    ``aggregation.ClippedSum``. ``paper_condition`` looks at the runner-up of the clean image alone,
    which is unsound.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what the attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        ablation: what each view shows of the image; None for the receptive fields of
            ``model.local_logits``, or for the ablation that the model was made for.
        bands: blocks that each ablated view keeps; a view is every combination of so many.
        fill: the value in [0, 1] that hidden pixels take in every channel, where the model has no
            way of its own to hide them.
        tolerance: how far (logits) rounding may move a score of a view, or the difference of two;
            the certificate holds for any such rounding.
        batch_size: forwards at once; None picks a number by the size of the image.
        memory_budget: bytes that the activations of one batch may take; None for no limit.

    Raises:
        PatchproofError: a model in training mode or one whose features see the whole image, or
            numbers out of range.
    """

    _OWN = ()
    aggregation: ClippedSum

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        ablation: Ablation | None = None,
        bands: int = 1,
        fill: float = DEFAULT_FILL,
        tolerance: float = DEFAULT_TOLERANCE,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        views = self._take_views(model, image_size, ablation, bands, fill, tolerance)
        super().__init__(
            model,
            threat,
            views,
            ClippedSum(tolerance),
            image_size=image_size,
            batch_size=batch_size,
            memory_budget=memory_budget,
        )

    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""
        return evidence_scores(self.model, self.views, self.aggregation)
