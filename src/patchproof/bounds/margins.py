"""A last fully connected layer merged with the differences of the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchproof.bounds.operators import Linear
from patchproof.bounds.windows import SMALLEST, Centred, Everywhere, gamma


@dataclass(frozen=True, eq=False)
class MergedLayer:
    """Margins logit_label - logit_j of N images as affine functions of what they see last.

    A lower bound of (w_label - w_j) z takes the lower bound of z where the difference of the
    weights is positive, and the upper bound where it is negative.

    Attributes:
        above: (N, classes, features), the positive part of the differences.
        below: (N, classes, features), the negative part, and less by what rounding can do.
        term: (N, classes), differences of the biases.
        rounding: (N, classes, features), of the magnitude of activations that may be negative;
            None where ``below`` holds it.
    """

    above: Tensor
    below: Tensor
    term: Tensor
    rounding: Tensor | None

    def choose(self, chosen: Tensor) -> MergedLayer:
        """Return the functions of some images, by (n,) indices or (N,) bool."""
        rounding = None if self.rounding is None else self.rounding[chosen]
        return MergedLayer(self.above[chosen], self.below[chosen], self.term[chosen], rounding)

    def margins(self, given: Everywhere | Centred) -> Tensor:
        """Return lower bounds of the margins, (L, N, classes) or (L, 1, classes)."""
        lower, upper = given.lower, given.upper
        margins = _times(self.below, upper, given.each) + _times(self.above, lower, given.each)
        if self.rounding is not None:
            largest = torch.maximum(lower.abs(), upper.abs())
            margins = margins - _times(self.rounding, largest, given.each)
        margins = (margins + self.term[:, :, None]).permute(2, 0, 1)  # (L or each, N, classes)
        if given.each is None:
            return margins
        return margins.transpose(0, 1).flatten(0, 1)[:, None]


def _times(matrices: Tensor, values: Tensor, each: int | None) -> Tensor:
    """Multiply by the matrices (N, classes, features) of the images; quickest from the left.

    Args:
        matrices: of each image.
        values: (L, N, features), or (N each, 1, features).
        each: regions of each image; None if all go with all.

    Returns:
        (N, classes, L) or (N, classes, each).
    """
    if each is None:
        return torch.bmm(matrices, values.expand(-1, len(matrices), -1).permute(1, 2, 0))
    return torch.bmm(matrices, values.reshape(len(matrices), each, -1).transpose(1, 2))


def merge(final: Linear, labels: Tensor, *, slack: bool, never_negative: bool) -> MergedLayer:
    """Merge the last layer with the labels (N,) of images.

    Args:
        final: the last layer.
        labels: (N,) int64.
        slack: leave room for the rounding of both logits in the network, and of the margins here.
        never_negative: activations are never below 0, so that their magnitude is the upper bound.
    """
    weight, bias = final.weight, final.bias
    difference = weight[labels][:, None] - weight
    above, below = difference.clamp(min=0), difference.clamp(max=0)
    term = weight.new_zeros(len(labels), len(weight))
    if bias is not None:
        term = bias[labels][:, None] - bias
    if not slack:
        return MergedLayer(above, below, term, None)
    relative = 3 * gamma(weight.shape[1])
    rounding = relative * (weight[labels].abs()[:, None] + weight.abs())
    term = term - 8 * weight.shape[1] * SMALLEST
    if bias is not None:
        term = term - relative * (bias[labels].abs()[:, None] + bias.abs())
    if never_negative:
        return MergedLayer(above, below - rounding, term, None)
    return MergedLayer(above, below, term, rounding)
