"""Images of which only a band or a block is kept (Levine and Feizi, 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.models.ablation import Ablation, Kept
from patchproof.results import Corruption
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize, PixelSets, check_image_size

_MOST_PIXELS = 2**31
"""Pixels of all views together that fit into memory (bytes)."""


class AblatedViews:
    """The image with one band or block kept, or several, at every position; they wrap around.

    A model that has a method ``ablated`` is told what is kept; what it was made for must be these
    ablations. Any other sees the image with hidden pixels filled, in the space of the threat.

    Args:
        ablation: what is kept.
        image_size: (H, W) in pixels.
        bands: how many bands or blocks are kept at once, in every combination of positions.
        fill: the value that hidden pixels take in every channel, in [0, 1].

    Attributes:
        count: V, the number of positions, or of combinations of ``bands`` of them.
        grid: (h, w) of the positions, (1, W) for columns, (H, 1) for rows and (H, W) for blocks;
            views are numbered row by row. None for several bands.
        wraps: whether neighbouring positions go on across the border, along rows and columns.

    Raises:
        PatchproofError: a block larger than the image, more bands than positions, more
            combinations than fit into memory, or a fill outside [0, 1].
    """

    per_forward = 1

    def __init__(
        self, ablation: Ablation, image_size: ImageSize, bands: int = 1, fill: float = 0.5
    ) -> None:
        self.ablation = ablation
        self.image_size = check_image_size(image_size)
        self.fill = fill
        if not 0.0 <= fill <= 1.0:
            raise PatchproofError(f"fill: expected a pixel value in [0, 1], got {fill!r}")
        self._size = ablation.block(self.image_size)
        corners = ablation.corners(self.image_size)
        if not isinstance(bands, int) or isinstance(bands, bool) or not 1 <= bands <= len(corners):
            raise PatchproofError(
                f"bands: expected from 1 to the {len(corners)} positions, got {bands!r}"
            )
        self.count = math.comb(len(corners), bands)
        if self.count * math.prod(self.image_size) > _MOST_PIXELS:
            raise PatchproofError(
                f"bands: expected views that fit into memory, got {self.count:,} combinations of "
                f"{bands} {ablation.kind}s"
            )
        self._corners = corners[torch.combinations(torch.arange(len(corners)), bands)]
        down, across = ablation.kind != "column", ablation.kind != "row"
        self.wraps = (down, across)
        self.grid: tuple[int, int] | None = None
        if bands == 1:
            height, width = self.image_size
            self.grid = (height if down else 1, width if across else 1)

    def corruption(self, threat: Threat) -> Corruption:
        """Enumerate which views each patch region corrupts: those that keep a pixel of it."""
        kept = Kept(self._corners, self._size)
        return threat.corruption(PixelSets.of(kept.pixels(self.image_size)))

    def evaluate(self, model: nn.Module, images: Tensor, forwards: Tensor) -> Tensor:
        """Return the scores, (B, 1, classes), of image b as view ``forwards[b]`` shows it."""
        if self._corners.device != images.device:
            self._corners = self._corners.to(images.device)
        kept = Kept(self._corners[forwards], self._size)
        ablated = getattr(model, "ablated", None)
        if ablated is None:
            hidden = ~kept.pixels(self.image_size)
            scores = model(images.masked_fill(hidden[:, None], self.fill))
        else:
            if (made_for := getattr(model, "ablation", self.ablation)) != self.ablation:
                raise PatchproofError(
                    f"ablation: expected {made_for}, which the model was made for, "
                    f"got {self.ablation}"
                )
            scores = ablated(images, kept)
        if not isinstance(scores, Tensor):
            raise PatchproofError(f"model: expected logits, got {type(scores).__name__}")
        return scores[:, None]
