"""What recipes share that train on one view of an image and are judged by the vote of many."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.training.recipe import Recipe

VALIDATION_IMAGES = 1000
"""Most validation images: each is classified once for each of the views."""


@dataclass(frozen=True, kw_only=True)
class VotingRecipe(Recipe):
    """Train on random views; the epoch is chosen by a majority vote of the views that are drawn."""

    @property
    def measures(self) -> Mapping[str, str]:
        """Return the accuracy of the majority vote, and that of single views."""
        return {
            "vote_accuracy": "validation accuracy of the vote",
            "view_accuracy": "of one view",
        }

    @property
    def chosen_by(self) -> str:
        """Return the accuracy of the vote."""
        return "vote_accuracy"

    @property
    def validation_images(self) -> int | None:
        """Return the most validation images."""
        return VALIDATION_IMAGES

    @abstractmethod
    def view(self, network: nn.Module, images: Tensor, places: Tensor) -> Tensor:
        """Return logits (N, classes) of one view of each image (N, C, H, W), at (N, ..., 2)."""

    def validate(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        drawn: Tensor | None,
        positions: slice,
    ) -> dict[str, Tensor]:
        """Return which images the vote gets right, and the share of views that are right."""
        assert drawn is not None
        votes = torch.stack(
            [
                self.view(network, images, place.expand(len(images), *place.shape)).argmax(1)
                for place in drawn
            ],
            dim=1,
        )
        counts = functional.one_hot(votes).sum(1)  # a tie goes to the lowest class, as in defenses
        return {
            "vote_accuracy": counts.argmax(1) == labels,
            "view_accuracy": (votes == labels.unsqueeze(1)).float().mean(1),
        }
