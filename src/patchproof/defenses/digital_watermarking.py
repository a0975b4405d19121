"""Digital Watermarking: a network on images whose most salient region is masked."""

from __future__ import annotations

from torch import nn

from patchproof.defenses.preprocessed import PreprocessedDefense
from patchproof.defenses.saved import DEFAULT_FILL
from patchproof.errors import PatchproofError
from patchproof.preprocessing import SaliencyMasking
from patchproof.threat import SparsePixels, Threat
from patchproof.threat.regions import ImageSize


class DigitalWatermarking(PreprocessedDefense):
    """A network behind ``SaliencyMasking`` of itself (Hayes, 2018), the blind variant.

    Nothing is proved about it, and it is broken: an attacker who sends gradients past the masking
    as if it were not there finds patches that are not masked, or work all the same (Chiang et al.,
    2020, Section 3). It always masks something, so it loses clean accuracy as well.

    ``predict`` takes the gradient of the network, so it needs a model that has one, and finds
    patches best where its activations are ReLUs (``preprocessing/guided.py``); two forwards are
    counted, and the backward pass is not. Where two regions are about equally salient, which one is
    masked may depend on rounding, and with it on the batch and the device.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what an attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        window: side in pixels of a masked square; None for the longest side of the patch.
        regions: how many squares are masked; None for the number of patches.
        threshold: in [0, 1), the share of the largest saliency above which a pixel counts.
        opening: side in pixels of the square of the erosion and dilation; 1 keeps single pixels.
        fill: the value in [0, 1] that masked pixels take in every channel.
        batch_size: images in one forward pass; None picks one by the size of the image.
        memory_budget: bytes that the activations of one batch may take, by an estimate from the
            layers' inputs and outputs, without what the backward pass keeps; None for no limit.

    Raises:
        PatchproofError: a model in training mode, a patch or squares that do not fit in the image,
            no window for a threat without shapes, or numbers out of range.
    """

    _OWN = ("window", "regions", "threshold", "opening", "fill")
    _FORWARDS = 2

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        window: int | None = None,
        regions: int | None = None,
        threshold: float = 0.1,
        opening: int = 1,
        fill: float = DEFAULT_FILL,
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
        step = SaliencyMasking(
            model,
            _longest_side(threat, self.image_size) if window is None else window,
            threat.patches if regions is None else regions,
            threshold,
            opening,
            fill,
        )
        self._check_sides(window=step.window, opening=opening)
        self.window = step.window
        self.regions = step.regions
        self.threshold = step.threshold
        self.opening = step.opening
        self.fill = step.fill
        self.network = nn.Sequential(step, model).eval()

    def describe(self) -> str:
        """Say what is masked."""
        squares = "square" if self.regions == 1 else f"{self.regions} squares"
        return (
            f"the most salient {squares} of {self.window}x{self.window} pixels masked, by "
            f"gradients above {self.threshold:g} of the largest"
            + (f" in squares of {self.opening}x{self.opening}" if self.opening > 1 else "")
        )


def _longest_side(threat: Threat, image_size: ImageSize) -> int:
    """Return the longest side of one patch, in pixels."""
    if isinstance(threat, SparsePixels):
        raise PatchproofError(
            f"window: expected pixels a side for {threat.label()}, which have no shape, got none"
        )
    return max(max(shape.height, shape.width) for shape in threat.shapes(image_size))
