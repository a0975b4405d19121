"""A last fully connected layer merged with the differences of the logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from patchproof.bounds.operators import Linear
from patchproof.bounds.windows import SMALLEST, Centred, Everywhere, gamma, rows

_FEW = 16
"""Classes up to which all pairs of them cost little."""


class MergedLayer(ABC):
    """Margins logit_label - logit_j of N images as affine functions of what they see last."""

    @abstractmethod
    def choose(self, chosen: Tensor) -> MergedLayer:
        """Return the functions of some images, by (n,) indices or (N,) bool."""

    @abstractmethod
    def margins(self, given: Everywhere | Centred) -> Tensor:
        """Return lower bounds of the margins, (L, N, classes) or (L, 1, classes).

        Of the label itself 0, or with slack infinity: the least of all is that of the others.
        """


@dataclass(frozen=True, eq=False)
class ByPairs(MergedLayer):
    """Margins with gradients, without slack: of all pairs of classes, for all images at once.

    A lower bound of (w_label - w_j) z is that of its centre less |w_label - w_j| times its radius.
    Matrices that all images share have a gradient that is quick.

    Attributes:
        final: the last layer.
        labels: (N,) int64.
    """

    final: Linear
    labels: Tensor

    def choose(self, chosen: Tensor) -> ByPairs:
        """Return the functions of some images."""
        return ByPairs(self.final, self.labels[chosen])

    def margins(self, given: Everywhere | Centred) -> Tensor:
        """Return lower bounds of the margins."""
        weight = self.final.weight
        one, other = torch.triu_indices(len(weight), len(weight), 1, device=weight.device)
        pair = weight.new_zeros(len(weight), len(weight), dtype=torch.int64)
        pair[one, other] = pair[other, one] = torch.arange(len(one), device=weight.device)
        lower, upper = given.lower, given.upper
        logits = functional.linear(lower + upper, weight / 2, self.final.bias)
        differences = (weight[one] - weight[other]).abs() / 2
        spreads = (differences @ (upper - lower).flatten(0, 1).T).T.reshape(*logits.shape[:2], -1)
        labels = rows(self.labels, given.each)[:, :, None].expand(*logits.shape[:2], 1)
        spread = spreads.gather(2, pair[labels[:, :, 0]]).scatter(2, labels, 0.0)
        return logits.gather(2, labels) - logits - spread


@dataclass(frozen=True, eq=False)
class ByImages(MergedLayer):
    """Margins by a matrix of each image.

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

    def choose(self, chosen: Tensor) -> ByImages:
        """Return the functions of some images."""
        rounding = None if self.rounding is None else self.rounding[chosen]
        return ByImages(self.above[chosen], self.below[chosen], self.term[chosen], rounding)

    def margins(self, given: Everywhere | Centred) -> Tensor:
        """Return lower bounds of the margins."""
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
    if torch.is_grad_enabled() and not slack and len(weight) <= _FEW:
        return ByPairs(final, labels)
    difference = weight[labels][:, None] - weight
    above, below = difference.clamp(min=0), difference.clamp(max=0)
    term = weight.new_zeros(len(labels), len(weight))
    if bias is not None:
        term = bias[labels][:, None] - bias
    if not slack:
        return ByImages(above, below, term, None)
    relative = 3 * gamma(weight.shape[1])
    rounding = relative * (weight[labels].abs()[:, None] + weight.abs())
    term = term - 8 * weight.shape[1] * SMALLEST
    if bias is not None:
        term = term - relative * (bias[labels].abs()[:, None] + bias.abs())
    term = term.scatter(1, labels[:, None], torch.inf)
    if never_negative:
        return ByImages(above, below - rounding, term, None)
    return ByImages(above, below, term, rounding)
