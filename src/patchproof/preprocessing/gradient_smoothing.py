"""Local Gradients Smoothing: darken the pixels where the image changes sharply."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.preprocessing.squares import pixels_in, window_means

_FLAT = 1e-12
"""Gradients of an image whose range is no larger count as equal: there is nothing to smooth."""


class GradientSmoothing(nn.Module):
    """Multiply each pixel by one minus its image gradient (Naseer, Khan and Porikli, 2019).

    x_hat = x (1 - clip(lambda g(x), 0, 1)), Equation 2 of Chiang et al. (2020), where g is the
    magnitude of the image's gradient, scaled to [0, 1], and 0 outside of the windows whose mean
    gradient is above the threshold. Patches change sharply from pixel to pixel, so that they are
    darkened; so are edges.

    The smoothing passes gradients on to the images; which windows are above the threshold is a
    constant to them.

    Args:
        window: side of the windows in pixels (15 in the paper, for images of 224x224).
        overlap: of neighbouring windows in pixels, less than ``window`` (5 in the paper). The last
            ones end with the image and overlap by more where the others do not come out even.
        threshold: in [0, 1], the mean scaled gradient above which a window is smoothed (gamma, 0.1
            in the paper).
        smoothing: lambda > 0 (2.3 in the paper).

    Raises:
        PatchproofError: numbers out of range.
    """

    def __init__(self, window: int, overlap: int, threshold: float, smoothing: float) -> None:
        super().__init__()
        if not isinstance(window, int) or window < 1:
            raise PatchproofError(f"window: expected pixels a side >= 1, got {window!r}")
        if not isinstance(overlap, int) or not 0 <= overlap < window:
            raise PatchproofError(
                f"overlap: expected pixels from 0 to less than the window's {window}, "
                f"got {overlap!r}"
            )
        if not 0.0 <= threshold <= 1.0:
            raise PatchproofError(f"threshold: expected a gradient in [0, 1], got {threshold!r}")
        if not 0.0 < smoothing < float("inf"):
            raise PatchproofError(f"smoothing: expected a number > 0, got {smoothing!r}")
        self.window = window
        self.overlap = overlap
        self.threshold = float(threshold)
        self.smoothing = float(smoothing)

    def extra_repr(self) -> str:
        """Return the settings."""
        return (
            f"window={self.window}, overlap={self.overlap}, threshold={self.threshold}, "
            f"smoothing={self.smoothing}"
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the smoothed images, (N, C, H, W), of images in [0, 1] no smaller than a window.

        Raises:
            PatchproofError: smaller images.
        """
        gradient = scaled_gradient(images)
        smoothed = steep_pixels(gradient.detach(), self.window, self.overlap, self.threshold)
        return images * (1.0 - (self.smoothing * gradient * smoothed).clamp(0.0, 1.0))


def scaled_gradient(images: Tensor) -> Tensor:
    """Return the magnitude of each image's gradient, scaled to [0, 1] over the image.

    The gradient is the difference to the next row and to the next column of the mean over the
    channels; 0 beyond the border.

    Args:
        images: (N, C, H, W).

    Returns:
        (N, 1, H, W); 0 for an image whose gradient is the same everywhere. Differentiable in the
        images, with a derivative of 0 where the magnitude is 0.
    """
    grey = images.mean(1, keepdim=True)
    down = functional.pad(grey.diff(dim=2), [0, 0, 0, 1])
    across = functional.pad(grey.diff(dim=3), [0, 1, 0, 0])
    squared = down.square() + across.square()
    changes = squared > 0
    magnitude = torch.where(changes, torch.where(changes, squared, 1.0).sqrt(), 0.0)
    low = magnitude.amin((1, 2, 3), keepdim=True)
    extent = magnitude.amax((1, 2, 3), keepdim=True) - low
    return (magnitude - low) / extent.clamp(min=_FLAT)


def steep_pixels(gradient: Tensor, window: int, overlap: int, threshold: float) -> Tensor:
    """Return the pixels in windows whose mean gradient is above the threshold.

    Args:
        gradient: (N, 1, H, W) in [0, 1].
        window: side of the windows in pixels.
        overlap: of neighbouring windows in pixels.
        threshold: in [0, 1].

    Returns:
        (N, 1, H, W) bool.

    Raises:
        PatchproofError: an image smaller than a window.
    """
    height, width = gradient.shape[2:]
    if window > min(height, width):
        raise PatchproofError(
            f"window: expected at most the image's {height}x{width} pixels, got {window}"
        )
    means = window_means(gradient, window)
    looked_at = torch.zeros(means.shape[2:], dtype=torch.bool, device=gradient.device)
    rows = _first_pixels(height, window, window - overlap)
    columns = _first_pixels(width, window, window - overlap)
    looked_at[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
    return pixels_in((means > threshold) & looked_at, window)


def _first_pixels(length: int, window: int, step: int) -> list[int]:
    """Return where the windows along an axis begin; the last one ends with the image."""
    last = length - window
    return [*range(0, last, step), last]
