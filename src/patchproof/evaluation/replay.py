"""PatchCleanser on a recording: the labels, costs and certificates of a run, without a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchproof.aggregation import ChallengerGame, DoubleMasking
from patchproof.defenses.patchcleanser import Inference
from patchproof.defenses.view_defense import ViewDefense
from patchproof.evaluation.recording import Recording
from patchproof.results import INVALID_LABEL, Corruption, Prediction, Verdict
from patchproof.threat import Threat
from patchproof.views import MaskPairViews

BATCH_SIZE = 32
"""Views in one forward pass of a replay. The loop fills its last batches with views that may turn
out not to be needed: of a few images, small batches tell better what an image costs."""

_ROWS = 2**24
"""A float32 pixel holds the numbers 0 to 2**24 - 1 over this exactly."""

_TIE = 1e6
"""Scores of this size that differ by 1 count as equal: the difference is rounding."""


class RecordedViews:
    """Masked images whose scores come from a recording in place of a model.

    The images are stand-ins, constant over their pixels, that say which row of the recording they
    stand for. Scores are such that ``Outputs`` records the label and the margin of the recording.

    Args:
        recording: of N images, made with the masks and the fill of ``views``.
        views: the V distinct unions of two of M masks.

    Attributes:
        count: V.
        masks: M.
        pair_to_view: (M, M) int64, the view of each pair of masks.
        image_size: (H, W) in pixels.
    """

    per_forward = 1

    def __init__(self, recording: Recording, views: MaskPairViews) -> None:
        self.recording = recording
        self.count = views.count
        self.masks = len(views.mask_set)
        self.pair_to_view = views.pair_to_view
        self.image_size = views.mask_set.image_size
        self._views = views
        self._corruption: dict[Threat, Corruption] = {}

    def images(self) -> Tensor:
        """Return the stand-ins, (N, 1, H, W) float32 in [0, 1)."""
        rows = torch.arange(len(self.recording)) / _ROWS
        return rows.float().view(-1, 1, 1, 1).expand(-1, 1, *self.image_size)

    def corruption(self, threat: Threat) -> Corruption:
        """Enumerate which views each patch region corrupts: those that see a pixel of it."""
        if threat not in self._corruption:
            self._corruption[threat] = self._views.corruption(threat)
        return self._corruption[threat]

    def evaluate(self, model: nn.Module, images: Tensor, forwards: Tensor) -> Tensor:
        """Return the scores, (B, 1, classes), of stand-in b with the masks of view forwards[b]."""
        row = (images[:, 0, 0, 0] * _ROWS).long()
        label = self.recording.labels[row, 1 + forwards].long()
        margin = self.recording.margins[row, 1 + forwards]
        tie = margin == 0
        others = torch.where(tie, _TIE, 0.0)
        scores = others[:, None].repeat(1, self.recording.classes)
        highest = torch.where(tie, _TIE + 1, margin)
        scores.scatter_(1, label.clamp(min=0)[:, None], highest[:, None])
        return scores.masked_fill((label == INVALID_LABEL)[:, None], torch.nan)[:, None]


@dataclass(frozen=True, eq=False)
class Replay:
    """PatchCleanser with the views of a recording.

    Attributes:
        views: what is known of N images.
        threat: what the attacker may do.
        inference: ``"double"`` (Algorithm 1) or ``"challenger"`` (Appendix C).
        tolerance: a view whose margin (logits) is not larger counts as corrupted.
    """

    views: RecordedViews
    threat: Threat
    inference: Inference
    tolerance: float

    @property
    def defense(self) -> ViewDefense:
        """The defense, whose images are the stand-ins ``views.images()``."""
        return ViewDefense(
            nn.Identity().eval(),
            self.threat,
            self.views,
            self._aggregation,
            image_size=self.views.image_size,
            batch_size=BATCH_SIZE,
        )

    @property
    def _aggregation(self) -> DoubleMasking | ChallengerGame:
        kind = DoubleMasking if self.inference == "double" else ChallengerGame
        return kind(self.views.pair_to_view, self.tolerance)

    def infer(self) -> Prediction:
        """Return the label, case and model forwards of each image, by the loop of the defense."""
        return self.defense.infer(self.views.images())

    def certify(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which images are certified, and which meet the paper's condition.

        Args:
            prediction: (N,) int64, the labels on the clean images.

        Returns:
            (N,) bool each.
        """
        recording, aggregation = self.views.recording, self._aggregation
        patterns = self.views.corruption(self.threat).patterns
        certified = torch.empty(len(recording), dtype=torch.bool)
        paper = torch.empty_like(certified)
        for chunk in recording.chunks(max(self.views.count, len(patterns) * self.views.masks)):
            outputs, right = recording.outputs(chunk), recording.right[chunk]
            verdicts = aggregation.certify(outputs, right, patterns)
            certified[chunk] = (verdicts == Verdict.HOLDS).all(1)
            paper[chunk] = aggregation.paper_condition(outputs, right, patterns)
        return certified & (prediction == recording.right), paper
