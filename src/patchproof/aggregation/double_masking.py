"""Double masking (PatchCleanser, Section 3.2, Algorithm 1) and its region certificate."""

from __future__ import annotations

import torch
from torch import Tensor

from patchproof.aggregation.pairs import Attack, PairAggregation, majority
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

    def _wanted_for_label(self, outputs: Outputs) -> Tensor:
        one_mask = outputs.labels[:, self.one_mask_views]
        disagrees = one_mask != majority(one_mask, outputs.classes)[:, None]
        disagrees &= one_mask != INVALID_LABEL
        wanted = torch.zeros(outputs.known.shape)
        image = disagrees.any(1).nonzero().squeeze(1)
        if not len(image):
            return wanted
        one_mask, disagrees = one_mask[image], disagrees[image]
        known = outputs.known[image][:, self.pair_to_view]
        differs = outputs.labels[image][:, self.pair_to_view] != one_mask[:, :, None]
        candidate = disagrees & ~(known & differs).any(2)
        unanimous = candidate & known.all(2)
        candidate &= unanimous.cumsum(1) == 0  # a unanimous row ends the search
        # First, of each row, what is likeliest to disagree: a second mask that is sure of another
        # label. Then all, by rows.
        masks = len(self.pair_to_view)
        order = 1.0 - torch.arange(masks) / masks
        sure = outputs.margins[image][:, self.one_mask_views].sigmoid()
        sure = sure[:, None, :] * (one_mask[:, None, :] != one_mask[:, :, None])
        open_sure = sure.masked_fill(known, -1.0)
        likeliest = open_sure == open_sure.amax(2, keepdim=True)
        priority = candidate[:, :, None] * (2 * likeliest + order[:, None] + sure / (2 * masks))
        views = self.pair_to_view.flatten().expand(len(image), -1)
        wanted[image] = wanted[image].scatter_reduce_(1, views, priority.flatten(1), "amax")
        return wanted

    def _holds(self, attack: Attack) -> Tensor:
        row_is_right = ~self._rows_with(~attack.right)
        covers = ~attack.patterns[:, self.one_mask_views]
        holds = row_is_right.float() @ covers.float().T > 0
        # (a') needs as many masks inside C(r) as outside.
        often = (2 * covers.sum(1) >= len(self.pair_to_view)).nonzero().squeeze(1)
        image = (~holds[:, often]).any(1).nonzero().squeeze(1)
        if len(image):
            holds[image[:, None], often] |= self._holds_by_vote(attack.select(image, often))
        return holds

    def _holds_by_vote(self, attack: Attack) -> Tensor:
        """Return whether (a') and (b) hold, (N, P) bool, pattern by pattern to bound the memory."""
        table = attack.outputs[:, self.pair_to_view]
        one_mask = attack.outputs[:, self.one_mask_views]
        y = attack.labels[:, None]
        higher = torch.arange(attack.classes) > y
        holds = torch.empty(len(table), len(attack.patterns), dtype=torch.bool)
        for index, pattern in enumerate(attack.patterns):
            benign = ~attack.free & ~pattern
            inside = benign[:, self.one_mask_views]
            votes = torch.zeros(len(table), attack.classes, dtype=torch.int64)
            votes.scatter_add_(1, one_mask.clamp(min=0), inside.long())
            lead = votes.gather(1, y) - votes - (~inside).sum(1, keepdim=True)
            wins = ((lead > 0) | ((lead == 0) & higher)).scatter_(1, y, True)
            benign = benign[:, self.pair_to_view]
            highest = torch.where(benign, table, -1).amax(2)
            lowest = torch.where(benign, table, attack.classes).amin(2)
            guarded = (benign & (table == y[:, :, None])).any(2) | (lowest < highest)
            holds[:, index] = wins.all(1) & guarded.all(1)
        return holds

    def _useful(self, right: Tensor, open_patterns: Tensor, covers: Tensor) -> Tensor:
        row_is_useful = ~self._rows_with(~right) & (open_patterns.float() @ covers > 0)
        by_vote = (open_patterns & (2 * covers.sum(1) >= covers.shape[1])).any(1, keepdim=True)
        return self._views_in(row_is_useful) | by_vote
