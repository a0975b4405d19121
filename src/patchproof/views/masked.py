"""The image with one or two masks of a mask set on it (PatchCleanser, Section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchproof.results import Corruption, PatchproofError, distinct_rows
from patchproof.threat import MaskSet, Threat


class MaskPairViews:
    """The distinct unions of two masks: each is evaluated once, whatever pairs it stands for.

    Masks act on pixels in [0, 1], in the space of the threat, before the model resizes or
    normalises anything.

    Args:
        mask_set: M masks.
        fill: the value that masked pixels take in every channel, in [0, 1].

    Attributes:
        count: V, the number of distinct unions, at most M (M + 1) / 2.
        pair_to_view: (M, M) int64, the view of each pair of masks; of each mask on the diagonal.
        hidden: (V, H, W) bool, the pixels that each view hides.
    """

    per_forward = 1

    def __init__(self, mask_set: MaskSet, fill: float) -> None:
        if not 0.0 <= fill <= 1.0:
            raise PatchproofError(f"fill: expected a pixel value in [0, 1], got {fill!r}")
        self.mask_set = mask_set
        self.fill = fill
        masked = mask_set.masked()
        rows, columns = torch.triu_indices(len(mask_set), len(mask_set))
        unions, view = distinct_rows((masked[rows] | masked[columns]).flatten(1))
        self.count = len(unions)
        self.hidden = unions.view(-1, *mask_set.image_size)
        self.pair_to_view = torch.empty(len(mask_set), len(mask_set), dtype=torch.int64)
        self.pair_to_view[rows, columns] = view
        self.pair_to_view[columns, rows] = view
        self._hidden_there = self.hidden

    def corruption(self, threat: Threat) -> Corruption:
        """Enumerate which views each patch region corrupts: those that see a pixel of it."""
        return Corruption.of(threat.regions(self.mask_set.image_size).seen_by(~self.hidden))

    def evaluate(self, model: nn.Module, images: Tensor, forwards: Tensor) -> Tensor:
        """Return the scores, (B, 1, classes), of image b with the masks of view ``forwards[b]``."""
        if self._hidden_there.device != images.device:
            self._hidden_there = self.hidden.to(images.device)
        masked = images.masked_fill(self._hidden_there[forwards][:, None], self.fill)
        scores = model(masked)
        if not isinstance(scores, Tensor):
            raise PatchproofError(f"model: expected logits, got {type(scores).__name__}")
        return scores[:, None]
