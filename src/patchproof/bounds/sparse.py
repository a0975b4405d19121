"""Bounds of a network's first layer when any few pixels change, wherever they are.

Chiang et al. (ICLR 2020), Section 4.3. A changed pixel changes in all its channels together, to any
values. How far a neuron can rise is a sum over the changed pixels, so the most that it can rise for
any choice of at most k pixels is the sum of the k largest gains: exact, for each neuron by itself.
Equation 19 bounds each gain by the weights of the pixel, whatever the image shows there.

Rounding. With n the terms of a neuron and T the sum of the k largest ``sum_c |w| max |value|``, an
attacked image x' has |W| |x'| <= |W| |x| + T. The network's own rounding on it, that of the clean
activation (each gamma_n), of a gain (gamma_(channels + 2)) and of their sum (gamma_(k + 1), of
values up to twice as large) are together below ``2 gamma_(n + channels + k + 3)`` times
``|W| |x| + |b| + T``; ``slack`` adds that, with some to spare.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from patchproof.bounds.operators import Convolution, Linear
from patchproof.bounds.windows import gamma
from patchproof.errors import PatchproofError


def sparse_bounds(
    layer: Linear | Convolution,
    inputs: Tensor,
    pixels: int,
    *,
    ranges: tuple[Tensor, Tensor] | None = None,
    by_weights_alone: bool = False,
    slack: bool = False,
    memory_budget: int = 2**23,
) -> tuple[Tensor, Tensor]:
    """Bound the outputs of a first layer on images of which at most ``pixels`` pixels change.

    For each output only the pixels that it sees count: of a convolution, those of the image that
    are under the kernel. Differentiable in the weights and the inputs.

    Args:
        layer: the layer; a linear one is on all pixels of the image, flattened.
        inputs: images (N, C, H, W), after a normalisation of each channel if the network begins
            with one.
        pixels: how many pixels may change, at least 1.
        ranges: the lowest and the highest value of each channel, (C,) each, between which the
            inputs are and a changed pixel can be anything; by default 0 and 1.
        by_weights_alone: use Equation 19, which is wider, cheaper and the same for all images.
        slack: widen the bounds by all rounding of float32, the network's and their own.
        memory_budget: bytes of intermediate values to hold at a time, apart from what gradients
            need; one image and one neuron are taken together whatever they need.

    Returns:
        The lowest and the highest outputs, (N, O) each, or (N, O, H', W') of a convolution.

    Raises:
        PatchproofError: fewer than one pixel, or inputs that do not fit the layer.
    """
    if pixels < 1:
        raise PatchproofError(f"expected one or more pixels, got {pixels}")
    channels = inputs.shape[1]
    low, high = ranges or (inputs.new_zeros(channels), inputs.new_ones(channels))
    sites, groups = _sites(layer, inputs)
    clean = layer.forward(inputs.flatten(1) if isinstance(layer, Linear) else inputs)
    shape = (-1, *[1] * (clean.ndim - 2))
    if by_weights_alone:
        falls = rises = _largest(sites, high - low, groups, pixels).reshape(shape)
    else:
        falls, rises = _gains(layer, inputs, pixels, (low, high), memory_budget)
        falls, rises = falls.reshape(clean.shape), rises.reshape(clean.shape)
    lower, upper = clean - falls, clean + rises
    if not slack:
        return lower, upper
    magnitudes = inputs.abs()
    biases = 0.0 if layer.bias is None else layer.bias.abs().reshape(shape)
    seen = layer.apply(
        magnitudes.flatten(1) if isinstance(layer, Linear) else magnitudes, absolute=True
    )
    most = _largest(sites, torch.maximum(low.abs(), high.abs()), groups, pixels).reshape(shape)
    rounding = 2 * gamma(layer.terms + channels + pixels) * (seen + biases + most)
    return lower - rounding, upper + rounding


def _sites(layer: Linear | Convolution, inputs: Tensor) -> tuple[Tensor, int]:
    """Return the weights by pixel that a neuron sees, (O, C / groups, P), and the groups."""
    channels = inputs.shape[1]
    if isinstance(layer, Convolution):
        weight, groups = layer.weight, layer.groups
        fits = weight.shape[1] * groups == channels
    else:
        weight, groups = layer.weight, 1
        fits = weight.shape[1] == inputs[0].numel()
    if not fits:
        raise PatchproofError(
            f"expected images for a weight of {tuple(weight.shape)}, got {tuple(inputs.shape)}"
        )
    return weight.reshape(len(weight), channels // groups, -1), groups


def _largest(sites: Tensor, scale: Tensor, groups: int, pixels: int) -> Tensor:
    """Return the sum of the largest ``sum_c |w| scale`` over pixels, of each neuron, (O,)."""
    scales = scale.reshape(groups, 1, -1, 1)
    by_group = sites.abs().reshape(groups, -1, *sites.shape[1:])
    per_pixel = (by_group * scales).sum(2).flatten(0, 1)
    return per_pixel.topk(min(pixels, per_pixel.shape[1]), sorted=False).values.sum(1)


def _gains(
    layer: Linear | Convolution,
    inputs: Tensor,
    pixels: int,
    ranges: tuple[Tensor, Tensor],
    memory_budget: int,
) -> tuple[Tensor, Tensor]:
    """Return how far each output can fall and rise, (N, O, L) each with L positions of a kernel."""
    sites, groups = _sites(layer, inputs)
    on_image = None
    positions = 1
    if isinstance(layer, Convolution):
        on_image = _windows(layer, torch.ones_like(inputs[:1, :1]))[:, 0]
        positions = len(on_image)
        if bool(on_image.all()):
            on_image = None
    one_neuron = 3 * positions * sites.shape[2] * inputs.element_size()
    images_at_once = max(1, memory_budget // (one_neuron * len(sites)))
    neurons_at_once = max(1, memory_budget // one_neuron)
    chunks = []
    for images in torch.split(inputs, images_at_once):
        windows = _windows(layer, images) if isinstance(layer, Convolution) else images.flatten(2)
        kept = None if on_image is None else on_image.repeat(len(images), 1)
        parts = [
            _changes(seen, weights, low, high, kept, pixels)
            for seen, of_group, low, high in zip(
                windows.chunk(groups, 1),
                sites.chunk(groups),
                *(side.chunk(groups) for side in ranges),
                strict=True,
            )
            for weights in torch.split(of_group, neurons_at_once)
        ]
        both = torch.stack([torch.cat(side, 1) for side in zip(*parts, strict=True)])
        chunks.append(both.reshape(2, len(images), positions, -1).transpose(2, 3))
    falls, rises = torch.cat(chunks, 1)
    return falls, rises


def _windows(layer: Convolution, values: Tensor) -> Tensor:
    """Return what the kernel sees of values (n, C, H, W) at its L positions, (n * L, C, K)."""
    kernel = layer.weight.shape[2:]
    columns = functional.unfold(values, kernel, layer.dilation, layer.padding, layer.stride)
    return (
        columns.reshape(*values.shape[:2], -1, columns.shape[2]).permute(0, 3, 1, 2).flatten(0, 1)
    )


def _changes(
    seen: Tensor,
    weights: Tensor,
    low: Tensor,
    high: Tensor,
    kept: Tensor | None,
    pixels: int,
) -> tuple[Tensor, Tensor]:
    """Return how far neurons can fall and rise.

    A value v of a pixel moves the neuron by w (v - x): at most by max(w low, w high) - w x upward,
    and by w x - min(w low, w high) downward, summed over the channels.

    Args:
        seen: (m, C, P), the pixels that neurons see.
        weights: (o, C, P), of the neurons.
        low: (C,), the lowest value of each channel.
        high: (C,), the highest.
        kept: (m, P), 1 for pixels of the image and 0 for padding; None if there is no padding.
        pixels: how many may change.

    Returns:
        (m, o) each.
    """
    pixels = min(pixels, seen.shape[2])
    table = weights.transpose(1, 2)  # (o, P, C)
    lowest, highest = _ends(table, low, high)
    with torch.no_grad():
        products = seen[:, None, 0] * weights[:, 0]
        for channel in range(1, seen.shape[1]):
            products = products.addcmul_(seen[:, None, channel], weights[:, channel])
        falls, rises = products - lowest.sum(2), highest.sum(2) - products
        if kept is not None:
            falls, rises = falls * kept[:, None], rises * kept[:, None]
        chosen = [gains.topk(pixels, sorted=False).indices for gains in (falls, rises)]
    sums = []
    first = torch.arange(len(weights), device=seen.device)[:, None] * seen.shape[2]
    for index, rising in zip(chosen, (False, True), strict=True):
        weight = functional.embedding(index + first, table.flatten(0, 1))  # (m, o, pixels, C)
        spread = index.flatten(1)[:, None].expand(-1, seen.shape[1], -1)
        value = (
            seen.gather(2, spread).reshape(*seen.shape[:2], *index.shape[1:]).permute(0, 2, 3, 1)
        )
        lowest, highest = _ends(weight, low, high)
        moved = weight * value
        gain = (highest - moved if rising else moved - lowest).sum(3)
        if kept is not None:
            gain = gain * kept.gather(1, index.flatten(1)).view_as(gain)
        sums.append(gain.sum(2))
    return sums[0], sums[1]


def _ends(weights: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and highest products of weights (..., C) with values from low to high."""
    return torch.minimum(weights * low, weights * high), torch.maximum(
        weights * low, weights * high
    )
