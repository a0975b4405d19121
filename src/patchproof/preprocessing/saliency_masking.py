"""Digital Watermarking: mask the region on which the network's own answer hangs most."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.preprocessing.guided import GuidedReLUs
from patchproof.preprocessing.squares import pixels_in, window_means


class SaliencyMasking(nn.Module):
    """Mask the densest regions of large gradients of the network's answer (Hayes, 2018).

    The blind variant, which has to find the patch: guided gradients of the answer with respect to
    the image are often large at the pixels of a patch. The saliency map is scaled to [0, 1]; pixels
    above a threshold are kept, and of these, by an erosion and a dilation, those that form squares.
    The square window that holds most of the rest is masked. Something always is: where the
    threshold or the erosion leaves nothing, the window with the largest saliency.

    What differs from the paper: whole squares are masked in place of the pixels that were found.
    Guided gradients are those of networks with ReLUs; others have plain ones, with which patches
    stand out little.

    The masks are a constant to the gradients, which pass the step as if it were the identity (BPDA,
    Athalye et al., 2018; Chiang et al., 2020, Section 3.2), those of masked pixels too.

    Args:
        network: from images (N, C, H, W) in [0, 1] to logits (N, classes >= 2), in eval mode.
        window: side of a masked square in pixels.
        regions: how many squares are masked, one after the other.
        threshold: in [0, 1), the share of the largest saliency above which a pixel is kept.
        opening: side in pixels of the square of the erosion and dilation; 1 keeps single pixels.
        fill: the value in [0, 1] that masked pixels take in every channel.

    Raises:
        PatchproofError: numbers out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        window: int,
        regions: int,
        threshold: float,
        opening: int,
        fill: float,
    ) -> None:
        super().__init__()
        for name, count in (("window", window), ("regions", regions), ("opening", opening)):
            if not isinstance(count, int) or count < 1:
                raise PatchproofError(f"{name}: expected a number >= 1, got {count!r}")
        if not 0.0 <= threshold < 1.0:
            raise PatchproofError(f"threshold: expected a share in [0, 1), got {threshold!r}")
        if not 0.0 <= fill <= 1.0:
            raise PatchproofError(f"fill: expected a value in [0, 1], got {fill!r}")
        self.network = network
        self.window = window
        self.regions = regions
        self.threshold = float(threshold)
        self.opening = opening
        self.fill = float(fill)

    def extra_repr(self) -> str:
        """Return the settings."""
        return (
            f"window={self.window}, regions={self.regions}, threshold={self.threshold}, "
            f"opening={self.opening}, fill={self.fill}"
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the masked images, (N, C, H, W), of images in [0, 1] no smaller than a window.

        Raises:
            PatchproofError: smaller images.
        """
        found = dense_squares(
            saliency(self.network, images),
            self.window,
            self.regions,
            self.threshold,
            self.opening,
        )
        masked = torch.where(found, self.fill, images.detach())
        return masked + (images - images.detach())  # adds 0, and the gradient of the identity


def saliency(network: nn.Module, images: Tensor) -> Tensor:
    """Return how much each pixel speaks for the network's own answer.

    That is the class with the highest logit, the lowest of equal ones. What is followed back to the
    pixels, by guided backpropagation, is the lead of its logit over the log-sum-exp of all others:
    the gradient of the cross-entropy is a multiple of its own, and vanishes where the network is
    certain.

    Args:
        network: from images to logits (N, classes >= 2), each image by itself.
        images: (N, C, H, W).

    Returns:
        (N, 1, H, W), the magnitudes of the guided gradient summed over the channels and scaled so
        that the largest of each image is 1; 0 where it is not finite. Without gradients of its own.
    """
    with torch.inference_mode(False), torch.enable_grad():
        pixels = images.detach().clone().requires_grad_()
        with GuidedReLUs():
            logits: Tensor = network(pixels.clone())  # it may change its input in place
        own = logits.argmax(1, keepdim=True)
        others = logits.scatter(1, own, -torch.inf).logsumexp(1)
        lead = logits.gather(1, own).squeeze(1) - others
        (gradient,) = torch.autograd.grad(lead.sum(), pixels)
    magnitude = gradient.nan_to_num(0.0, 0.0, 0.0).abs().sum(1, keepdim=True)
    largest = magnitude.amax((1, 2, 3), keepdim=True)
    return magnitude / torch.where(largest > 0, largest, 1.0)


def dense_squares(
    values: Tensor, window: int, regions: int, threshold: float, opening: int
) -> Tensor:
    """Return the pixels of the squares that hold most of the large values.

    Args:
        values: (N, 1, H, W) in [0, 1].
        window: side of the squares in pixels.
        regions: how many, each chosen without what the ones before it hold.
        threshold: larger values count, where that leaves any.
        opening: side of the square that pixels must be part of to count, in pixels.

    Returns:
        (N, 1, H, W) bool.

    Raises:
        PatchproofError: an image smaller than a window or than the opening.
    """
    height, width = values.shape[2:]
    if max(window, opening) > min(height, width):
        raise PatchproofError(
            f"window and opening: expected at most the image's {height}x{width} pixels, "
            f"got {window} and {opening}"
        )
    large = values * opened(values > threshold, opening)
    found = torch.zeros_like(values, dtype=torch.bool)
    for _ in range(regions):
        rest = large.masked_fill(found, 0.0)
        any_left = rest.amax((1, 2, 3), keepdim=True) > 0
        means = window_means(torch.where(any_left, rest, values.masked_fill(found, 0.0)), window)
        best = means.flatten(1).argmax(1, keepdim=True)
        chosen = torch.zeros_like(means, dtype=torch.bool).flatten(1).scatter(1, best, True)
        found = found | pixels_in(chosen.view_as(means), window)
    return found


def opened(pixels: Tensor, side: int) -> Tensor:
    """Return the pixels that some square of ``side`` pixels of them contains, (N, 1, H, W) bool.

    This is an erosion followed by a dilation with that square.
    """
    full = -functional.max_pool2d(-pixels.float(), side, stride=1) > 0
    return pixels_in(full, side)
