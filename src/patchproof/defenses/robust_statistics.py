"""Robust statistics of the features: median, trimmed mean, the sum without the largest."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from patchproof.aggregation import RankSum, median, trimmed_sum, without_largest
from patchproof.aggregation.evidence import LARGEST
from patchproof.defenses.over_features import (
    Feature,
    OverFeatures,
    default_feature,
    evidence_of,
)
from patchproof.defenses.saved import DEFAULT_FILL, DEFAULT_TOLERANCE
from patchproof.defenses.surrogate import Surrogate
from patchproof.defenses.view_defense import ViewDefense
from patchproof.defenses.view_scores import evidence_scores
from patchproof.errors import PatchproofError
from patchproof.models.ablation import Ablation
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize

Statistic = Literal["median", "trimmed-mean", "top-masking"]


class RobustStatistics(OverFeatures, ViewDefense):
    """The class with the largest robust statistic of its features.

    The median and the trimmed mean stand in PatchGuard, Section 6.2; masking the single features of
    most evidence in its Appendix E, for several patches. None needs a window. They are monotone in
    every feature, so that the certificate evaluates them with the corrupted features at the ends of
    their range; see ``aggregation.RankSum``. The paper states no condition of its own.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what the attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        statistic: ``"median"`` (the lower one), ``"trimmed-mean"``, or ``"top-masking"``, the sum
            without the largest.
        ablation: what each view shows of the image; None for the receptive fields of
            ``model.local_logits``, or for the ablation that the model was made for.
        bands: blocks that each ablated view keeps; a view is every combination of so many.
        feature: ``"logits"``, ``"confidence"`` or ``"prediction"``; by default logits of receptive
            fields and confidences of ablations.
        trim: of the trimmed mean, how many features are left out at each end.
        count: of top-masking, how many features of most evidence are left out. For both the default
            is the largest number of views that the patches corrupt.
        high: the upper clipping bound of logits; the lower one is 0.
        fill: the value in [0, 1] that hidden pixels take in every channel, where the model has no
            way of its own to hide them.
        tolerance: how far (logits) rounding may move a score of a view, or the difference of two;
            the certificate holds for any such rounding.
        batch_size: forwards at once; None picks a number by the size of the image.
        memory_budget: bytes that the activations of one batch may take; None for no limit.

    Raises:
        PatchproofError: a model in training mode or one whose features see the whole image, an
            argument of another statistic, or numbers out of range.
    """

    _OWN = ("statistic", "feature", "trim", "count", "high")
    aggregation: RankSum

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        statistic: Statistic,
        ablation: Ablation | None = None,
        bands: int = 1,
        feature: Feature | None = None,
        trim: int | None = None,
        count: int | None = None,
        high: float = LARGEST,
        fill: float = DEFAULT_FILL,
        tolerance: float = DEFAULT_TOLERANCE,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        if statistic not in get_args(Statistic):
            raise PatchproofError(
                f"statistic: expected {', '.join(get_args(Statistic))}, got {statistic!r}"
            )
        for name, value, owner in (("trim", trim, "trimmed-mean"), ("count", count, "top-masking")):
            if value is not None and statistic != owner:
                raise PatchproofError(f"{name}: expected with {owner} only, got {statistic}")
        views = self._take_views(model, image_size, ablation, bands, fill, tolerance)
        corruption = views.corruption(threat)
        corrupted = int(corruption.patterns.sum(1).max())
        self.statistic: Statistic = statistic
        self.feature = default_feature(views, feature)
        self.trim = corrupted if trim is None and statistic == "trimmed-mean" else trim
        self.count = corrupted if count is None and statistic == "top-masking" else count
        self.high = float(high)
        super().__init__(
            model,
            threat,
            views,
            self._aggregation(views.count, tolerance),
            image_size=image_size,
            batch_size=batch_size,
            memory_budget=memory_budget,
            corruption=corruption,
        )

    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""
        return evidence_scores(self.model, self.views, self.aggregation, forwards=None)

    def describe(self) -> str:
        """Say how many views there are, what each sees, and how many are left out."""
        match self.statistic:
            case "median":
                return f"{super().describe()}, their median"
            case "trimmed-mean":
                return f"{super().describe()}, without {self.trim} at each end"
            case "top-masking":
                return f"{super().describe()}, without the {self.count} of most evidence"

    def _aggregation(self, views: int, tolerance: float) -> RankSum:
        evidence = evidence_of(self.feature, self.high)
        if self.trim is not None:
            return trimmed_sum(evidence, views, self.trim, tolerance)
        if self.count is not None:
            return without_largest(evidence, views, self.count, tolerance)
        return median(evidence, views, tolerance)
