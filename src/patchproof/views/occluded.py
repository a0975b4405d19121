"""The image with some of its pixels hidden, and as it is with one mask at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.results import Corruption
from patchproof.threat import MaskSet, Threat
from patchproof.threat.regions import PixelSets


class OccludedViews:
    """The image with one of V sets of pixels hidden.

    Pixels are hidden in [0, 1], in the space of the threat, before the model resizes or normalises
    anything.

    Args:
        hidden: the pixels that each of the V views hides.
        fill: the value that hidden pixels take in every channel, in [0, 1].

    Attributes:
        count: V.

    Raises:
        PatchproofError: a fill outside [0, 1].
    """

    per_forward = 1

    def __init__(self, hidden: PixelSets, fill: float) -> None:
        if not 0.0 <= fill <= 1.0:
            raise PatchproofError(f"fill: expected a pixel value in [0, 1], got {fill!r}")
        self.count = len(hidden)
        self.hidden = hidden
        self.fill = fill
        self._hidden_there = hidden

    def corruption(self, threat: Threat) -> Corruption:
        """Enumerate which views each patch region corrupts: those that see a pixel of it."""
        return threat.corruption(self.hidden.complements())

    def evaluate(self, model: nn.Module, images: Tensor, forwards: Tensor) -> Tensor:
        """Return the scores, (B, 1, classes), of image b as view ``forwards[b]`` shows it."""
        if self._hidden_there.cells.device != images.device:
            self._hidden_there = self.hidden.to(images.device)
        hidden = self._hidden_there.choose(forwards).pixels()
        scores = model(images.masked_fill(hidden[:, None], self.fill))
        if not isinstance(scores, Tensor):
            raise PatchproofError(f"model: expected logits, got {type(scores).__name__}")
        return scores[:, None]


class UnmaskedAndMaskedViews(OccludedViews):
    """View 0 is the unmasked image; views 1 to M show it with one mask each, in their order.

    Args:
        mask_set: M masks.
        fill: the value that masked pixels take in every channel, in [0, 1].
    """

    def __init__(self, mask_set: MaskSet, fill: float) -> None:
        masks = mask_set.hidden()
        nothing = torch.zeros_like(masks.cells[:1])
        super().__init__(masks.with_cells(torch.cat([nothing, masks.cells])), fill)
        self.mask_set = mask_set
