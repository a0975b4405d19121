"""Certified training against patches by interval bounds (Chiang et al., 2020, Section 4).

The cross-entropy of the lower bounds of the margins, each at the patch region where it is lowest
(Equation 12). Which regions are looked at is the strategy:

- ``all``: every region. The lowest margin of a class comes from one region, and the gradient too:
  all regions are bounded without gradients, and again those where some class's margin is lowest.
- ``random``: a few, drawn anew for each step (Equation 13).
- ``guided``: a U-Net learns to predict the margins of all regions at once; for each class a region
  is drawn from the softmax of what it predicts (Equations 15 to 18).

Against sparse attacks the first layer is bounded by its weights alone (Equation 19), and there are
no regions to choose.

The training begins with clean images. Then the patch may show what differs little from the image,
and more and more of [0, 1] as the training goes on (Appendix A.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.bounds import BoundedNetwork, PatchBoxes, patch_boxes
from patchproof.bounds.search import phases, regions_together
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec
from patchproof.models.unet import GuideUNet
from patchproof.threat import SparsePixels, Threat
from patchproof.training.recipe import Optimizer, Precision, Recipe, Step

Strategy = Literal["all", "random", "guided"]

_AT_ONCE = 2**11
"""Pairs of an image and a group of regions to bound together where no gradient is needed."""
_MEMBERS_AT_ONCE = 2**14
"""Pairs of an image and a region in these groups, at most."""


_MIXING = nn.BatchNorm1d | nn.BatchNorm2d | nn.Dropout | nn.Dropout1d | nn.Dropout2d
"""Layers that mix the images of a batch in training, or drop what the bounds count."""


@dataclass(frozen=True, kw_only=True)
class IntervalBoundsRecipe(Recipe):
    """Train the lower bounds of the margins.

    Attributes:
        threat: one patch of one shape, or sparse pixels.
        strategy: which regions a step looks at; sparse pixels have none, and take no strategy.
        regions: how many, of ``random`` and ``guided``; of ``guided`` a multiple of the classes.
        pool: of ``all``, how many adjacent places along each axis are bounded together from the
            first layer on, and how many of these from the second on (bound pooling, Appendix A.3).
        clean_start: share of the training on clean images alone, at the beginning. Deep networks
            need it: bounds that grow before anything is learned teach them to ignore the image.
        growth: share of the training after which the interval of a pixel, which has grown from 0
            since, is [0, 1].
        full_rate: share of the training after which the learning rate is halved for the first time;
            None for a ``halving`` after the growth.
        halving: share of the training after which it is halved each further time.
        guide_width: channels of the U-Net at full resolution.
        certified_images: validation images that are certified after each epoch.
    """

    threat: Threat
    strategy: Strategy = "random"
    regions: int = 10
    pool: tuple[int, ...] = ()
    clean_start: float = 0.05
    growth: float = 0.61
    full_rate: float | None = None
    halving: float = 0.1
    guide_width: int = 4
    certified_images: int = 1000
    batch_size: int = 100
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    shift: int = 0
    precision: Precision = "32-true"
    optimizer: Optimizer = "adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in (known := get_args(Strategy)):
            raise PatchproofError(f"expected a strategy of {known}, got {self.strategy!r}")
        for name, low in (("regions", 1), ("guide_width", 1), ("certified_images", 1)):
            if getattr(self, name) < low:
                raise PatchproofError(f"expected {name} from {low}, got {getattr(self, name)}")
        if self.threat.patches > 1:
            raise PatchproofError(f"expected one patch to train on, got {self.threat.label()}")
        if self.pool and min(self.pool) < 2:
            raise PatchproofError(f"expected pool of numbers from 2, got {min(self.pool)}")
        if self.pool and self.strategy != "all":
            raise PatchproofError(f"expected pool with strategy all, got it with {self.strategy}")
        if isinstance(self.threat, SparsePixels) and self.strategy != "random":
            raise PatchproofError(
                "expected no strategy for sparse pixels, which have no regions to choose from, "
                f"got {self.strategy}"
            )
        for name in ("growth", "full_rate", "halving"):
            share = getattr(self, name)
            if share is not None and not 0.0 < share <= 1.0:
                raise PatchproofError(f"expected {name} above 0 and up to 1, got {share}")
        if not 0.0 <= self.clean_start < self.growth:
            raise PatchproofError(
                "expected clean_start from 0 and below growth, "
                f"got {self.clean_start} and growth {self.growth}"
            )
        if self.precision != "32-true":
            raise PatchproofError(f"expected precision 32-true, got {self.precision}")

    @property
    def name(self) -> str:
        """Return ``interval-bounds``."""
        return "interval-bounds"

    @property
    def measures(self) -> Mapping[str, str]:
        """Return clean and certified accuracy."""
        return {
            "clean_accuracy": "validation accuracy",
            "certified_accuracy": "certified",
        }

    @property
    def chosen_by(self) -> str:
        """Return the certified accuracy, at all regions and for any content."""
        return "certified_accuracy"

    @property
    def validation_images(self) -> int | None:
        """Return how many images are certified."""
        return self.certified_images

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return super().to_dict() | {"threat": self.threat.to_dict()}

    def rate(self, done: float) -> float:
        """Return 1 up to ``full_rate``, then half of it, and half again after each ``halving``."""
        first = self.growth + self.halving if self.full_rate is None else self.full_rate
        return math.exp2(-max(0.0, 1 + (done - first) // self.halving))

    def companion(self, spec: ModelSpec) -> nn.Module | None:
        """Return the U-Net of guided training."""
        if self.strategy != "guided":
            return None
        boxes = self.boxes((spec.channels, *spec.image_size))
        rows, columns = (boxes.starts.amax(0) + 1).tolist()
        return GuideUNet(
            spec.classes, spec.channels, spec.image_size, (rows, columns), self.guide_width
        )

    def boxes(self, image_shape: tuple[int, int, int]) -> PatchBoxes:
        """Return all regions of the patch on images (C, H, W), rows first.

        Raises:
            PatchproofError: a patch of several shapes; or places that are no full grid, to guide or
                to pool.
        """
        boxes = all_places(self.threat, image_shape)
        rows, columns = (boxes.starts.amax(0) + 1).tolist()
        if (self.strategy == "guided" or self.pool) and len(boxes.starts) != rows * columns:
            raise PatchproofError(
                f"expected a patch at any place to {'pool' if self.pool else 'guide'}, "
                f"got {self.threat.label()}"
            )
        return boxes

    def _joined(self, boxes: PatchBoxes) -> PatchBoxes:
        return replace(boxes, joined=tuple(count**2 for count in self.pool))

    def check(self, network: nn.Module, spec: ModelSpec) -> None:
        """Raise ``PatchproofError`` if the network has no bounds."""
        bounded = BoundedNetwork(network, (spec.channels, *spec.image_size))
        image, label = torch.zeros(1, *bounded.image_shape), torch.zeros(1, dtype=torch.int64)
        prepared = bounded.prepare(image, label, slack=False)
        if isinstance(self.threat, SparsePixels):
            bounded.margins_of_sparse(prepared, self.threat.count, by_weights_alone=True)
        else:
            boxes = self._joined(self.boxes(bounded.image_shape))
            bounded.margins(prepared, boxes.choose(tiles(boxes, self.pool)[0]))
            if self.strategy == "random" and self.regions > (most := len(boxes.starts)):
                raise PatchproofError(
                    f"expected at most {most} regions, as many as there are, got {self.regions}"
                )
        for name, module in network.named_modules():
            if isinstance(module, _MIXING):
                raise PatchproofError(
                    "expected a network without batch normalisation and dropout to train its "
                    f"bounds, such as ibp-mlp or ibp-conv4, got {name}"
                )
        if self.strategy == "guided" and self.regions % spec.classes:
            raise PatchproofError(
                f"expected guided regions that are a multiple of the {spec.classes} classes, "
                f"got {self.regions}"
            )

    def step_loss(self, step: Step) -> Tensor:
        """Return the cross-entropy of the lowest margins, with the gradients of the guide's error.

        That error is no part of the value: it says nothing of the network.
        """
        share = (step.done - self.clean_start) / (self.growth - self.clean_start)
        if share <= 0:
            return functional.cross_entropy(step.network(step.views), step.labels)
        share = min(1.0, share)
        bounded = bounded_network(step.network, _shape(step.views))
        if isinstance(self.threat, SparsePixels):
            prepared = bounded.prepare(step.views, step.labels, slack=False)
            margins = bounded.margins_of_sparse(
                prepared, self.threat.count, share=share, by_weights_alone=True
            )
            return certificate_loss(margins, step.labels)
        boxes = self._joined(self.boxes(bounded.image_shape))
        boxes = replace(boxes, epsilon=share)
        match self.strategy:
            case "random":
                drawn = torch.randperm(len(boxes.starts))[: self.regions]
                prepared = bounded.prepare(step.views, step.labels, slack=False)
                margins = bounded.margins(prepared, boxes.choose(drawn))
                return certificate_loss(margins.amin(0), step.labels)
            case "all":
                groups = tiles(boxes, self.pool)
                worst = worst_groups(bounded, step.views, step.labels, boxes, groups)
                chosen = groups[of_other_classes(worst, step.labels).cpu()]
                margins = margins_at(bounded, step.views, step.labels, boxes, chosen)
                return certificate_loss(margins.amin(1), step.labels)
            case "guided":
                guide = step.companion
                assert isinstance(guide, GuideUNet)
                features = guide.features(step.views)
                with torch.no_grad():
                    drawn = self._guided(guide.everywhere(features).flatten(2))
                margins = margins_at(bounded, step.views, step.labels, boxes, drawn[..., None])
                seen = guide.at(features, drawn)
                guide_loss = functional.mse_loss(seen, margins.detach().transpose(1, 2))
                return (
                    certificate_loss(margins.amin(1), step.labels)
                    + guide_loss
                    - guide_loss.detach()
                )

    def _guided(self, predicted: Tensor) -> Tensor:
        """Draw regions by predicted margins (N, classes, places): (N, ``regions``) int64."""
        each = self.regions // predicted.shape[1]
        shares = (-predicted).softmax(2).cumsum(2)
        drawn = torch.rand(*predicted.shape[:2], each, device=predicted.device)
        places = torch.searchsorted(shares, drawn).clamp(max=predicted.shape[2] - 1)
        return places.flatten(1)

    def loss(
        self, network: nn.Module, views: Tensor, labels: Tensor, drawn: Tensor | None
    ) -> Tensor:
        """Return the loss at the end of the training."""
        return self.step_loss(Step(network, None, views, labels, drawn, 1.0))

    def validate(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        drawn: Tensor | None,
        positions: slice,
    ) -> dict[str, Tensor]:
        """Return which images are right, and which are so whatever the patch shows."""
        right = network(images).argmax(1) == labels
        bounded = bounded_network(network, _shape(images))
        if isinstance(self.threat, SparsePixels):
            margins = bounded.sparse_margins(images, labels, self.threat.count)[:, None]
        else:
            regions = self.threat.regions((images.shape[2], images.shape[3]))
            margins = bounded.lowest_margins(images, labels, regions, stop=True)
        return {"clean_accuracy": right, "certified_accuracy": right & (margins > 0).all(1)}


@lru_cache(maxsize=1)
def all_places(threat: Threat, image_shape: tuple[int, int, int]) -> PatchBoxes:
    """Return all regions of a patch of one shape on images (C, H, W), rows first."""
    groups = patch_boxes(threat.regions(image_shape[1:]))
    if len(groups) != 1:
        raise PatchproofError(f"expected a patch of one shape to train on, got {threat.label()}")
    (_, boxes) = groups[0]
    columns = int(boxes.starts[:, 1].max()) + 1
    return boxes.choose((boxes.starts @ torch.tensor([columns, 1])).argsort()).on(image_shape)


@lru_cache(maxsize=1)
def bounded_network(network: nn.Module, image_shape: tuple[int, int, int]) -> BoundedNetwork:
    """Return the bounds of the network that is trained, traced once."""
    return BoundedNetwork(network, image_shape)


def _shape(images: Tensor) -> tuple[int, int, int]:
    channels, height, width = images.shape[1:]
    return channels, height, width


def certificate_loss(margins: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of minus the margins (N, classes) (Equations 10 and 12)."""
    return functional.cross_entropy(-margins, labels)


