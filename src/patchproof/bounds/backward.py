"""Backward linear bounds: the last layers of a ReLU network as one linear function of a box.

CROWN (Zhang et al., 2018, "Efficient Neural Network Robustness Certification with General
Activation Functions", Section 3 and Table 3) replaces each ReLU by two lines, between which it
stays on the interval of its input, and substitutes layer by layer from the margins back to the box.
What cancels between layers then cancels in the bound; interval arithmetic forgets it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchproof.errors import PatchproofError

_HALF_UNIT = 2.0**-24
"""The largest relative error of one rounding in float32."""
_SPARE_ROUNDINGS = 16
"""Roundings of float32 allowed beyond one per term; 2**25 of float64 fit into each."""
_LARGEST_FLOAT32 = 3.4e38
_SMALLEST_FLOAT32 = 2.0**-126
"""What a number of float32 loses at most where it underflows, flushed to zero or not."""
_OWN_SHARE = 2.0**-28
"""How much sums of up to 2**24 terms in float64 are off, as a share of their magnitude."""


@dataclass(frozen=True, eq=False)
class AffineLayer:
    """What a network computes before a ReLU: ``weight @ inputs + bias``, for P pairs at once.

    A pair is an image with a region. Where the inputs are a patch window, weight holds the window's
    columns and bias the sum over the rest of the image.

    Attributes:
        weight: (F_out, F_in) for all pairs, or (P, F_out, F_in).
        bias: (F_out,) or (P, F_out).
        bias_magnitude: shape of bias; the sum of the absolute values of all that bias sums up (in
            float64). None is for a bias that the network itself adds as one number.
        terms: products that the network sums up for one output, those inside bias included; None
            for F_in. A batch normalisation that is folded in counts as 8 more, and its mean and
            shift belong to ``bias_magnitude``.

    Raises:
        PatchproofError: shapes that do not fit.
    """

    weight: Tensor
    bias: Tensor
    bias_magnitude: Tensor | None = None
    terms: int | None = None

    def __post_init__(self) -> None:
        weight, bias = self.weight, self.bias
        if weight.dim() not in (2, 3) or bias.dim() not in (1, 2):
            raise PatchproofError(
                "expected weight (F_out, F_in) or (P, F_out, F_in) and bias (F_out,) or "
                f"(P, F_out), got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        if weight.shape[-2] != bias.shape[-1]:
            raise PatchproofError(
                f"expected a bias of {weight.shape[-2]} outputs, got {bias.shape[-1]}"
            )
        if self.bias_magnitude is not None and self.bias_magnitude.shape != bias.shape:
            raise PatchproofError(
                f"expected bias_magnitude {tuple(bias.shape)}, got "
                f"{tuple(self.bias_magnitude.shape)}"
            )
        if self.terms is not None and self.terms < weight.shape[-1]:
            raise PatchproofError(
                f"expected at least {weight.shape[-1]} terms, one an input, got {self.terms}"
            )


def backward_margins(
    lower: Tensor,
    upper: Tensor,
    layers: Sequence[AffineLayer],
    margin_weight: Tensor,
    margin_bias: Tensor,
    slack: Tensor,
    *,
    intermediate: bool = False,
) -> Tensor:
    r"""Return lower bounds of the margins of a float32 network over a box, (P, M) float64.

    With z_0 any point of the box, the network computes a_k = W_k z_{k-1} + b_k + d_k and
    z_k = max(a_k, 0) for its layers k = 1, ..., K, where d_k is what float32 rounds. The bound is
    on margin_weight @ z_K + margin_bias for every such z_K, minus ``slack``. It is the larger of
    the interval bound and the backward bound.

    Proof. (1) Rounding. Whatever the order of summation, |d_k| <= gamma_n (|W_k| |z_{k-1}| + |b_k|)
    + n v, with n the terms, gamma_n = (n + 1) u / (1 - (n + 1) u), u = 2^-24, and v = 2^-126 for
    products that underflow, as long as nothing overflows. Let r_k be this bound with n + 16 for
    n + 1, 1.001 times, and with the largest |z_{k-1}| over the box; it is infinite where
    |W_k| |z_{k-1}| + |b_k| leaves float32. (2) Intervals. By induction l_k <= a_k <= u_k for the
    interval bounds of W_k z_{k-1} + b_k, widened by r_k, and z_k is between max(l_k, 0) and
    max(u_k, 0). (3) Lines. On [l, u], max(a, 0) is a where l >= 0, and 0 where u <= 0; else it is
    at most s (a - l), s = u / (u - l), and at least t a with t = 1 if u >= -l and 0 otherwise,
    whichever line leaves less area to the ReLU. So for any row c, c z_k >= c' a_k + e, where c'
    takes the lower line where c >= 0 and the upper line where c < 0.
    (4) Substitution. c' a_k = c' W_k z_{k-1} + c' b_k + c' d_k >= (c' W_k) z_{k-1} + c' b_k -
    |c'| r_k: again a row against z_{k-1}. At k = 0, a row c is at least c^+ lower + c^- upper.
    (5) Own rounding. All sums here are float64. Those of layer k, forward and backward, lines
    included, are off by a few 2^-29 |c'| (|W_k| |z_{k-1}| + |b_k|) at most for up to 2^24 features,
    and r_k exceeds the bound of (1) by 15 u (|W_k| |z_{k-1}| + |b_k|). Those of the margins are
    covered by 2^-28 (|margin_weight| |z_K| + |margin_bias|), subtracted, as is what the products of
    the network's last layer may lose where they underflow.

    Memory is O(P M F) for the largest number F of features, or with ``intermediate`` O(P F^2).

    Args:
        lower: (P, F_0) the least values in the box, exactly as the network's own activations are
            (their rounding included) or pixels.
        upper: (P, F_0) the largest.
        layers: in the network's order, each followed by a ReLU; none for margins of the box itself.
        margin_weight: (P, M, F_K) the weights of the label minus those of M other classes, in
            float64: rounded differences are another network's.
        margin_bias: (P, M) likewise.
        slack: (P, M), at least 0: what the network rounds in its last layer and beyond. For logits
            w_y z + b_y and w_j z + b_j this is ``rounding_share(F_K)`` times (|w_y| + |w_j|) |z| +
            |b_y| + |b_j|, which margin_weight does not tell.
        intermediate: whether the inputs of hidden ReLUs have backward bounds too, intersected with
            their interval bounds.

    Returns:
        The bounds; minus infinity where anything is infinite or NaN, or float32 may overflow.

    Raises:
        PatchproofError: shapes that do not fit, or a box with lower > upper.
    """
    _check(lower, upper, layers, margin_weight, margin_bias, slack)
    box = _Box(lower.double(), upper.double())
    values, steps = box, list[_Step]()
    for layer in layers:
        weight, bias = layer.weight.double(), layer.bias.double()
        rounding = _rounding(layer, weight, values)
        inputs = _Box(
            values.lowest(weight) + bias - rounding, rounding + bias - values.lowest(-weight)
        )
        if intermediate and steps:
            rows = weight.expand(len(lower), -1, -1)
            inputs = _Box(
                torch.maximum(inputs.lower, _lowest(box, steps, rows, bias) - rounding),
                torch.minimum(inputs.upper, rounding - _lowest(box, steps, -rows, -bias)),
            )
        steps.append(_Step(weight, bias, rounding, *_lines(inputs)))
        values = _Box(inputs.lower.clamp(min=0), inputs.upper.clamp(min=0))
    rows, offset = margin_weight.double(), margin_bias.double()
    lowest = torch.maximum(values.lowest(rows) + offset, _lowest(box, steps, rows, offset))
    own = _OWN_SHARE * (_product(rows.abs(), values.largest) + offset.abs())
    underflow = 2 * (rows.shape[-1] + _SPARE_ROUNDINGS) * _SMALLEST_FLOAT32
    lowest = lowest - own - underflow - slack.double()
    return lowest.masked_fill(~lowest.isfinite(), -math.inf)


def rounding_share(terms: int) -> float:
    """Return how far float32 is off when it sums up products, as a share of their absolute sum.

    Args:
        terms: products summed up, in any order; a bias may come on top.
    """
    units = (terms + _SPARE_ROUNDINGS) * _HALF_UNIT
    return 1.001 * units / (1 - units) if units < 0.5 else math.inf


@dataclass(frozen=True, eq=False)
class _Box:
    """Bounds of the features of P pairs, (P, F) float64 each."""

    lower: Tensor
    upper: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest absolute value, (P, F)."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def lowest(self, weight: Tensor) -> Tensor:
        """Return the least value of each row of weight over the box, (P, rows)."""
        return _product(weight.clamp(min=0), self.lower) + _product(weight.clamp(max=0), self.upper)


@dataclass(frozen=True, eq=False)
class _Step:
    """A layer and the lines that bound the ReLU after it, float64.

    Attributes:
        weight: (F_out, F_in) or (P, F_out, F_in).
        bias: (F_out,) or (P, F_out).
        rounding: (P, F_out) how far the network's own sum may be off.
        slope_below: (P, F_out) of the line through 0 that the ReLU never falls below.
        slope_above: (P, F_out) of the line that the ReLU never exceeds.
        offset_above: (P, F_out) its value at 0.
    """

    weight: Tensor
    bias: Tensor
    rounding: Tensor
    slope_below: Tensor
    slope_above: Tensor
    offset_above: Tensor


def _product(weight: Tensor, values: Tensor) -> Tensor:
    """Return weight, (R, F) or (P, R, F), times the values of each pair, (P, F), as (P, R)."""
    if weight.dim() == 2:
        return values @ weight.T
    return (weight @ values[..., None]).squeeze(-1)


def _rounding(layer: AffineLayer, weight: Tensor, values: _Box) -> Tensor:
    """Return how far float32 is off at most, (P, F_out): infinite where it may overflow."""
    terms = weight.shape[-1] if layer.terms is None else layer.terms
    constant = layer.bias.abs() if layer.bias_magnitude is None else layer.bias_magnitude
    magnitude = _product(weight.abs(), values.largest) + constant.double()
    share = rounding_share(terms)
    rounding = share * magnitude + (terms + _SPARE_ROUNDINGS) * _SMALLEST_FLOAT32
    return rounding.masked_fill(magnitude + rounding > _LARGEST_FLOAT32, math.inf)


def _lines(inputs: _Box) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slope of the line below ReLUs, the slope of the line above, and its value at 0."""
    lower, upper = inputs.lower, inputs.upper
    active, dead = (lower >= 0).double(), upper <= 0
    above = torch.where(lower >= 0, active, upper / (upper - lower)).masked_fill(dead, 0)
    offset = -above * lower.clamp(max=0)
    below = torch.where(lower >= 0, active, (upper >= -lower).double())
    return below, above, offset


def _lowest(box: _Box, steps: Sequence[_Step], rows: Tensor, offset: Tensor) -> Tensor:
    """Return a lower bound of rows @ (what comes out of the last step) + offset, (P, R).

    Args:
        box: of the inputs of the first step.
        steps: layers with their lines, possibly none.
        rows: (P, R, F).
        offset: (R,) or (P, R).
    """
    for step in reversed(steps):
        offset = offset + _product(rows.clamp(max=0), step.offset_above)
        rows = rows * torch.where(rows >= 0, step.slope_below[:, None], step.slope_above[:, None])
        bias = step.bias.expand_as(step.rounding)
        offset = offset + _product(rows, bias) - _product(rows.abs(), step.rounding)
        rows = rows @ step.weight
    return box.lowest(rows) + offset


def _check(
    lower: Tensor,
    upper: Tensor,
    layers: Sequence[AffineLayer],
    margin_weight: Tensor,
    margin_bias: Tensor,
    slack: Tensor,
) -> None:
    """Refuse tensors that do not belong together."""
    if lower.dim() != 2 or lower.shape != upper.shape:
        raise PatchproofError(
            "expected lower and upper (P, F_0) of one shape, got "
            f"{tuple(lower.shape)} and {tuple(upper.shape)}"
        )
    pairs, features = lower.shape
    if (lower > upper).any():
        raise PatchproofError("expected lower <= upper, got a box with lower > upper")
    for number, layer in enumerate(layers, start=1):
        held = {len(part) for part in (layer.weight, layer.bias) if _is_per_pair(part, layer)}
        if layer.weight.shape[-1] != features or not held <= {pairs}:
            raise PatchproofError(
                f"expected layer {number} for {pairs} pairs and {features} inputs, got weight "
                f"{tuple(layer.weight.shape)} and bias {tuple(layer.bias.shape)}"
            )
        features = layer.bias.shape[-1]
    if margin_weight.dim() != 3 or margin_weight.shape[::2] != (pairs, features):
        raise PatchproofError(
            f"expected margin_weight ({pairs}, M, {features}), got {tuple(margin_weight.shape)}"
        )
    margins = margin_weight.shape[:2]
    if margin_bias.shape != margins or slack.shape != margins:
        raise PatchproofError(
            f"expected margin_bias and slack {tuple(margins)}, got {tuple(margin_bias.shape)} and "
            f"{tuple(slack.shape)}"
        )


def _is_per_pair(part: Tensor, layer: AffineLayer) -> bool:
    return part.dim() == (3 if part is layer.weight else 2)
