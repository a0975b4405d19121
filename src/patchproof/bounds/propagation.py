"""Interval bound propagation against patches (Chiang et al., 2020, Section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from patchproof.bounds.graph import trace
from patchproof.bounds.margins import MergedLayer, merge
from patchproof.bounds.operators import (
    Affine,
    Bounds,
    Box,
    Convolution,
    Flatten,
    Linear,
    MaximumPool,
    Monotone,
    Scale,
    flattened,
    pooled,
)
from patchproof.bounds.refinement import backward_lowest, perceptron
from patchproof.bounds.sparse import sparse_bounds
from patchproof.bounds.windows import (
    MOST_TERMS,
    Clean,
    Everywhere,
    Windows,
    cut,
    gamma,
    inside_map,
    rows,
)
from patchproof.precision import direct_inference
from patchproof.results import PatchproofError

if TYPE_CHECKING:
    from patchproof.threat.regions import Regions

Method = Literal["interval", "backward"]

_LARGEST = 1e37
"""Sums up to which float32 has numbers, with some to spare."""
_TENSORS = 8
"""Tensors as large as a layer's bounds that are alive at once."""
_CACHE = 2**21
"""Bytes of one such tensor beyond which the processor's caches help less."""
_REGIONS = 4
"""Regions that are bounded together at least, where memory allows."""
_SPARSE_IMAGES = 100
"""Images whose first layer is bounded together against sparse attacks."""
_WORTH_LEAVING = 0.75
"""Share of images that still hold below which the others are left out of the batch."""


@dataclass(frozen=True, eq=False)
class PatchBoxes:
    """What L patches of one size may show: any values within ``epsilon`` of the image's, in [0, 1].

    Attributes:
        starts: (L, 2) int64, top row and left column of each.
        size: (h, w) in pixels.
        each: how many belong to each image, in the order of the images; None if all to all.
        shape: (L, h, w) bool, which pixels of the window belong to the patch; None for all.
        epsilon: 1 for any content; less while training warms up.
        joined: how many regions, one after the other, are bounded as one from the first layer on,
            how many of these from the second on, and so forth (Appendix A.3).
    """

    starts: Tensor
    size: tuple[int, int]
    each: int | None = None
    shape: Tensor | None = None
    epsilon: float = 1.0
    joined: tuple[int, ...] = ()

    def choose(self, chosen: Tensor) -> PatchBoxes:
        """Return some of the patches, by (n,) indices, for all images."""
        return replace(
            self,
            starts=self.starts[chosen],
            shape=None if self.shape is None else self.shape[chosen],
        )


