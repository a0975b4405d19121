"""Interval bound propagation against patches (Chiang et al., 2020, Section 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from patchproof.bounds.boxes import PatchBoxes, patch_boxes, pixel_bounds
from patchproof.bounds.graph import trace
from patchproof.bounds.margins import MergedLayer, merge
from patchproof.bounds.operators import (
    Affine,
    Bounds,
    Box,
    Convolution,
    Flatten,
    Linear,
    Monotone,
    Scale,
    flattened,
    pooled,
)
from patchproof.bounds.refinement import perceptron
from patchproof.bounds.search import Method, Search
from patchproof.bounds.sparse import sparse_bounds
from patchproof.bounds.windows import (
    MOST_TERMS,
    Clean,
    Everywhere,
    Windows,
    gamma,
    rows,
)
from patchproof.errors import PatchproofError
from patchproof.precision import direct_inference

if TYPE_CHECKING:
    from patchproof.threat.regions import Regions

_LARGEST = 1e37
"""Sums up to which float32 has numbers, with some to spare."""
_SPARSE_IMAGES = 100
"""Images whose first layer is bounded together against sparse attacks."""


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
        with direct_inference(self.device):
            self.steps = trace(self.model, self.image_shape)
            self._check_clean()
            self._check_sums()

    def _check_clean(self) -> None:
        """Raise unless the operators compute what the model does."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(4, *self.image_shape, generator=generator).to(self.device)
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
        ends = [torch.full((1, *self.image_shape), end, device=self.device) for end in (0.0, 1.0)]
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
        if labels.shape != images.shape[:1]:
            raise PatchproofError(
                f"bounds: expected a label for each of {len(images)} images, "
                f"got {tuple(labels.shape)}"
            )
        others = labels[(labels < 0) | (labels >= self.classes)]
        if len(others):
            raise PatchproofError(
                f"bounds: expected labels from 0 to {self.classes - 1}, got {int(others[0])}"
            )

    @property
    def device(self) -> torch.device:
        """Where the network is."""
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
            itself 0, or with slack infinity: the least of all is that of the others.
        """
        values: dict[int, Bounds] = {-1: pixel_bounds(prepared.clean[-1], boxes)}
        return self.margins_from(prepared, values, 0, boxes.joined)

    def margins_from(
        self,
        prepared: Prepared,
        values: dict[int, Bounds],
        begin: int = 0,
        joined: tuple[int, ...] = (),
    ) -> Tensor:
        """Return lower bounds of the margins, given the bounds before step ``begin``."""
        values = self.bounds(prepared, values, begin, joined)
        final = self.steps[-1]
        given = values[len(self.steps) - 1 if prepared.merged is None else final.inputs[0]]
        if isinstance(given, Windows):
            given = flattened(given)
        if prepared.merged is not None:
            return prepared.merged.margins(given)
        own = rows(prepared.labels, given.each)[:, :, None].expand(*given.lower.shape[:2], 1)
        lower = given.lower.gather(2, own)
        margins = lower - given.upper
        if given.clean.error is None:
            return margins.scatter(2, own, 0.0)
        margins = margins - gamma(0) * (lower.abs() + given.upper.abs())
        return margins.scatter(2, own, torch.inf)

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
            Search(self, method, stop, screen, memory_budget).fill(lowest, images, labels, regions)
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
        if not len(images):
            return images.new_empty(0)
        lowest = []
        with direct_inference(images.device):
            for batch in torch.split(torch.arange(len(images)), _SPARSE_IMAGES):
                prepared = self.prepare(images[batch], labels[batch], slack=True)
                lowest.append(self.margins_of_sparse(prepared, pixels).amin(1))
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
        layer = self.steps[place].operator
        while not isinstance(layer, Linear | Convolution) and place < len(self.steps) - 1:
            channels = prepared.clean[place - 1].value.ndim == 4
            if not (layer is None or isinstance(layer, Flatten)) and not (
                isinstance(layer, Scale) and channels
            ):
                break
            if isinstance(layer, Scale):
                ends = layer.forward(low), layer.forward(high)
                low, high = torch.minimum(*ends), torch.maximum(*ends)
            place += 1
            layer = self.steps[place].operator
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
        return self.margins_from(prepared, {place: start}, place + 1)[0]

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
                for chunk in torch.split(torch.arange(len(images)), images_at_once):
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

    def bounds(
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
