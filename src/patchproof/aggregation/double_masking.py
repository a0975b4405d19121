"""Double masking (PatchCleanser, Section 3.2, Algorithm 1) and its region certificate."""

from __future__ import annotations

import torch
from torch import Tensor

from patchproof.aggregation.pairs import PairAggregation, majority
from patchproof.results import INVALID_LABEL, Case, Outputs


class DoubleMasking(PairAggregation):
    """Return the agreed label, else that of a disagreer whose whole row agrees, else the majority.

    Disagreers are tried by ascending mask index; a row includes the one-mask label itself.

    **Certificate.** Let C(r) be the masks that cover region r. An entry is benign if its two masks
    together cover r; the attacker sets all others at will. The label y stays at r if and only if

    - (a) some m* in C(r) has its whole row right, or
    - (a') y wins the one-mask vote among C(r) even if every mask outside C(r) votes for the same
      other label, and (b) no row can be unanimously wrong: among its benign entries each row has
      the label y or two different labels.

    *Sufficient, (a).* Every entry of row m* is benign, as m* alone covers r. The tables are
    symmetric, so each row m holds the entry (m, m*) = y: a unanimous row is unanimous for y. So
    Case II returns only y. Case I returns the label that m* shares: y. Case III is reached with a
    majority other than y only if all disagreers' rows disagree, but m* is a disagreer then and its
    row agrees. *Sufficient, (a') and (b).* By (a') the majority is y, which Cases I and III return,
    and by (b) no disagreer's row agrees on a wrong label.

    *Necessary.* If (a) and (a') fail, the attacker lets every mask outside C(r) vote for the label
    that then wins. Those masks agree with the majority, so they are no disagreers; each row of
    C(r) has a wrong entry or one that the attacker can set wrong, so it does not agree on y. No
    case returns y. If (a) and (b) fail, the attacker completes the row that can be unanimously
    wrong: its mask is a disagreer and Case II returns its label or another disagreer's, which is
    not y, unless the majority is not y already, and then (a) failing loses as before.

    Entries within the tolerance count as the attacker's, as if they were not benign; the proof
    only uses which entries the attacker sets.
    """

    def predict(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the labels and the cases, (N,) int64 each, of decided images."""
        table = outputs.labels[:, self.pair_to_view]
        one_mask = table.diagonal(dim1=1, dim2=2)
        label = majority(one_mask, outputs.classes)
        disagrees = one_mask != label[:, None]
        agrees = (table == one_mask[:, :, None]).all(2) & (one_mask != INVALID_LABEL)
        returned = disagrees & agrees
        first = returned.int().argmax(1, keepdim=True)
        by_disagreer = returned.any(1)
        label = torch.where(by_disagreer, one_mask.gather(1, first).squeeze(1), label)
        case = torch.full_like(label, Case.MAJORITY)
        case[by_disagreer] = Case.DISAGREER
        case[~disagrees.any(1)] = Case.AGREED
        return label, case

    def _wanted_for_label(self, table: Tensor, known: Tensor, margins: Tensor) -> Tensor:
        one_mask = table.diagonal(dim1=1, dim2=2)
        classes = int(table.max()) + 1
        disagrees = one_mask != majority(one_mask, max(classes, 1))[:, None]
        refuted = (known & (table != one_mask[:, :, None])).any(2) | (one_mask == INVALID_LABEL)
        candidate = disagrees & ~refuted
        unanimous = candidate & known.all(2)
        settled = unanimous.int().cumsum(1) > 0  # a unanimous row ends the search
        candidate &= ~settled
        # Rows in order; within a row first what is likeliest to disagree: a second mask that is
        # sure of another label.
        rows = len(self.pair_to_view)
        order = 1.0 - torch.arange(rows) / rows
        differs = one_mask[:, None, :] != one_mask[:, :, None]
        sure = margins.diagonal(dim1=1, dim2=2)[:, None, :].sigmoid()
        return candidate[:, :, None] * (order[:, None] + differs * sure / (2 * rows))

    def _holds(
        self, table: Tensor, free: Tensor, labels: Tensor, patterns: Tensor, classes: int
    ) -> Tensor:
        right = ~free & (table == labels[:, None, None])
        covers = ~patterns[:, self.one_mask_views]
        holds = right.all(2).float() @ covers.float().T > 0
        # (a') needs as many masks inside C(r) as outside.
        often = (2 * covers.sum(1) >= len(self.pair_to_view)).nonzero().squeeze(1)
        open_images = (~holds[:, often]).any(1).nonzero().squeeze(1)
        if len(often) and len(open_images):
            holds[open_images[:, None], often] |= self._majority_holds(
                table[open_images],
                free[open_images],
                right[open_images],
                labels[open_images],
                patterns[often],
                classes,
            )
        return holds

    def _majority_holds(
        self,
        table: Tensor,
        free: Tensor,
        right: Tensor,
        labels: Tensor,
        patterns: Tensor,
        classes: int,
    ) -> Tensor:
        """Return whether (a') and (b) hold, (N, P) bool, pattern by pattern to bound the memory."""
        holds = torch.empty(len(table), len(patterns), dtype=torch.bool)
        one_mask = table.diagonal(dim1=1, dim2=2)
        for index, pattern in enumerate(patterns):
            benign = ~free & ~pattern[self.pair_to_view]
            votes = torch.zeros(len(table), classes, dtype=torch.int64)
            inside = benign.diagonal(dim1=1, dim2=2)
            votes.scatter_add_(1, one_mask.clamp(min=0), inside.long())
            lead = votes.gather(1, labels[:, None]) - votes - (~inside).sum(1, keepdim=True)
            higher = torch.arange(classes) > labels[:, None]
            wins = (lead > 0) | ((lead == 0) & higher)
            wins.scatter_(1, labels[:, None], True)
            above = torch.where(benign, table, -1).amax(2)
            below = torch.where(benign, table, classes).amin(2)
            guarded = (right & benign).any(2) | (below < above)
            holds[:, index] = wins.all(1) & guarded.all(1)
        return holds

    def _useful(self, right: Tensor, open_patterns: Tensor, covers: Tensor) -> Tensor:
        rows = right.all(2) & (open_patterns.float() @ covers.float() > 0)
        by_vote = (open_patterns & (2 * covers.sum(1) >= covers.shape[1])).any(1)
        return rows[:, :, None] | rows[:, None, :] | by_vote[:, None, None]