def patch_boxes(regions: Regions) -> list[tuple[Tensor, PatchBoxes]]:
    """Return patch regions by the size of the box around them: their indices, and the boxes."""
    parts = regions.parts
    used = parts[..., 2] > 0
    huge = torch.iinfo(torch.int64).max
    first = torch.where(used[..., None], parts[..., :2], huge).amin(1)
    end = torch.where(used[..., None], parts[..., :2] + parts[..., 2:], 0).amax(1)
    sizes, which = torch.unique(end - first, dim=0, return_inverse=True)
    found = []
    for number, (height, width) in enumerate(sizes.tolist()):
        places = (which == number).nonzero().squeeze(1)
        shape = torch.zeros(len(places), height, width, dtype=torch.bool)
        rows_, columns = torch.arange(height)[:, None], torch.arange(width)
        for box in (parts[places] - torch.cat([first, 0 * first], 1)[places, None]).unbind(1):
            top, left, high, wide = (box[:, axis, None, None] for axis in range(4))
            shape |= (
                (rows_ >= top) & (rows_ < top + high) & (columns >= left) & (columns < left + wide)
            )
        boxes = PatchBoxes(
            first[places], (height, width), shape=None if bool(shape.all()) else shape
        )
        found.append((places, boxes))
    return found


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the bounds of all regions of a batch of images share.

    Attributes:
        clean: the activations of the clean images after each step, the images themselves at -1.
        labels: (N,) int64.
        merged: a last fully connected layer; None if the last layer is another.
    """

    clean: dict[int, Clean]
    labels: Tensor
    merged: MergedLayer | None

    def choose(self, chosen: Tensor) -> Prepared:
        """Return some of the images, by (n,) indices or (N,) bool."""
        clean = {
            place: Clean(held.value[chosen], None if held.error is None else held.error[chosen])
            for place, held in self.clean.items()
        }
        merged = None if self.merged is None else self.merged.choose(chosen)
        return Prepared(clean, self.labels[chosen], merged)


@dataclass(frozen=True)
class _Search:
    """How ``lowest_margins`` looks for them."""

    method: Method
    stop: bool
    screen: int
    memory_budget: int


class BoundedNetwork:
    """A network whose logits can be bounded over all contents of a patch.

    Only the window that a patch can reach is propagated, layer by layer, until a layer sees the
    whole image: outside of it the activations are those of the clean image.

    Args:
        model: from images (N, C, H, W) in [0, 1] to logits (N, classes), in float32. Its weights
            are read at each call, so that it can be trained.
        image_shape: (C, H, W).

    Raises:
        PatchproofError: an operator without bounds, naming the layer.
    """

    def __init__(self, model: nn.Module, image_shape: tuple[int, int, int]) -> None:
        self.model = model
        self.image_shape = image_shape
        self.trace()

    def trace(self) -> None:
        """Find the operators of the model as it is now.

        Raises:
            PatchproofError: as when built; or numbers that may be too large for float32.
        """
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and value.dtype != torch.float32:
                raise PatchproofError(
                    f"bounds: expected float32 weights, got {value.dtype}: {name}"
                )
        with direct_inference(self._device):
            self.steps = trace(self.model, self.image_shape)
            self._check_clean()
            self._check_sums()

    def _check_clean(self) -> None:
        """Raise unless the operators compute what the model does."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(4, *self.image_shape, generator=generator).to(self._device)
        expected, got = self.model(images.clone()), self._clean(images)
        if expected.ndim != 2 or not torch.allclose(
            got, expected, rtol=1e-3, atol=1e-4, equal_nan=True
        ):
            raise PatchproofError(
                "bounds: expected a network that is the sequence of its layers with logits "
                f"(N, classes), got another result from {type(self.model).__name__}"
            )
        self.classes = int(expected.shape[1])

    def _check_sums(self) -> None:
        """Raise if some sum of the network, on any image, may overflow or be too long."""
        ends = [torch.full((1, *self.image_shape), end, device=self._device) for end in (0.0, 1.0)]
        values: dict[int, Box] = {-1: (ends[0], ends[1])}
        for number, step in enumerate(self.steps):
            inputs = [values[place] for place in step.inputs]
            values[number] = inputs[0] if step.operator is None else step.operator.plain(*inputs)
            if not isinstance(step.operator, Affine):
                continue
            largest = step.operator.magnitude(torch.maximum(inputs[0][0].abs(), inputs[0][1].abs()))
            if not bool((largest < _LARGEST).all()):
                raise PatchproofError(
                    f"bounds: expected weights for sums below {_LARGEST:g}, got larger or no "
                    f"numbers in layer {step.name}"
                )
            if step.operator.terms > MOST_TERMS:
                raise PatchproofError(
                    f"bounds: expected sums of at most {MOST_TERMS:,} terms, got "
                    f"{step.operator.terms:,} in layer {step.name}"
                )

    def _check_images(self, images: Tensor, labels: Tensor) -> None:
        """Raise unless these are images for the network with a label each."""
        if images.shape[1:] != self.image_shape or images.dtype != torch.float32:
            raise PatchproofError(
                f"bounds: expected float32 images (N, {', '.join(map(str, self.image_shape))}), "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise PatchproofError("bounds: expected pixels in [0, 1], got others")
        if labels.shape != images.shape[:1] or not bool(
            ((labels >= 0) & (labels < self.classes)).all()
        ):
            raise PatchproofError(
                f"bounds: expected a label from 0 to {self.classes - 1} for each of {len(images)} "
                f"images, got {tuple(labels.shape)}"
            )

    @property
    def _device(self) -> torch.device:
        held = next(self.model.parameters(), None)
        return torch.device("cpu") if held is None else held.device

    def _clean(self, images: Tensor) -> Tensor:
        values = {-1: Clean(images, None)}
        for number, step in enumerate(self.steps):
            inputs = [values[place] for place in step.inputs]
            values[number] = inputs[0] if step.operator is None else step.operator.clean(*inputs)
        return values[len(self.steps) - 1].value

    def prepare(self, images: Tensor, labels: Tensor, *, slack: bool) -> Prepared:
        """Return what the bounds of all regions share; differentiable.

        The last layer is merged with the differences of the logits (Section 4.1).

        Args:
            images: (N, C, H, W) in [0, 1].
            labels: (N,) int64.
            slack: widen the bounds by what rounding can do.
        """
        error = torch.zeros_like(images) if slack else None
        clean = {-1: Clean(images, error)}
        final = self.steps[-1].operator
        last = len(self.steps) - isinstance(final, Linear)
        for number, step in enumerate(self.steps[:last]):
            inputs = [clean[place] for place in step.inputs]
            clean[number] = inputs[0] if step.operator is None else step.operator.clean(*inputs)
        merged = None
        if isinstance(final, Linear):
            merged = merge(final, labels, slack=slack, never_negative=self._never_negative())
        return Prepared(clean, labels, merged)

    def margins(self, prepared: Prepared, boxes: PatchBoxes) -> Tensor:
        """Return lower bounds of logit_label - logit_j for each class j; differentiable.

        Args:
            prepared: N images and their labels.
            boxes: L patches.

        Returns:
            (L, N, classes), or (L, 1, classes) where each patch is on one image; of the label
            itself 0, or a little less with slack.
        """
        values: dict[int, Bounds] = {-1: _pixels(prepared.clean[-1], boxes)}
        return self._margins(prepared, values, 0, boxes.joined)

    def _margins(
        self,
        prepared: Prepared,
        values: dict[int, Bounds],
        begin: int,
        joined: tuple[int, ...] = (),
    ) -> Tensor:
        """Return lower bounds of the margins, given the bounds before step ``begin``."""
        values = self._values(prepared, values, begin, joined)
        final = self.steps[-1]
        given = values[len(self.steps) - 1 if prepared.merged is None else final.inputs[0]]
        if isinstance(given, Windows):
            given = flattened(given)
        if prepared.merged is not None:
            return prepared.merged.margins(given)
        own = rows(prepared.labels, given.each)[:, :, None].expand(*given.lower.shape[:2], 1)
        lower = given.lower.gather(2, own)
        margins = lower - given.upper
        if given.clean.error is not None:
            margins = margins - gamma(0) * (lower.abs() + given.upper.abs())
        return margins.scatter(2, own, 0.0)

    def lowest_margins(
        self,
        images: Tensor,
        labels: Tensor,
        regions: Regions,
        *,
        method: Method = "interval",
        stop: bool = False,
        screen: int = 1,
        memory_budget: int = 2**28,
    ) -> Tensor:
        """Return how far each image's label provably leads at each region.

        Args:
            images: (N, C, H, W) float32 in [0, 1].
            labels: (N,) int64.
            regions: R patch regions.
            method: ``"interval"``, or ``"backward"`` to bound the regions that do not hold by
                backward linear bounds of the last layers too, which costs far more.
            stop: leave an image once one of its regions does not hold; those not computed are NaN.
            screen: first bound the box around ``screen`` x ``screen`` adjacent places; where it
                holds, all of them do, with its margin. The verdicts are the same.
            memory_budget: bytes that the bounds of one layer may take.

        Returns:
            (N, R) float32: at a region, a lower bound of logit_label - logit_j for all other
            classes j and all contents of the patch, rounding included. The label stays if it is
            above 0, which NaN is not.

        Raises:
            PatchproofError: a memory budget too small for one region of one image; images, labels
            or regions that do not fit the network; or a network that has changed so that it has
            no bounds any more.
        """
        self.trace()
        self._check_images(images, labels)
        if regions.image_size != self.image_shape[1:]:
            raise PatchproofError(
                f"bounds: expected regions of {self.image_shape[1:]} images, "
                f"got {regions.image_size}"
            )
        lowest = images.new_full((len(images), len(regions)), torch.nan)
        if method == "backward":
            perceptron(self.steps)
        with direct_inference(images.device), self.keeping():
            self._fill(
                lowest, images, labels, regions, _Search(method, stop, screen, memory_budget)
            )
        return lowest

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep from one call to the next what regions need of the weights, and memory.

        The weights must stay the same meanwhile; there are no gradients, and each call of
        ``margins`` overwrites what the one before computed, but for its result.
        """
        operators = [step.operator for step in self.steps if step.operator is not None]
        for operator in operators:
            operator.kept = {}
        try:
            with torch.no_grad():
                yield
        finally:
            for operator in operators:
                operator.kept = None

    def _fill(
        self,
        lowest: Tensor,
        images: Tensor,
        labels: Tensor,
        regions: Regions,
        search: _Search,
    ) -> None:
        """Enter the lowest margins (N, R) of each region."""
        for places, boxes in patch_boxes(regions):
            at_once = self._at_once(boxes, search.memory_budget)
            groups = self._groups(boxes, search.screen)
            for batch in _split(torch.arange(len(images)), max(1, at_once // _REGIONS)):
                prepared = self.prepare(images[batch], labels[batch], slack=True)
                for members, union in groups:
                    for chunk in _split(torch.arange(len(members)), max(1, at_once // len(batch))):
                        if search.stop:
                            keep = ~(lowest[batch] <= 0).any(1)
                            if not keep.any():
                                break
                            if keep.float().mean() < _WORTH_LEAVING:
                                batch = batch[keep]
                                prepared = prepared.choose(keep)
                        found = self._lowest(prepared, union.choose(chunk), search.method)
                        if members.shape[1] > 1:
                            found = self._refine(
                                prepared, boxes, members[chunk], found, at_once, search.method
                            )
                        for column in range(members.shape[1]):
                            here = members[chunk, column]
                            lowest[batch[:, None], places[here]] = found[:, :, column].T

    def _lowest(self, prepared: Prepared, boxes: PatchBoxes, method: Method) -> Tensor:
        """Return the lowest margins (L, N, 1)."""
        values: dict[int, Bounds] = {-1: _pixels(prepared.clean[-1], boxes)}
        margins = self._margins(prepared, values, 0)
        own = prepared.labels[None, :, None].expand(len(margins), -1, 1)
        lowest = margins.scatter(2, own, torch.inf).amin(2)
        if method == "backward":
            regions, images = (~(lowest > 0)).nonzero().unbind(1)
            if len(regions):
                refined = backward_lowest(
                    self.steps, prepared.clean, values, prepared.labels, regions, images
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
        method: Method,
    ) -> Tensor:
        """Bound the places of groups one by one, for the images that lose the group.

        Args:
            prepared: N images.
            boxes: all places.
            members: (G, M) int64, the places of each group.
            found: (G, N, 1), the lowest margins of the groups.
            at_once: pairs of an image and a place to bound together.
            method: which bounds.

        Returns:
            (G, N, M), lower bounds of the margins of each place.
        """
        found = found.expand(-1, -1, members.shape[1]).clone()
        for group, places in enumerate(members):
            open_images = (~(found[group, :, 0] > 0)).nonzero().squeeze(1)
            for some in _split(open_images, max(1, at_once // len(places))):
                each = self._lowest(prepared.choose(some), boxes.choose(places), method)
                found[group, some] = each[:, :, 0].T
        return found

    def _groups(self, boxes: PatchBoxes, screen: int) -> list[tuple[Tensor, PatchBoxes]]:
        """Return groups of adjacent places, (G, M) int64, and the box around each group.

        Those on equal phases of all strides together, as their windows have the same size; and from
        the middle outward, where patches win most often. Without screening, each place is a group.
        """
        step = torch.ones(2, dtype=torch.int64)
        for operator in (step_.operator for step_ in self.steps):
            if isinstance(operator, Convolution | MaximumPool):
                step *= torch.tensor(operator.stride)
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
            phase = (union.starts % step) @ torch.tensor([int(step[1]), 1])
            middle = starts.float().mean(0)
            outward = ((union.starts - middle) ** 2).sum(1).argsort(stable=True)
            order = outward[phase[outward].argsort(stable=True)]
            ordered.append((places[order], union.choose(order)))
        return ordered

    def sparse_margins(self, images: Tensor, labels: Tensor, pixels: int) -> Tensor:
        """Return how far each image's label provably leads whatever few pixels change.

        The first affine layer is bounded exactly (``sparse_bounds``), the others by intervals.

        Args:
            images: (N, C, H, W) float32 in [0, 1].
            labels: (N,) int64.
            pixels: how many pixels may change, each in all channels.

        Returns:
            (N,) float32: a lower bound of logit_label - logit_j for all other classes j, rounding
            included. The label stays if it is above 0, which NaN is not.

        Raises:
            PatchproofError: a network whose first layer is neither fully connected nor a
                convolution, after a normalisation of each channel at most.
        """
        self.trace()
        self._check_images(images, labels)
        lowest = []
        with direct_inference(images.device):
            for batch in _split(torch.arange(len(images)), _SPARSE_IMAGES):
                prepared = self.prepare(images[batch], labels[batch], slack=True)
                margins = self.margins_of_sparse(prepared, pixels)
                lowest.append(margins.scatter(1, labels[batch][:, None], torch.inf).amin(1))
        return torch.cat(lowest)

    def margins_of_sparse(
        self, prepared: Prepared, pixels: int, *, share: float = 1.0, by_weights_alone: bool = False
    ) -> Tensor:
        """Return lower bounds of logit_label - logit_j for each class j; differentiable.

        Args:
            prepared: N images and their labels.
            pixels: how many pixels may change.
            share: of the first layer's bounds, while training warms up.
            by_weights_alone: bound the first layer by Equation 19, which is wider and cheaper.

        Returns:
            (N, classes).
        """
        place = 0
        low, high = (
            prepared.clean[-1].value.new_full((1, self.image_shape[0], 1, 1), end)
            for end in (0.0, 1.0)
        )
        while not isinstance(layer := self.steps[place].operator, Linear | Convolution):
            channels = prepared.clean[place - 1].value.ndim == 4
            if not (layer is None or isinstance(layer, Flatten)) and not (
                isinstance(layer, Scale) and channels
            ):
                break
            if isinstance(layer, Scale):
                ends = layer.forward(low), layer.forward(high)
                low, high = torch.minimum(*ends), torch.maximum(*ends)
            place += 1
        later = {before for step in self.steps[place + 1 :] for before in step.inputs}
        chain = all(self.steps[step].inputs == (step - 1,) for step in range(place + 1))
        if (
            not isinstance(layer, Linear | Convolution)
            or not chain
            or min(later, default=-1) < place
        ):
            raise PatchproofError(
                "bounds: expected a network that begins with a fully connected layer or a "
                "convolution, after a normalisation of each channel at most, and goes on from "
                f"there, against sparse attacks, got {self.steps[place].name}"
            )
        given = prepared.clean[place - 1]
        inputs = given.value.reshape(-1, *self.image_shape)
        slack = given.error is not None
        lower, upper = sparse_bounds(
            layer,
            inputs,
            pixels,
            ranges=(low.flatten(), high.flatten()),
            by_weights_alone=by_weights_alone,
            slack=slack,
        )
        if given.error is not None:
            error = layer.apply(given.error, absolute=True)
            lower, upper = lower - error, upper + error
        clean = prepared.clean[place]
        value = clean.value
        start = Everywhere(
            clean,
            (value - share * (value - lower))[None],
            (value + share * (upper - value))[None],
            None,
        )
        return self._margins(prepared, {place: start}, place + 1)[0]

    def plain_margins(
        self, images: Tensor, labels: Tensor, regions: Regions, *, images_at_once: int = 100
    ) -> Tensor:
        """Return what ``lowest_margins`` does by the plain algorithm, without slack for rounding.

        One box of the whole image for each region, both of its bounds through every layer: what the
        fast algorithm is tested and measured against.
        """
        with direct_inference(images.device):
            return self._plain_margins(images, labels, regions, images_at_once)

    def _plain_margins(
        self, images: Tensor, labels: Tensor, regions: Regions, images_at_once: int
    ) -> Tensor:
        lowest = images.new_empty(len(images), len(regions))
        classes = torch.arange(self.classes, device=labels.device)
        for places, boxes in patch_boxes(regions):
            (height, width) = boxes.size
            for number, (place, (top, left)) in enumerate(
                zip(places.tolist(), boxes.starts.tolist(), strict=True)
            ):
                inside = torch.zeros(images.shape[2:], dtype=torch.bool, device=images.device)
                inside[top : top + height, left : left + width] = (
                    True if boxes.shape is None else boxes.shape[number]
                )
                for chunk in _split(torch.arange(len(images)), images_at_once):
                    box = (
                        images[chunk].masked_fill(inside, 0.0),
                        images[chunk].masked_fill(inside, 1.0),
                    )
                    margins = self._plain(box, labels[chunk])
                    others = margins.masked_fill(labels[chunk][:, None] == classes, torch.inf)
                    lowest[chunk, place] = others.amin(1)
        return lowest

    def _plain(self, box: Box, labels: Tensor) -> Tensor:
        """Return lower bounds of the margins (N, classes) over one box for each image."""
        values = {-1: box}
        last = len(self.steps) - isinstance(self.steps[-1].operator, Linear)
        for number, step in enumerate(self.steps[:last]):
            inputs = [values[place] for place in step.inputs]
            values[number] = inputs[0] if step.operator is None else step.operator.plain(*inputs)
        final = self.steps[-1]
        if not isinstance(final.operator, Linear):
            lower, upper = values[last - 1]
            return lower.gather(1, labels[:, None]) - upper
        lower, upper = values[final.inputs[0]]
        weight, bias = final.operator.weight, final.operator.bias
        difference = weight[labels][:, None] - weight
        term = 0.0 if bias is None else bias[labels][:, None] - bias
        centre, radius = (lower + upper) / 2, (upper - lower) / 2
        return (
            torch.bmm(difference, centre[:, :, None])
            - torch.bmm(difference.abs(), radius[:, :, None])
        )[:, :, 0] + term

    def _at_once(self, boxes: PatchBoxes, memory_budget: int) -> int:
        """Return how many pairs of an image and a region to bound together."""
        image = torch.zeros(1, *self.image_shape, device=self._device)
        prepared = self.prepare(image, torch.zeros(1, dtype=torch.int64), slack=False)
        pixels: Bounds = _pixels(prepared.clean[-1], boxes.choose(torch.arange(1)))
        bounds = self._values(prepared, {-1: pixels}, 0)
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
        if self._device.type == "cpu":
            fitting = min(fitting, _CACHE // (4 * largest))
        return max(1, fitting)

    def _values(
        self,
        prepared: Prepared,
        values: dict[int, Bounds],
        begin: int,
        joined: tuple[int, ...] = (),
    ) -> dict[int, Bounds]:
        """Add the bounds after each step from ``begin``, but for a merged layer."""
        waiting = list(joined)
        for number in range(begin, len(self.steps) - (prepared.merged is not None)):
            step = self.steps[number]
            inputs = [values[place] for place in step.inputs]
            values[number] = (
                inputs[0]
                if step.operator is None
                else step.operator.propagate(prepared.clean[number], *inputs)
            )
            if waiting and isinstance(step.operator, Linear | Convolution):
                values[number] = pooled(values[number], waiting.pop(0))
        if waiting:
            raise PatchproofError(
                f"bounds: expected a network of more than {len(joined)} fully connected layers or "
                f"convolutions to join bounds {len(joined)} times, got fewer"
            )
        return values

    def _never_negative(self) -> bool:
        """Tell whether what the last layer takes cannot be below 0."""
        place = self.steps[-1].inputs[0]
        while place >= 0:
            operator = self.steps[place].operator
            if operator is not None and not isinstance(operator, Flatten):
                return isinstance(operator, Monotone) and operator.never_negative
            place = self.steps[place].inputs[0]
        return True  # pixels


def _split(numbers: Tensor, size: int) -> tuple[Tensor, ...]:
    """Return (n,) numbers in parts of a size; none of no numbers."""
    return torch.split(numbers, size) if len(numbers) else ()


def _pixels(clean: Clean, boxes: PatchBoxes) -> Windows:
    """Return the bounds of the pixels, around the middle of what the patch may show."""
    images = clean.value
    before = cut(images, boxes.starts, boxes.size, boxes.each)
    shape = inside_map(boxes.starts, boxes.size, (images.shape[2], images.shape[3]))
    if boxes.shape is not None:
        own = boxes.shape[:, None, None]
        shape = own if shape is None else shape & own
    if boxes.epsilon >= 1:
        shift = 0.5 - before
        radius = before.new_full((len(boxes.starts), 1, images.shape[1], *boxes.size), 0.5)
    else:
        lower = (before - boxes.epsilon).clamp(min=0)
        upper = (before + boxes.epsilon).clamp(max=1)
        shift, radius = (lower + upper) / 2 - before, (upper - lower) / 2
    if shape is not None:
        shape = shape.to(images.device)
        shift, radius = shift * shape, radius * shape
    return Windows(clean, shift, radius, boxes.starts, boxes.each)
