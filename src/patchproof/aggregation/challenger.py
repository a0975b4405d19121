"""The challenger game (PatchCleanser, Appendix C) and its region certificate."""

from __future__ import annotations

import torch
from torch import Tensor

from patchproof.aggregation.base import CERTAIN
from patchproof.aggregation.pairs import Attack, PairAggregation
from patchproof.results import INVALID_LABEL, Case, Outputs


class ChallengerGame(PairAggregation):
    """Let masks with different labels play until one label is left.

    The incumbent is first the mask of lowest index; the challenger is the remaining mask of lowest
    index with another label. The two-mask label decides: the challenger wins if it confirms the
    challenger's label, else the incumbent stays, also when it confirms neither. The loser is out.
    At most M - 1 games are played. Masks with invalid labels do not take part.

    **Certificate.** The label y stays at region r if some m in C(r), the masks that cover r, has
    the one-mask label y, and entry (m, m') is y for every m' but those of C(r) whose own label is
    y. Proof: m is never beaten. Its opponent has another label than y, so it is not one of the
    exceptions, and the entry that decides is y, benign since m covers r. So m is still there when
    one label is left, and that label is y. Entries within the tolerance count as not right.
    """

    def predict(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the labels and the cases, (N,) int64 each, of decided images."""
        table = outputs.labels[:, self.pair_to_view]
        known = torch.ones_like(table, dtype=torch.bool)
        incumbent, _ = self._play(table, known)
        one_mask = table.diagonal(dim1=1, dim2=2)
        label = one_mask.gather(1, incumbent[:, None]).squeeze(1).clamp(min=0)
        agreed = (one_mask == one_mask[:, :1]).all(1) & (one_mask[:, 0] != INVALID_LABEL)
        return label, torch.where(agreed, int(Case.AGREED), int(Case.CHALLENGER))

    def _play(self, table: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Play every game whose two-mask label is known, in all images at once.

        Returns:
            The incumbents, (N,) int64, and the challengers that wait for their two-mask label,
            (N,) int64, or -1 where one label is left.
        """
        one_mask = table.diagonal(dim1=1, dim2=2)
        image = torch.arange(len(table))
        alive = one_mask != INVALID_LABEL
        incumbent = alive.int().argmax(1)
        while True:
            rival = alive & (one_mask != one_mask[image, incumbent][:, None])
            challenger = rival.int().argmax(1)
            plays = rival.any(1) & known[image, incumbent, challenger]
            if not plays.any():
                return incumbent, torch.where(rival.any(1), challenger, -1)
            wins = plays & (table[image, incumbent, challenger] == one_mask[image, challenger])
            loser = torch.where(wins, incumbent, challenger)
            alive[image[plays], loser[plays]] = False
            incumbent = torch.where(wins, challenger, incumbent)

    def _wanted_for_label(self, outputs: Outputs) -> Tensor:
        table, known = outputs.labels[:, self.pair_to_view], outputs.known[:, self.pair_to_view]
        incumbent, waiting = self._play(table, known)
        wanted = torch.zeros(outputs.known.shape)
        image = (waiting >= 0).nonzero().squeeze(1)
        wanted[image, self.pair_to_view[incumbent[image], waiting[image]]] = CERTAIN
        return wanted

    def _holds(self, attack: Attack) -> Tensor:
        right = attack.right
        own = right[:, self.one_mask_views]
        covers = (~attack.patterns[:, self.one_mask_views]).float()
        wrong = (~right).float()[:, self.pair_to_view]
        excused = (wrong * own[:, None, :]) @ covers.T
        unbeaten = own[:, :, None] & (wrong.sum(2, keepdim=True) == excused)
        return (unbeaten & covers.T.bool()).any(1)

    def _useful(self, right: Tensor, open_patterns: Tensor, covers: Tensor) -> Tensor:
        own = right[:, self.one_mask_views]
        row_is_useful = own & (open_patterns.float() @ covers > 0)
        return self._views_in(row_is_useful)