def tiles(boxes: PatchBoxes, pool: tuple[int, ...]) -> Tensor:
    """Return the groups of places that are bounded together, (G, M) int64.

    What is joined first comes one after the other; groups at the border hold places twice.

    Args:
        boxes: a full grid of places, rows first.
        pool: places along each axis that are joined first, and how many of these then.
    """
    if not pool:
        return torch.arange(len(boxes.starts))[:, None]
    rows, columns = (boxes.starts.amax(0) + 1).tolist()
    within = torch.zeros(1, 2, dtype=torch.int64)
    side = 1
    for count in pool:
        steps = side * torch.cartesian_prod(torch.arange(count), torch.arange(count))
        within = (steps[:, None] + within).flatten(0, 1)
        side *= count
    corners = torch.cartesian_prod(torch.arange(0, rows, side), torch.arange(0, columns, side))
    places = corners[:, None] + within
    row, column = places[..., 0].clamp(max=rows - 1), places[..., 1].clamp(max=columns - 1)
    numbers: Tensor = row * columns + column
    return numbers


@torch.no_grad()
def worst_groups(
    bounded: BoundedNetwork, images: Tensor, labels: Tensor, boxes: PatchBoxes, groups: Tensor
) -> Tensor:
    """Return for each image and class the group of the lowest margin, (N, classes) int64."""
    order = phases(bounded.steps, boxes.starts[groups[:, 0]]).argsort(stable=True)
    at_once = min(_AT_ONCE, _MEMBERS_AT_ONCE // groups.shape[1])
    at_once = regions_together(at_once, len(images))
    prepared = bounded.prepare(images, labels, slack=False)
    lowest = images.new_full((1,), torch.inf)
    worst = labels.new_zeros(1)
    with bounded.keeping():
        for chunk in torch.split(order, at_once):
            margins = bounded.margins(prepared, boxes.choose(groups[chunk].flatten()))
            least, place = margins.min(0)
            worst = torch.where(least < lowest, chunk.to(place.device)[place], worst)
            lowest = torch.minimum(least, lowest)
    return worst


def of_other_classes(worst: Tensor, labels: Tensor) -> Tensor:
    """Return each image's different groups of classes other than its label, (N, n) int64.

    The label's own margin is 0 in all groups.

    Args:
        worst: (N, classes) int64.
        labels: (N,).

    Returns:
        As many as the image with most of them has; images with fewer have some twice.
    """
    columns = torch.arange(worst.shape[1] - 1, device=worst.device)
    others = worst.gather(1, columns + (columns >= labels[:, None])).sort(1).values
    again = functional.pad(others[:, 1:] == others[:, :-1], (1, 0))
    count = int((~again).sum(1).max())
    return others.gather(1, again.byte().argsort(dim=1, stable=True)[:, :count])


def margins_at(
    bounded: BoundedNetwork, images: Tensor, labels: Tensor, boxes: PatchBoxes, chosen: Tensor
) -> Tensor:
    """Return the margins at regions of each image's own.

    Args:
        bounded: the network.
        images: (N, C, H, W).
        labels: (N,).
        boxes: the regions.
        chosen: (N, n, M) int64, indices of regions; the last are bounded together.

    Returns:
        (N, n, classes).
    """
    each = chosen.shape[1] * chosen.shape[2]
    boxes = replace(boxes.choose(chosen.flatten().cpu()), each=each)
    margins = bounded.margins(bounded.prepare(images, labels, slack=False), boxes)
    return margins.reshape(len(images), -1, bounded.classes)
