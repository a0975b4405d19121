"""Recipe ``bagcert``: train the votes of local features to win by a margin.

BagCert (Metzen and Yatsura, ICLR 2021) lets every cell of a bag of local features vote and counts
the votes. A patch that corrupts k of V cells takes at most k votes from the label and gives as many
to one other class, so a label that leads by more than 2k / V of all votes stays. They train a
network end to end for such a lead, with votes that are a step function of the scores and take
another gradient. Here the votes of training are the cells' softmax probabilities instead, which
training for a lead drives towards 0 and 1. What is minimised is, for each image with label y,

    max(0, margin + max over c of votes(c) - votes(y)),   c other than y,

where votes(c) in [0, 1] is the mean over all cells of the probability of c; mixed, by
``clean_share``, with the cross-entropy of the mean logits. With a margin of 2k / V, a loss of 0
means that the confidences of the clean image certify it by number alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.training.evidence import LocalRecipe, local_logits


@dataclass(frozen=True, kw_only=True)
class BagCertRecipe(LocalRecipe):
    """Train for a lead of the label's votes.

    The epoch is chosen by the share of validation images whose votes lead by the margin.

    Attributes:
        margin: the lead that is trained for, as a share of all cells, in (0, 1).
        scale: what the logits are multiplied by before the softmax (an inverse temperature).
    """

    margin: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.margin < 1.0:
            raise PatchproofError(
                "margin: expected a share of the cells between 0 and 1 (a patch that corrupts "
                f"half of them can always win), got {self.margin:g}"
            )

    @property
    def name(self) -> str:
        """Return ``bagcert``."""
        return "bagcert"

    @property
    def measures(self) -> Mapping[str, str]:
        """Return the accuracy of the votes, and the share that leads by the margin."""
        return {
            "clean_accuracy": "validation accuracy of the votes",
            "margin_accuracy": f"with a lead of {self.margin:.0%}",
        }

    @property
    def chosen_by(self) -> str:
        """Return the share of images that lead by the margin."""
        return "margin_accuracy"

    def scores(self, local: Tensor, labels: Tensor) -> Tensor:
        """Return the mean probability of each class over all cells."""
        return (self.scale * local).softmax(1).mean((2, 3))

    def robust_loss(self, local: Tensor, labels: Tensor) -> Tensor:
        """Return how far the votes are from leading by the margin, in the mean."""
        return (self.margin - lead_of(self.scores(local, labels), labels)).clamp(min=0).mean()

    def validate(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        drawn: Tensor | None,
        positions: slice,
    ) -> dict[str, Tensor]:
        """Return which images have most votes for the label, and which by the margin."""
        lead = lead_of(self.scores(local_logits(network, images), labels), labels)
        return {"clean_accuracy": lead > 0, "margin_accuracy": lead > self.margin}


def lead_of(votes: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the label leads any other class, (N,), of votes (N, classes)."""
    own = votes.gather(1, labels.unsqueeze(1))
    others = votes.scatter(1, labels.unsqueeze(1), -torch.inf)
    return own.squeeze(1) - others.amax(1)
