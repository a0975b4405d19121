"""The lowest margins at all regions: in which order, how many together, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from patchproof.bounds.boxes import PatchBoxes, patch_boxes, pixel_bounds
from patchproof.bounds.operators import Bounds, Convolution, MaximumPool
from patchproof.bounds.refinement import backward_lowest
from patchproof.bounds.windows import Windows
from patchproof.errors import PatchproofError

if TYPE_CHECKING:
    from patchproof.bounds.graph import Step
    from patchproof.bounds.propagation import BoundedNetwork, Prepared
    from patchproof.threat.regions import Regions

Method = Literal["interval", "backward"]

_TENSORS = 8
"""Tensors as large as a layer's bounds that are alive at once."""
_CACHE = 2**21
"""Bytes of one such tensor beyond which the processor's caches help less."""
_REGIONS = 4
"""Regions that are bounded together at least, where memory allows."""
_WORTH_LEAVING = 0.75
"""Share of images that still hold below which the others are left out of the batch."""


@dataclass(frozen=True, eq=False)
class Search:
    """How ``BoundedNetwork.lowest_margins`` looks for them; its arguments are explained there."""

    network: BoundedNetwork
    method: Method
    stop: bool
    screen: int
    memory_budget: int

    def fill(self, lowest: Tensor, images: Tensor, labels: Tensor, regions: Regions) -> None:
        """Enter the lowest margins (N, R) of each region.

        Raises:
            PatchproofError: a memory budget too small for one region of one image.
        """
        for places, boxes in patch_boxes(regions):
            groups = [
                (members, union.on(self.network.image_shape))
                for members, union in self._groups(boxes)
            ]
            at_once = min(self._at_once(union) for _, union in groups)
            alone_at_once = self._at_once(boxes) if self.screen > 1 else at_once
            for batch in _split(torch.arange(len(images)), max(1, at_once // _REGIONS)):
                prepared = self.network.prepare(images[batch], labels[batch], slack=True)
                for members, union in groups:
                    for chunk in _split(
                        torch.arange(len(members)), regions_together(at_once, len(batch))
                    ):
                        if self.stop:
                            keep = ~(lowest[batch] <= 0).any(1).cpu()
                            if not keep.any():
                                break
                            if keep.float().mean() < _WORTH_LEAVING:
                                batch = batch[keep]
                                prepared = prepared.choose(keep)
                        found = self._lowest(prepared, union.choose(chunk))
                        if members.shape[1] > 1:
                            found = self._refine(
                                prepared, boxes, members[chunk], found, alone_at_once
                            )
                        for column in range(members.shape[1]):
                            here = members[chunk, column]
                            lowest[batch[:, None], places[here]] = found[:, :, column].T

    def _lowest(self, prepared: Prepared, boxes: PatchBoxes) -> Tensor:
        """Return the lowest margins (L, N, 1)."""
        values: dict[int, Bounds] = {-1: pixel_bounds(prepared.clean[-1], boxes)}
        lowest = self.network.margins_from(prepared, values).amin(2)
        if self.method == "backward":
            regions, images = (~(lowest > 0)).nonzero().unbind(1)
            if len(regions):
                refined = backward_lowest(
                    self.network.steps,
                    prepared.clean,
                    values,
                    prepared.labels,
                    regions,
                    images,
                    self.memory_budget,
                )
                lowest[regions, images] = torch.maximum(lowest[regions, images], refined)
        return lowest[:, :, None]

    def _refine(
        self,
        prepared: Prepared,
        boxes: PatchBoxes,
        members: Tensor,
        found: Tensor,
        at_once: int,
    ) -> Tensor:
        """Bound the places of groups one by one, for the images that lose the group.

        Args:
            prepared: N images.
            boxes: all places.
            members: (G, M) int64, the places of each group.
            found: (G, N, 1), the lowest margins of the groups.
            at_once: pairs of an image and a place to bound together.

        Returns:
            (G, N, M), lower bounds of the margins of each place.
        """
        found = found.expand(-1, -1, members.shape[1]).clone()
        for group, places in enumerate(members):
            open_images = (~(found[group, :, 0] > 0)).nonzero().squeeze(1)
            for part in _split(torch.arange(len(places)), at_once):
                for some in _split(open_images, max(1, at_once // len(part))):
                    each = self._lowest(prepared.choose(some), boxes.choose(places[part]))
                    found[group, some[:, None], part] = each[:, :, 0].T
        return found

    def _groups(self, boxes: PatchBoxes) -> list[tuple[Tensor, PatchBoxes]]:
        """Return groups of adjacent places, (G, M) int64, and the box around each group.

        Those on equal phases of all strides together, as their windows have the same size; and from
        the middle outward, where patches win most often. Without screening, each place is a group.
        """
        screen = self.screen
        starts = boxes.starts
        alone = torch.arange(len(starts))[:, None]
        groups = [(alone, boxes)]
        if screen > 1 and boxes.shape is None:
            tile = (starts - starts.amin(0)).div(screen, rounding_mode="floor")
            _, which, counts = torch.unique(tile, dim=0, return_inverse=True, return_counts=True)
            whole = counts == screen**2
            members = torch.split(which.argsort(stable=True), counts.tolist())
            full = [
                member for member, is_whole in zip(members, whole.tolist(), strict=True) if is_whole
            ]
            if full:
                joined = torch.stack(full)
                height, width = boxes.size
                union = PatchBoxes(
                    starts[joined].amin(1), (height + screen - 1, width + screen - 1)
                )
                left = alone[~whole[which]]
                groups = [(joined, union)]
                if len(left):
                    groups.append((left, boxes.choose(left[:, 0])))
        ordered = []
        for places, union in groups:
            phase = phases(self.network.steps, union.starts)
            middle = starts.float().mean(0)
            outward = ((union.starts - middle) ** 2).sum(1).argsort(stable=True)
            order = outward[phase[outward].argsort(stable=True)]
            ordered.append((places[order], union.choose(order)))
        return ordered

    def _at_once(self, boxes: PatchBoxes) -> int:
        """Return how many pairs of an image and a region to bound together."""
        network, memory_budget = self.network, self.memory_budget
        image = torch.zeros(1, *network.image_shape, device=network.device)
        prepared = network.prepare(image, torch.zeros(1, dtype=torch.int64), slack=False)
        pixels: Bounds = pixel_bounds(prepared.clean[-1], boxes.choose(torch.arange(1)))
        bounds = network.bounds(prepared, {-1: pixels}, 0)
        largest = max(
            (given.shift if isinstance(given, Windows) else given.lower).numel()
            for given in bounds.values()
        )
        fitting = memory_budget // (_TENSORS * 4 * largest)
        if fitting < 1:
            raise PatchproofError(
                f"memory_budget: expected at least {_TENSORS * 4 * largest:,} bytes for this "
                f"network, got {memory_budget:,}"
            )
        if network.device.type == "cpu":
            fitting = min(fitting, _CACHE // (4 * largest))
        return max(1, fitting)


def phases(steps: Sequence[Step], starts: Tensor) -> Tensor:
    """Return a number (L,) for places (L, 2), the same where their windows have the same size.

    Those of a number are on the same phase of all strides.
    """
    stride = torch.ones(2, dtype=torch.int64)
    for operator in (step.operator for step in steps):
        if isinstance(operator, Convolution | MaximumPool):
            stride *= torch.tensor(operator.stride)
    phase: Tensor = (starts % stride) @ torch.tensor([int(stride[1]), 1])
    return phase


def regions_together(at_once: int, images: int) -> int:
    """Return how many regions to bound together; products are quickest for multiples of 16.

    Args:
        at_once: pairs of an image and a region.
        images: how many each region goes with.
    """
    count = max(1, at_once // images)
    return count if count < 16 else count // 16 * 16


def _split(numbers: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return (n,) numbers in parts of a size; none of no numbers."""
    return torch.split(numbers, size) if len(numbers) else ()
