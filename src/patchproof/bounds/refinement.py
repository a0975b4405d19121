"""Backward bounds of the regions that interval bounds leave open."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from patchproof.bounds.backward import AffineLayer, backward_margins, rounding_share
from patchproof.bounds.graph import Step
from patchproof.bounds.operators import Bounds, Linear, Monotone, weight_columns
from patchproof.bounds.windows import Centred, Clean, Everywhere, Windows
from patchproof.errors import PatchproofError

_WEIGHTS = 4
"""Copies of the first layer's weights, in float64, that a pair of an image and a region takes."""


def perceptron(steps: Sequence[Step]) -> int:
    """Return the first of the fully connected layers that a network ends with, ReLUs between them.

    Raises:
        PatchproofError: a network that ends in another way.
    """
    place = len(steps) - 1
    while place > 0 and steps[place].inputs == (place - 1,):
        above = steps[place - 1].operator
        expected = isinstance(steps[place].operator, Linear) != isinstance(above, Linear)
        relu = above if isinstance(steps[place].operator, Linear) else steps[place].operator
        if not expected or not (isinstance(relu, Monotone) and relu.is_relu):
            break
        place -= 1
    place += not isinstance(steps[place].operator, Linear)
    if place >= len(steps) - 1 or not isinstance(steps[-1].operator, Linear):
        raise PatchproofError(
            "bounds: expected a network that ends in fully connected layers with ReLUs between "
            "them for backward bounds, got another; take interval bounds"
        )
    return place


def backward_lowest(
    steps: Sequence[Step],
    clean: dict[int, Clean],
    values: dict[int, Bounds],
    labels: Tensor,
    regions: Tensor,
    images: Tensor,
    memory_budget: int,
) -> Tensor:
    """Return the lowest margins of pairs of a region and an image by backward bounds.

    The box is what the first fully connected layer sees: of windows, the rest of the image is part
    of the layer's bias.

    Args:
        steps: the network.
        clean: activations of the clean images after each step.
        values: interval bounds after each step.
        labels: (N,) of the images.
        regions: (P,) int64, the region of each pair.
        images: (P,) int64, the image of each pair.
        memory_budget: bytes to take at once; one pair is taken whatever it needs.

    Returns:
        (P,) float32, never above the bound in exact arithmetic.
    """
    begin = perceptron(steps)
    linear = [step.operator for step in steps[begin:] if isinstance(step.operator, Linear)]
    place = steps[begin].inputs[0]
    first, given = linear[0], values[place]
    window = given.shift[0, 0].numel() if isinstance(given, Windows) else first.weight.shape[1]
    at_once = max(1, memory_budget // (8 * _WEIGHTS * window * len(first.weight)))
    parts = [
        _some(first, linear[1:], given, clean[place], values, steps, labels, part, image)
        for part, image in zip(
            *(torch.split(pairs, at_once) for pairs in (regions, images)), strict=True
        )
    ]
    return torch.cat(parts)


def _some(
    first: Linear,
    rest: list[Linear],
    given: Bounds,
    seen: Clean,
    values: dict[int, Bounds],
    steps: Sequence[Step],
    labels: Tensor,
    regions: Tensor,
    images: Tensor,
) -> Tensor:
    share = rounding_share(first.weight.shape[1])
    weight = first.weight.double()
    activation = seen.value.flatten(1)[images].double()
    bias = functional.linear(activation, weight)
    magnitude = functional.linear(activation.abs(), weight.abs())
    if first.bias is not None:
        bias, magnitude = bias + first.bias.double(), magnitude + first.bias.double().abs()
    if seen.error is not None:  # what the layers before rounded, as if this layer did
        error = functional.linear(seen.error.flatten(1)[images].double(), weight.abs())
        magnitude = magnitude + error / share
    if isinstance(given, Windows):
        shape = given.clean.value.shape[1:]
        columns = weight_columns(first.weight, shape, given.starts, given.size)[regions].double()
        columns = columns.transpose(1, 2)  # (P, outputs, features of the window)
        before = given.before()[regions, images].flatten(1).double()
        shift = given.shift[regions, images].flatten(1).double()
        radius = given.radius.expand(-1, given.shift.shape[1], -1, -1, -1)[regions, images]
        radius = radius.flatten(1).double()
        if given.clean.error is not None:
            radius = radius + given.cut(given.clean.error)[regions, images].flatten(1).double()
        centre, spread = before + shift, radius * (1 + 2**-20)
        bias = bias - torch.bmm(columns, before[:, :, None])[:, :, 0]
        layer = AffineLayer(columns, bias, magnitude, max(first.weight.shape[1], columns.shape[2]))
        lower, upper = centre - spread, centre + spread
    else:
        lower, upper = (bound[regions, images].double() for bound in (given.lower, given.upper))
        layer = AffineLayer(weight, torch.zeros_like(bias) + _bias(first), None)
    layers = [layer]
    layers += [AffineLayer(hidden.weight, _bias(hidden)) for hidden in rest[:-1]]
    final, label = rest[-1], labels[images]
    last = final.weight.double()
    difference = last[label][:, None] - last
    biases = _bias(final).double()
    seen_last = values[steps[-1].inputs[0]]
    assert isinstance(seen_last, Everywhere | Centred)
    largest = torch.maximum(seen_last.lower.abs(), seen_last.upper.abs())[regions, images].double()
    rounded = (last[label].abs()[:, None] + last.abs()) @ largest[:, :, None]
    slack = rounding_share(last.shape[1]) * (
        rounded[:, :, 0] + biases[label].abs()[:, None] + biases.abs()
    )
    margins = backward_margins(
        lower, upper, layers, difference, biases[label][:, None] - biases, slack
    )
    lowest = margins.scatter(1, label[:, None], torch.inf).amin(1)
    return lowest.float().nextafter(torch.tensor(-torch.inf))


def _bias(layer: Linear) -> Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
