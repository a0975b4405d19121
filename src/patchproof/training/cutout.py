"""Recipe ``cutout``: train on images with two masks, so that masked views are familiar.

PatchCleanser classifies images with one or two masks on them and certifies those whose label no
pair of masks changes, so the network should be right under any two masks. As in its paper (Section
4.1, after Cutout), two squares of the defense's own fill are put on every training image. Here
their sizes are drawn per square, so that one network serves several mask budgets.

The recipe ``greedy-cutout`` puts the two of the defense's masks on an image that hurt most (Saha et
al., 2023), which costs many forward passes a step: best as fine-tuning of a network that ``cutout``
made. Without squares and masks the same page is the recipe ``plain``, for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec
from patchproof.training.masking import GreedyMasks, greedy_pair, random_squares
from patchproof.training.recipe import Recipe

GREEDY_VALIDATION = 1000
"""Most validation images of ``greedy-cutout``, which searches the worst masks on each."""


@dataclass(frozen=True, kw_only=True)
class CutoutRecipe(Recipe):
    """Train on images with masks; one of ``square_sizes`` and ``greedy``, or for ``plain`` none.

    The epoch is chosen by the accuracy under two fixed random squares for each image; for
    ``greedy-cutout`` under the masks that hurt most, on at most 1,000 images and with fixed
    candidates; for ``plain`` by that of clean images.

    Attributes:
        square_sizes: smallest and largest side of the squares, in pixels; None for the recipes
            ``greedy-cutout`` and ``plain``, without squares.
        greedy: the masks that ``greedy-cutout`` searches; None for the other recipes.
    """

    square_sizes: tuple[int, int] | None
    greedy: GreedyMasks | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.square_sizes is not None and self.greedy is not None:
            raise PatchproofError("expected random squares or greedy masks, got both")
        if self.square_sizes is not None and not 1 <= self.square_sizes[0] <= self.square_sizes[1]:
            raise PatchproofError(
                f"expected square sizes (smallest, largest) from 1 pixel, got {self.square_sizes}"
            )

    @property
    def name(self) -> str:
        """Return ``cutout``, ``greedy-cutout``, or ``plain`` without squares and masks."""
        if self.greedy is not None:
            return "greedy-cutout"
        return "plain" if self.square_sizes is None else "cutout"

    @property
    def measures(self) -> Mapping[str, str]:
        """Return the accuracy of clean images, and with two masks on them (None for ``plain``)."""
        masks = "two random squares" if self.greedy is None else "the two masks that hurt most"
        return {"clean_accuracy": "validation accuracy", "masked_accuracy": f"under {masks}"}

    @property
    def chosen_by(self) -> str:
        """Return the accuracy under masks, or the clean one for ``plain``."""
        return "clean_accuracy" if self.name == "plain" else "masked_accuracy"

    @property
    def validation_images(self) -> int | None:
        """Return the most validation images: few for ``greedy-cutout``."""
        return None if self.greedy is None else GREEDY_VALIDATION

    def draw(self, spec: ModelSpec, count: int) -> Tensor | None:
        """Return the defense's masks (M, H, W), or squares for the validation (N, 1, H, W)."""
        if self.greedy is not None:
            return self.greedy.masked(spec.image_size)
        if self.square_sizes is None:
            return None
        if self.square_sizes[1] >= min(spec.image_size):
            raise PatchproofError(
                f"expected squares smaller than the images of {spec.image_size} pixels, "
                f"got sides up to {self.square_sizes[1]}"
            )
        return random_squares(count, spec.image_size, self.square_sizes)

    def loss(
        self, network: nn.Module, views: Tensor, labels: Tensor, drawn: Tensor | None
    ) -> Tensor:
        """Return the cross-entropy of images with two masks on them."""
        if self.square_sizes is not None:
            size = (views.shape[2], views.shape[3])
            squares = random_squares(len(views), size, self.square_sizes)
            views.masked_fill_(squares.to(views.device), self.fill)
        elif self.greedy is not None:
            views.masked_fill_(self._worst(network, views, labels, drawn), self.fill)
        return functional.cross_entropy(
            network(views), labels, label_smoothing=self.label_smoothing
        )

    def validate(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        drawn: Tensor | None,
        positions: slice,
    ) -> dict[str, Tensor]:
        """Return which images are right, and which are right under masks."""
        right = {"clean_accuracy": network(images).argmax(1) == labels}
        if drawn is not None:
            if self.greedy is None:
                covered = drawn[positions]
            else:
                covered = self._worst(network, images, labels, drawn)
            masked = network(images.masked_fill(covered, self.fill))
            right["masked_accuracy"] = masked.argmax(1) == labels
        return right

    def _worst(
        self, network: nn.Module, images: Tensor, labels: Tensor, masks: Tensor | None
    ) -> Tensor:
        assert self.greedy is not None
        assert masks is not None
        return greedy_pair(network, images, labels, masks, self.greedy.candidates, self.fill)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values; ``greedy`` only where there are such masks."""
        values = super().to_dict()
        if self.square_sizes is not None:
            values["square_sizes"] = list(self.square_sizes)
        if self.greedy is None:
            del values["greedy"]
        else:
            values["greedy"] = self.greedy.to_dict()
        return values
