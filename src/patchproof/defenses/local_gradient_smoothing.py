"""Local Gradients Smoothing: a network on images whose sharp changes are darkened."""

from __future__ import annotations

from torch import nn

from patchproof.defenses.preprocessed import PreprocessedDefense
from patchproof.preprocessing import GradientSmoothing
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize


class LocalGradientSmoothing(PreprocessedDefense):
    """A network behind ``GradientSmoothing`` (Naseer, Khan and Porikli, 2019).

    Nothing is proved about it, and it is broken: an attacker who sends gradients through the
    smoothing keeps the patch smooth (Chiang et al., 2020, Section 3).

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what an attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        window: side in pixels of the windows that are smoothed or not. The default is that of the
            paper, for images of 224x224; small images need smaller ones, such as 5.
        overlap: of neighbouring windows in pixels.
        threshold: in [0, 1], the mean gradient above which a window is smoothed (gamma).
        smoothing: how much a gradient darkens its pixel (lambda).
        batch_size: images in one forward pass; None picks one by the size of the image.
        memory_budget: bytes that the activations of one batch may take, by an estimate from the
            layers' inputs and outputs; None for no limit.

    Raises:
        PatchproofError: a model in training mode, a patch or windows that do not fit in the image,
            or numbers out of range.
    """

    _OWN = ("window", "overlap", "threshold", "smoothing")

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        window: int = 15,
        overlap: int = 5,
        threshold: float = 0.1,
        smoothing: float = 2.3,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        super().__init__(
            model,
            threat,
            image_size=image_size,
            batch_size=batch_size,
            memory_budget=memory_budget,
        )
        step = GradientSmoothing(window, overlap, threshold, smoothing)
        self._check_sides(window=window)
        self.window = step.window
        self.overlap = step.overlap
        self.threshold = step.threshold
        self.smoothing = step.smoothing
        self.network = nn.Sequential(step, model).eval()

    def describe(self) -> str:
        """Say how much is smoothed, and where."""
        return (
            f"local gradients smoothed by {self.smoothing:g} in windows of "
            f"{self.window}x{self.window} pixels, overlapping by {self.overlap}, with a mean above "
            f"{self.threshold:g}"
        )
