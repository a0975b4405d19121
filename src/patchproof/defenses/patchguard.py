"""PatchGuard: recovery by masking the window of largest evidence, class by class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchproof.aggregation import RobustMasking
from patchproof.aggregation.evidence import LARGEST
from patchproof.defenses.checks import check_images, check_labels
from patchproof.defenses.feature_windows import choose_windows
from patchproof.defenses.over_features import (
    Feature,
    OverFeatures,
    default_feature,
    evidence_of,
)
from patchproof.defenses.saved import DEFAULT_FILL, DEFAULT_TOLERANCE
from patchproof.defenses.surrogate import Surrogate
from patchproof.defenses.view_defense import ViewDefense
from patchproof.defenses.view_scores import ViewScores
from patchproof.errors import PatchproofError
from patchproof.models.ablation import Ablation
from patchproof.results import Verdict
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize


@dataclass(frozen=True)
class TopCertification:
    """Whether the label is, and provably stays, among the k classes of most evidence.

    Attributes:
        right: (N,) bool: it is on the clean image.
        certified: (N,) bool: it stays whatever the patch shows, at every patch region.
    """

    right: Tensor
    certified: Tensor


class PatchGuard(OverFeatures, ViewDefense):
    """Robust masking over small receptive fields or ablations (Xiang et al., 2021).

    Mask-BN of the paper is a network with ``local_logits``, such as ``bagnet``; Mask-DS one with an
    ablation. For every class the window of features with the largest evidence is left out of the
    sum; the class of the largest rest is returned (Algorithm 1). See ``aggregation.RobustMasking``
    for the certificate. ``paper_condition`` is Algorithm 2 as printed: sound for T = 0, unsound for
    a larger threshold.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: one patch, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        ablation: what each view shows of the image; None for the receptive fields of
            ``model.local_logits``, or for the ablation that the model was made for.
        bands: 1, since windows need views on a grid.
        feature: ``"logits"``, ``"confidence"`` or ``"prediction"``; by default logits of receptive
            fields and confidences of ablations (Table 3).
        threshold: T in [0, 1]: a window is left out if its share of the class's evidence is larger.
        window: features a side, or (rows, columns); by default those of Equation 1, and more where
            some patch region corrupts more.
        mask_for: a larger patch that the windows are made for by Equation 1, so that one defense
            serves patches of several sizes (Section 5.3.2).
        high: c_h, the upper clipping bound of logits; c_l is 0, which Lemma 1 needs.
        fill: the value in [0, 1] that hidden pixels take in every channel, where the model has no
            way of its own to hide them.
        tolerance: how far (logits) rounding may move a score of a view, or the difference of two;
            the certificate holds for any such rounding.
        batch_size: forwards at once; None picks a number by the size of the image.
        memory_budget: bytes that the activations of one batch may take; None for no limit.

    Raises:
        PatchproofError: a model in training mode or one whose features see the whole image, several
            patches, windows that are larger than the feature map or cannot hold the features that
            some patch region corrupts, or numbers out of range.
    """

    _OWN = ("feature", "threshold", "window", "high")
    aggregation: RobustMasking

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        ablation: Ablation | None = None,
        bands: int = 1,
        feature: Feature | None = None,
        threshold: float = 0.0,
        window: int | tuple[int, int] | None = None,
        mask_for: Threat | None = None,
        high: float = LARGEST,
        fill: float = DEFAULT_FILL,
        tolerance: float = DEFAULT_TOLERANCE,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        views = self._take_views(model, image_size, ablation, bands, fill, tolerance)
        corruption = views.corruption(threat)
        windows = choose_windows(views, corruption, threat, image_size, window, mask_for)
        self.feature = default_feature(views, feature)
        self.threshold = float(threshold)
        self.window = windows.size
        self.high = float(high)
        super().__init__(
            model,
            threat,
            views,
            RobustMasking(
                windows,
                evidence_of(self.feature, self.high),
                threshold=self.threshold,
                tolerance=tolerance,
            ),
            image_size=image_size,
            batch_size=batch_size,
            memory_budget=memory_budget,
            corruption=corruption,
        )

    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""
        model, views, how = self.model, self.views, self.aggregation
        masked = ViewScores(model, views, how.exact_scores, forwards=None, exact=True)
        spread = ViewScores(model, views, how.undetected_scores, forwards=None)
        return {"masked-evidence": masked, "below-detection": spread}

    def describe(self) -> str:
        """Say how many views there are, what each sees, and the windows."""
        return f"{super().describe()}, windows of {self.window[0]}x{self.window[1]}"

    def certify_top(self, images: Tensor, labels: Tensor, k: int) -> TopCertification:
        """Certify that the label stays among the k classes of most evidence (Appendix D).

        Args:
            images: (N, C, H, W) float32 in [0, 1].
            labels: (N,) integers, the right classes.
            k: from 1.

        Raises:
            PatchproofError: images or labels of another shape, type or range, or k below 1.
        """
        check_images(images, self.image_size)
        numbers = check_labels(labels, len(images)).tolist()
        if not isinstance(k, int) or k < 1:
            raise PatchproofError(f"k: expected classes >= 1, got {k!r}")
        right = torch.zeros(len(images), dtype=torch.bool)
        certified = torch.zeros_like(right)
        examples = ((index, images[index], label) for index, label in enumerate(numbers))
        for decided in self._settle(examples, "never"):
            label = decided.labels
            top = self.aggregation.top(decided.outputs, k)
            verdicts = self.aggregation.certify(
                decided.outputs, label, self.corruption.patterns, top=k
            )
            right[decided.keys] = (top == label[:, None]).any(1)
            certified[decided.keys] = (verdicts == Verdict.HOLDS).all(1)
        return TopCertification(right, certified & right)
