"""The image with one or two masks of a mask set on it (PatchCleanser, Section 3.1)."""

from __future__ import annotations

import torch

from patchproof.results import distinct_rows
from patchproof.threat import MaskSet
from patchproof.views.occluded import OccludedViews


class MaskPairViews(OccludedViews):
    """The distinct unions of two masks: each is evaluated once, whatever pairs it stands for.

    Args:
        mask_set: M masks.
        fill: the value that masked pixels take in every channel, in [0, 1].

    Attributes:
        count: V, the number of distinct unions, at most M (M + 1) / 2.
        pair_to_view: (M, M) int64, the view of each pair of masks; of each mask on the diagonal.
        hidden: the pixels that each of the V views hides.
    """

    def __init__(self, mask_set: MaskSet, fill: float) -> None:
        self.mask_set = mask_set
        masks = mask_set.hidden()
        rows, columns = torch.triu_indices(len(mask_set), len(mask_set))
        unions, view = distinct_rows((masks.cells[rows] | masks.cells[columns]).flatten(1))
        super().__init__(masks.with_cells(unions.view(-1, *masks.cells.shape[1:])), fill)
        self.pair_to_view = torch.empty(len(mask_set), len(mask_set), dtype=torch.int64)
        self.pair_to_view[rows, columns] = view
        self.pair_to_view[columns, rows] = view
