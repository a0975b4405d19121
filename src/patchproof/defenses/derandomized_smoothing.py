"""De-randomized smoothing: recovery by the votes of bands or blocks of the image."""

from __future__ import annotations

from torch import nn

from patchproof.aggregation import CountedVotes
from patchproof.defenses.over_features import OverFeatures
from patchproof.defenses.saved import DEFAULT_FILL, DEFAULT_TOLERANCE
from patchproof.defenses.surrogate import Surrogate
from patchproof.defenses.view_defense import ViewDefense
from patchproof.defenses.view_scores import evidence_scores
from patchproof.models.ablation import Ablation
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize

DEFAULT_VOTE_THRESHOLD = 0.3
"""Levine and Feizi (2020) for CIFAR-10; 0.2 for ImageNet."""


class DerandomizedSmoothing(OverFeatures, ViewDefense):
    """The class with most votes of the ablated images (Levine and Feizi, 2020).

    Each view, an image of which one band or block is kept, votes for every class of at least a
    confidence: for none, one, or several. The region certificate counts which votes each patch
    region corrupts; see ``aggregation.CountedVotes``. ``paper_condition`` counts how many, at the
    worst region: sound, and never more than the region certificate.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what the attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        ablation: what each view shows of the image; None for the receptive fields of
            ``model.local_logits``, or for the ablation that the model was made for.
        bands: blocks that each ablated view keeps; a view is every combination of so many.
        vote_threshold: the least confidence of a vote, in [0, 1]; None for one vote a view, for its
            class of the highest score (majority voting).
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

    _OWN = ("vote_threshold",)
    aggregation: CountedVotes

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        ablation: Ablation | None = None,
        bands: int = 1,
        vote_threshold: float | None = DEFAULT_VOTE_THRESHOLD,
        fill: float = DEFAULT_FILL,
        tolerance: float = DEFAULT_TOLERANCE,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        views = self._take_views(model, image_size, ablation, bands, fill, tolerance)
        self.vote_threshold = vote_threshold
        super().__init__(
            model,
            threat,
            views,
            CountedVotes(vote_threshold, tolerance),
            image_size=image_size,
            batch_size=batch_size,
            memory_budget=memory_budget,
        )

    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""
        return evidence_scores(self.model, self.views, self.aggregation)
