"""BagCert: recovery by the votes of local features."""

from __future__ import annotations

from typing import Literal

from torch import nn

from patchproof.aggregation import Confidence, Prediction, SpatialVotes
from patchproof.defenses.over_features import OverFeatures
from patchproof.defenses.saved import DEFAULT_FILL, DEFAULT_TOLERANCE
from patchproof.defenses.surrogate import Surrogate
from patchproof.defenses.view_defense import ViewDefense
from patchproof.defenses.view_scores import evidence_scores
from patchproof.errors import PatchproofError
from patchproof.models.ablation import Ablation
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize

Vote = Literal["prediction", "confidence"]


class BagCert(OverFeatures, ViewDefense):
    """The class with most votes of the local features (Metzen and Yatsura, 2021).

    A corrupted vote lies in [0, 1]. The certificate, which is the paper's own condition too, counts
    the votes outside of each patch region; see ``aggregation.SpatialVotes``.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what the attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        ablation: what each view shows of the image; None for the receptive fields of
            ``model.local_logits``, or for the ablation that the model was made for.
        bands: blocks that each ablated view keeps; a view is every combination of so many.
        feature: ``"prediction"`` for a vote of 1 for the class of the highest score, or
            ``"confidence"`` for votes as large as the softmax probabilities.
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

    _OWN = ("feature",)
    aggregation: SpatialVotes

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        ablation: Ablation | None = None,
        bands: int = 1,
        feature: Vote = "prediction",
        fill: float = DEFAULT_FILL,
        tolerance: float = DEFAULT_TOLERANCE,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if feature not in ("prediction", "confidence"):
            raise PatchproofError(
                f"feature: expected 'prediction' or 'confidence', votes in [0, 1], got {feature!r}"
            )
        views = self._take_views(model, image_size, ablation, bands, fill, tolerance)
        self.feature: Vote = feature
        super().__init__(
            model,
            threat,
            views,
            SpatialVotes(Prediction() if feature == "prediction" else Confidence(), tolerance),
            image_size=image_size,
            batch_size=batch_size,
            memory_budget=memory_budget,
        )

    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""
        return evidence_scores(self.model, self.views, self.aggregation)
