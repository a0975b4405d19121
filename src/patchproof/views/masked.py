"""The image with one or two masks of a mask set on it (PatchCleanser, Section 3.1)."""

from __future__ import annotations

import torch

from patchproof.errors import PatchproofError
from patchproof.results import distinct_rows
from patchproof.threat import MaskSet
from patchproof.views.occluded import OccludedViews

_MOST_CELLS = 2**30
"""Cells of all pairs of masks that fit into memory (bytes)."""


class MaskPairViews(OccludedViews):
    """The distinct unions of two masks: each is evaluated once, whatever pairs it stands for.

    Args:
        mask_set: M masks.
        fill: the value that masked pixels take in every channel, in [0, 1].

    Attributes:
        count: V, the number of distinct unions, at most M (M + 1) / 2.
        pair_to_view: (M, M) int64, the view of each pair of masks; of each mask on the diagonal.
        hidden: the pixels that each of the V views hides.

    Raises:
        PatchproofError: a fill outside [0, 1], or pairs that do not fit into memory.
    """

    def __init__(self, mask_set: MaskSet, fill: float) -> None:
        self.mask_set = mask_set
        masks = mask_set.hidden()
        rows, columns = torch.triu_indices(len(mask_set), len(mask_set))
        if len(rows) * masks.cells[0].numel() > _MOST_CELLS:
            raise PatchproofError(
                f"mask set: expected pairs of masks that fit into memory, got {len(rows):,} of "
                f"{masks.cells[0].numel():,} cells each: take fewer masks, or a simpler stencil"
            )
        unions, view = distinct_rows((masks.cells[rows] | masks.cells[columns]).flatten(1))
        super().__init__(masks.with_cells(unions.view(-1, *masks.cells.shape[1:])), fill)
        self.pair_to_view = torch.empty(len(mask_set), len(mask_set), dtype=torch.int64)
        self.pair_to_view[rows, columns] = view
        self.pair_to_view[columns, rows] = view
