"""Recipe ``ablation``: train on random bands, as de-randomized smoothing classifies by them.

De-randomized smoothing (Levine and Feizi, 2020) classifies an image once for every place of a band
or block that alone is kept, and counts the votes. Its network is trained on what it will see: of
every image in every step another place, drawn uniformly over all that the defense looks at, those
that wrap around the border among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec
from patchproof.models.ablation import AblatedNetwork, Ablation, Kept
from patchproof.training.masking import draw_candidates
from patchproof.training.voting import VotingRecipe

VALIDATION_PLACES = 32
"""Most places that vote in a validation; the defense itself asks all."""


@dataclass(frozen=True, kw_only=True)
class AblationRecipe(VotingRecipe):
    """Train on images of which one or several random blocks are kept.

    A network with a method ``ablated`` is given the image and what is kept; any other sees the rest
    of the image filled. The epoch is chosen by the accuracy of a majority vote on at most 1,000
    validation images, over all places of the band, or over 32 evenly spread ones (for several
    bands: 32 random choices of places) where there are more.

    Attributes:
        ablation: which block an image keeps.
        bands: how many blocks an image keeps, all at other places.
    """

    ablation: Ablation
    bands: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bands < 1:
            raise PatchproofError(f"expected bands from 1, got {self.bands}")

    @property
    def name(self) -> str:
        """Return ``ablation``."""
        return "ablation"

    def draw(self, spec: ModelSpec, count: int) -> Tensor | None:
        """Return the corners of what is kept in a validation, (V, bands, 2) int64."""
        corners = self.ablation.corners(spec.image_size)
        if self.bands > len(corners):
            raise PatchproofError(
                f"expected bands up to the {len(corners)} places of the {self.ablation.kind}, "
                f"got {self.bands}"
            )
        if self.bands > 1:
            return corners[draw_candidates(VALIDATION_PLACES, len(corners), self.bands)]
        places = min(len(corners), VALIDATION_PLACES)
        return corners[torch.arange(places) * len(corners) // places].unsqueeze(1)

    def check(self, network: nn.Module, spec: ModelSpec) -> None:
        """Raise ``PatchproofError`` if the network was made for another ablation."""
        made_for = getattr(network, "ablation", None)
        if made_for is not None and made_for != self.ablation:
            raise PatchproofError(
                f"expected the ablation that the network was made for, {made_for}, "
                f"got {self.ablation}"
            )

    def loss(
        self, network: nn.Module, views: Tensor, labels: Tensor, drawn: Tensor | None
    ) -> Tensor:
        """Return the cross-entropy of images of which random blocks are kept."""
        corners = self.ablation.corners((views.shape[2], views.shape[3]))
        places = corners[draw_candidates(len(views), len(corners), self.bands)]
        logits = self.view(network, views, places.to(views.device))
        return functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def view(self, network: nn.Module, images: Tensor, places: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, H, W) with blocks kept at (N, bands, 2)."""
        size = (images.shape[2], images.shape[3])
        kept = Kept(places, self.ablation.block(size))
        if hasattr(network, "ablated"):
            return cast(AblatedNetwork, network).ablated(images, kept)
        hidden = ~kept.pixels(size).unsqueeze(1)
        logits: Tensor = network(images.masked_fill(hidden, self.fill))
        return logits

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return super().to_dict() | {"ablation": self.ablation.to_dict()}
