"""The operators that bounds go through, one class each, and the rule of interval arithmetic of it.

An operator works on clean activations (``clean``); on bounds of all activations of one box
(``plain``, the textbook rule: Chiang et al., 2020, Equations 5 to 8); and on what many regions of a
patch can do to them (``propagate``): on windows until a layer sees the whole image, and everywhere
from there on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from patchproof.bounds.windows import (
    HALF_ULP,
    SMALLEST,
    Centred,
    Clean,
    Everywhere,
    Windows,
    cut,
    distinct_pairs,
    gamma,
    in_order,
    inside_map,
    padded,
    placed,
    places,
    remembered,
    rows,
    to_remember,
    widened,
    widening,
)

_COLUMNS = 2**18
"""Values of the columns of windows that are multiplied in one call."""
_FEW = 16
"""Channels of a convolution up to which its matrix on a window may be quicker."""
_MOST_WASTE = 4
"""Multiplications by that matrix for each of the convolution, where it is."""
_WORTH_BANDS = 2**13
"""Values of that matrix from which it pays to leave out the zeros of each row of outputs."""

Bounds = Windows | Everywhere | Centred
Box = tuple[Tensor, Tensor]
"""Lower and upper bounds of all activations."""


class Operator(ABC):
    """One operator of a network.

    Attributes:
        kept: what is kept from one batch to the next (``BoundedNetwork.keeping``); None while
            nothing is, as where gradients are wanted.
    """

    kept: dict[Any, Tensor] | None = None

    def _buffer(self, name: str, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
        """Return memory that is used again, as fresh pages cost as much as what is put there.

        None where nothing is kept: for ``out=``, that is fresh memory.
        """
        if self.kept is None:
            return None
        if name not in self.kept or self.kept[name].shape != shape:
            self.kept[name] = like.new_empty(shape)
        return self.kept[name]

    def _scaled(self, values: Tensor, factor: Tensor | float) -> Tensor:
        """Return own results times a factor, in their own memory where there are no gradients."""
        return values * factor if self.kept is None else values.mul_(factor)

    def _on_map(self, windows: Windows) -> Windows:
        """Return own windows with 0 where they stick out of the maps."""
        height, width = windows.clean.value.shape[2:]
        inside = inside_map(windows.starts, windows.size, (height, width))
        if inside is None:
            return windows
        # laid out as the windows are: products with rows that are one channel wide are slow
        inside = inside.expand(-1, -1, -1, windows.shift.shape[3], -1).to(windows.shift)
        shift, radius = (self._scaled(values, inside) for values in (windows.shift, windows.radius))
        return replace(windows, shift=shift, radius=radius)

    @abstractmethod
    def clean(self, *inputs: Clean) -> Clean:
        """Return the activations of clean images, and how far rounding may move them."""

    @abstractmethod
    def plain(self, *inputs: Box) -> Box:
        """Return the bounds of all activations (N, ...), without slack for rounding."""

    @abstractmethod
    def propagate(self, clean: Clean, *inputs: Bounds) -> Bounds:
        """Return the bounds for many regions, where ``clean`` is what it makes of clean images."""


class Affine(Operator):
    """An affine operator: y = W z + b, with ``apply`` for W or |W| alone."""

    terms: int
    """The most terms that one activation sums up."""

    @abstractmethod
    def apply(self, values: Tensor, *, absolute: bool) -> Tensor:
        """Return W values, or |W| values."""

    @abstractmethod
    def forward(self, values: Tensor) -> Tensor:
        """Return W values + b as the network computes it."""

    def clean(self, *inputs: Clean) -> Clean:
        """Return the activations with their rounding error."""
        (given,) = inputs
        value = self.forward(given.value)
        if given.error is None:
            return Clean(value, None)
        rounded = self.magnitude(given.value.abs())
        error = self.apply(given.error, absolute=True)
        error = error + 2 * gamma(self.terms) * rounded + 4 * self.terms * SMALLEST
        return Clean(value, widened(error, self.terms))

    def magnitude(self, values: Tensor) -> Tensor:
        """Return |W| values + |b| of values that are not negative: no partial sum is larger."""
        bias = self.forward(torch.zeros_like(values[:1])).abs()
        return self.apply(values, absolute=True) + bias

    def plain(self, *inputs: Box) -> Box:
        """Return centre -+ radius (Equations 5 and 6)."""
        ((lower, upper),) = inputs
        centre = self.forward((lower + upper) / 2)
        radius = self.apply((upper - lower) / 2, absolute=True)
        return centre - radius, centre + radius

    def everywhere(self, clean: Clean, given: Everywhere | Centred) -> Centred:
        """Return the bounds where the input is bounded everywhere."""
        shape = given.lower.shape[:2]
        centre = self.forward(((given.lower + given.upper) / 2).flatten(0, 1))
        radius = self.apply(((given.upper - given.lower) / 2).flatten(0, 1), absolute=True)
        centre, radius = (part.reshape(*shape, *part.shape[1:]) for part in (centre, radius))
        return self._centred(clean, centre, radius, given.each)

    def _centred(self, clean: Clean, centre: Tensor, radius: Tensor, each: int | None) -> Centred:
        """Return bounds of all outputs, widened by what rounding can do."""
        if clean.error is None:
            return Centred(clean, centre, radius, None, each)
        radius = self._scaled(radius, widening(self.terms))
        return Centred(clean, centre, radius, rows(clean.error, each), each)


class Weighted(Affine):
    """A layer whose weights are read whenever they are used, so that they can be trained.

    Args:
        weight: (outputs, ...).
        bias: (outputs,), or None.
    """

    def __init__(self, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]) -> None:
        self._weight, self._bias = weight, bias
        self.terms = weight()[0].numel()

    @property
    def weight(self) -> Tensor:
        """(outputs, ...) as it is now."""
        return self._weight()

    @property
    def bias(self) -> Tensor | None:
        """(outputs,) as it is now."""
        return self._bias()


class Linear(Weighted):
    """A fully connected layer on (N, features), its weight (outputs, features)."""

    def apply(self, values: Tensor, *, absolute: bool) -> Tensor:
        """Return values W^T, or values |W|^T."""
        return functional.linear(values, self.weight.abs() if absolute else self.weight)

    def forward(self, values: Tensor) -> Tensor:
        """Return values W^T + b."""
        return functional.linear(values, self.weight, self.bias)

    def propagate(self, clean: Clean, *inputs: Bounds) -> Centred:
        """Return bounds of all outputs."""
        (given,) = inputs
        if not isinstance(given, Windows):
            return self.everywhere(clean, given)
        return self._centred(clean, *self._on_windows(clean, given), given.each)

    def _on_windows(self, clean: Clean, given: Windows) -> tuple[Tensor, Tensor]:
        """Return centre and radius, (L, N, outputs) or a radius (L, 1, outputs), of windows.

        The features are the flattened maps that the windows are on.
        """
        shift, radius = given.shift.flatten(2), given.radius.flatten(2)
        if given.each is None:
            return self._by_regions(clean.value, given.places, shift, radius)
        distinct, which = distinct_pairs(given.starts)
        if len(distinct) * 4 > len(given.starts):
            moved, spread = (
                sums[:, None]
                for sums in _Bags.apply(given.places, self._table(), shift[:, 0], radius[:, 0])
            )
        else:
            shape = given.clean.value.shape[1:]
            columns = weight_columns(self.weight, shape, distinct, given.size)
            moved, spread = _by_groups(columns, which, shift, radius)
        return rows(clean.value, given.each) + moved, spread

    def _by_regions(
        self, value: Tensor, index: Tensor, shift: Tensor, radius: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Multiply windows that all images have, at the places (L, features) of an index."""
        count, outputs = value.shape
        table = self._table()
        centre = self._buffer("centre", shift, (len(shift), count, outputs))
        spread = self._buffer("spread", shift, (len(shift), radius.shape[1], outputs))
        if centre is None or spread is None:
            columns = functional.embedding(index, table)
            centre = torch.baddbmm(value.expand(len(shift), -1, -1), shift, columns)
            return centre, torch.bmm(radius, columns.abs())
        at_once = max(1, _COLUMNS // (index.shape[1] * outputs))
        for of in torch.split(torch.arange(len(shift)), at_once):
            part = slice(int(of[0]), int(of[-1]) + 1)
            size = (len(of) * index.shape[1], outputs)
            columns = torch.index_select(
                table, 0, index[part].flatten(), out=self._buffer("columns", table, size)
            )
            columns = columns.reshape(len(of), -1, outputs)
            torch.baddbmm(value.expand(len(of), -1, -1), shift[part], columns, out=centre[part])
            torch.bmm(radius[part], columns.abs_(), out=spread[part])
        return centre, spread

    def _table(self) -> Tensor:
        """Return the weights by feature, and zeros after the last, (features + 1, outputs)."""
        if self.kept is None:
            return functional.pad(self.weight.T, (0, 0, 0, 1))
        if "table" not in self.kept:
            self.kept["table"] = functional.pad(self.weight.T, (0, 0, 0, 1)).contiguous()
        return self.kept["table"]


def weight_columns(
    weight: Tensor, shape: torch.Size, starts: Tensor, size: tuple[int, int]
) -> Tensor:
    """Return what windows of maps (C, H, W) are multiplied by, (L, h C w, outputs).

    Args:
        weight: (outputs, C H W).
        shape: (C, H, W).
        starts: (L, 2) of the windows.
        size: (h, w) of the windows.
    """
    index = places(shape, starts, size).to(weight.device)
    return functional.embedding(index, functional.pad(weight.T, (0, 0, 0, 1)))


def _by_groups(
    columns: Tensor, which: Tensor, shift: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """Multiply windows (L, N, features) by the columns (D, features, outputs) they belong to."""
    order = which.argsort()
    counts = which.bincount().tolist()
    moved, spread = (
        torch.cat(
            [
                part @ column
                for part, column in zip(
                    torch.split_with_sizes(values[order], counts), table, strict=True
                )
            ]
        )[order.argsort()]
        for values, table in ((shift, columns), (radius, columns.abs()))
    )
    return moved, spread


class _Bags(torch.autograd.Function):
    """Sums of rows of a table and of its magnitudes, ``functional.embedding_bag`` with weights.

    The gradient of the table is such sums too, over the bags that each row is in: torch's own takes
    twice as long or longer.
    """

    @staticmethod
    def forward(
        ctx: Any, index: Tensor, table: Tensor, shift: Tensor, radius: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return sums (L, F) over index (L, n), with weights (L, n), of a table (rows, F)."""
        ctx.save_for_backward(index, table, shift, radius)
        return _bags(index, table, shift), _bags(index, table.abs(), radius)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of the table and, where they are wanted, of the weights."""
        index, table, *weights = ctx.saved_tensors
        order = index.flatten().argsort()
        ends = index.flatten().bincount(minlength=len(table)).cumsum(0)
        offsets = functional.pad(ends[:-1], (1, 0))
        moved, spread = (
            functional.embedding_bag(
                order.div(index.shape[1], rounding_mode="floor"),
                gradient.contiguous(),
                offsets,
                mode="sum",
                per_sample_weights=weight.flatten()[order],
            )
            for gradient, weight in zip(gradients, weights, strict=True)
        )
        of_weights: list[Tensor | None] = [None, None]
        for number, rows_ in enumerate((table, table.abs())):
            if ctx.needs_input_grad[number + 2]:
                with torch.enable_grad():
                    weight = weights[number].detach().requires_grad_()
                    sums = _bags(index, rows_, weight)
                (of_weights[number],) = torch.autograd.grad(sums, weight, gradients[number])
        return None, moved + spread * table.sign(), of_weights[0], of_weights[1]


def _bags(index: Tensor, table: Tensor, weights: Tensor) -> Tensor:
    return functional.embedding_bag(index, table, mode="sum", per_sample_weights=weights)


class Convolution(Weighted):
    """A convolution with zero padding, its weight (outputs, inputs / groups, rows, columns)."""

    def __init__(
        self,
        weight: Callable[[], Tensor],
        bias: Callable[[], Tensor | None],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__(weight, bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def _convolve(
        self, values: Tensor, bias: Tensor | None, padding: tuple[int, int], *, absolute: bool
    ) -> Tensor:
        weight = self.weight.contiguous()  # windows are too small for channels_last
        weight = weight.abs() if absolute else weight
        return functional.conv2d(
            values, weight, bias, self.stride, padding, self.dilation, self.groups
        )

    def apply(self, values: Tensor, *, absolute: bool) -> Tensor:
        """Convolve without the bias."""
        return self._convolve(values, None, self.padding, absolute=absolute)

    def forward(self, values: Tensor) -> Tensor:
        """Convolve."""
        return self._convolve(values, self.bias, self.padding, absolute=False)

    def _on_window(
        self,
        shift: Tensor,
        radius: Tensor,
        offset: tuple[int, int],
        seen: tuple[int, int],
        size: tuple[int, int],
        *,
        reuse: bool,
    ) -> tuple[Tensor, Tensor]:
        """Convolve windows (L, N, h, C, w) at an offset inside zeros of the size ``seen``.

        Windows are hardly larger than the kernel, so that nearly every output sees nearly every
        input: where few channels make the matrix of the convolution small, it is multiplied.
        """
        few = max(shift.shape[3], len(self.weight)) <= _FEW
        few = few and shift[0, 0].numel() <= _MOST_WASTE * self.terms * self.groups
        matrix = self._matrix(shift, offset, seen) if few else None
        bands = [] if matrix is None else self._bands(shift, offset[0], matrix.shape[1], size[0])
        results = []
        for values, absolute in ((shift, False), (radius, True)):
            flat = values.flatten(0, 1)
            if matrix is None:
                maps = padded(flat, offset, seen).transpose(1, 2)
                result = self._convolve(maps, None, (0, 0), absolute=absolute).transpose(1, 2)
            else:
                part = matrix.abs() if absolute else matrix
                out = (
                    self._buffer(f"{absolute}", flat, (len(flat), matrix.shape[1]))
                    if reuse
                    else None
                )
                result = banded_product(flat.flatten(1), part, bands, out)
            results.append(result.reshape(*values.shape[:2], size[0], len(self.weight), size[1]))
        return results[0], results[1]

    def _bands(self, windows: Tensor, top: int, outputs: int, rows_: int) -> list[Band]:
        """Return which inputs of the matrix each row of outputs sees."""
        (height, *of_row), each = windows.shape[2:], outputs // rows_
        inputs = of_row[0] * of_row[1]
        if height * inputs * outputs < _WORTH_BANDS:
            return [(slice(0, height * inputs), slice(0, outputs))]
        extent = (self.weight.shape[2] - 1) * self.dilation[0] + 1
        first = [row * self.stride[0] - top for row in range(rows_)]
        return [
            (
                slice(max(0, begin) * inputs, max(0, min(height, begin + extent)) * inputs),
                slice(row * each, (row + 1) * each),
            )
            for row, begin in enumerate(first)
        ]

    def _matrix(self, values: Tensor, offset: tuple[int, int], seen: tuple[int, int]) -> Tensor:
        """Return what flattened windows (..., h, C, w) are multiplied by, (h C w, h' C' w').

        A value of it is one weight, or 0.
        """
        shape = values.shape[2:]
        key = (tuple(shape), offset, seen)
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        numbers = _numbers_of_weights(
            self.weight.shape, shape, offset, seen, self.stride, self.dilation, self.groups
        ).to(values.device)
        weights = functional.pad(self.weight.flatten(), (1, 0))
        matrix = weights.index_select(0, numbers.flatten()).reshape(numbers.shape)
        if self.kept is not None:
            self.kept[key] = matrix
        return matrix

    def propagate(self, clean: Clean, *inputs: Bounds) -> Bounds:
        """Return bounds on the windows of all outputs that see the input's windows."""
        (given,) = inputs
        if not isinstance(given, Windows):
            return self.everywhere(clean, given)
        kernel = self.weight.shape[2:]
        shape = (clean.value.shape[2], clean.value.shape[3])
        first, offsets, size, needed = reach(
            given.starts,
            given.size,
            (kernel[0], kernel[1]),
            self.stride,
            self.padding,
            self.dilation,
            shape,
        )
        distinct, which = distinct_pairs(offsets)
        shifts, radii = given.shift, given.radius
        if len(distinct) > self.stride[0] * self.stride[1]:  # windows that became the whole map
            shifts, radii = (placed(values, offsets, needed) for values in (shifts, radii))
            distinct, which = torch.zeros(1, 2, dtype=torch.int64), torch.zeros_like(which)
        parts = []
        alone = len(distinct) == 1
        for number, (top, left) in enumerate(distinct.tolist()):
            windows = shifts, radii
            if not alone:
                here = (which == number).nonzero().squeeze(1).to(shifts.device)
                windows = shifts.index_select(0, here), radii.index_select(0, here)
            parts.append(self._on_window(*windows, (top, left), needed, size, reuse=alone))
        shift, radius = (in_order(list(part), which) for part in zip(*parts, strict=True))
        if clean.error is not None:
            radius = self._scaled(radius, widening(self.terms))
        return self._on_map(Windows(clean, shift, radius, first, given.each))


@lru_cache(maxsize=2**6)
def _numbers_of_weights(
    weight: torch.Size,
    window: torch.Size,
    offset: tuple[int, int],
    seen: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return which weight, from 1, each output has for each input of a window, or 0 for none.

    Args:
        weight: (outputs, inputs / groups, rows, columns) of a convolution.
        window: (h, C, w).
        offset: of the window inside zeros.
        seen: the size of these.
        stride: of the convolution along each axis.
        dilation: along each axis.
        groups: of channels.

    Returns:
        (h C w, h' C' w') int32.
    """
    outputs, inputs, *kernel = weight
    with to_remember():
        (row, of_row), (column, of_column) = (
            _seen_by(length, *along)
            for length, *along in zip(
                window[::2], offset, seen, kernel, stride, dilation, strict=True
            )
        )
        channel = torch.arange(window[1])
        output = torch.arange(outputs)
        of_channel = channel[:, None].div(inputs, rounding_mode="floor") == output.div(
            outputs // groups, rounding_mode="floor"
        )
        plane = output * inputs + channel[:, None] % inputs
        number = (  # (h, C, w, h', C', w')
            plane[:, None, None, :, None] * kernel[0] + row[:, None, None, :, None, None]
        ) * kernel[1] + column[:, None, None, :]
        exists = (
            of_row[:, None, None, :, None, None]
            & of_channel[:, None, None, :, None]
            & of_column[:, None, None, :]
        )
        return torch.where(exists, number + 1, 0).flatten(3).flatten(0, 2).int()


def _seen_by(
    length: int, offset: int, seen: int, kernel: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Return which element of a sliding kernel is on each input, for each output, along an axis.

    Args:
        length: of the window.
        offset: of the window inside of what is seen.
        seen: length of that.
        kernel: length of the kernel.
        stride: of the kernel.
        dilation: of the kernel.

    Returns:
        (length, outputs) int64, and where there is such an element, bool.
    """
    last = seen - (kernel - 1) * dilation
    distance = torch.arange(length)[:, None] + offset - torch.arange(0, last, stride)
    element = distance.div(dilation, rounding_mode="floor")
    return element, (element * dilation == distance) & (element >= 0) & (element < kernel)


Band = tuple[slice, slice]
"""Inputs and outputs of a matrix: these outputs see no other inputs."""


def banded_product(
    values: Tensor, matrix: Tensor, bands: Sequence[Band], out: Tensor | None = None
) -> Tensor:
    """Return values (P, inputs) times a matrix (inputs, outputs) that is 0 outside of its bands.

    Args:
        values: (P, inputs).
        matrix: (inputs, outputs).
        bands: each output in one of them.
        out: memory for the result, where there are no gradients.
    """
    if out is None:
        product: Tensor = _BandedProduct.apply(values, matrix, bands)
        return product
    for inputs, outputs in bands:
        torch.mm(values[:, inputs], matrix[inputs, outputs], out=out[:, outputs])
    return out


class _BandedProduct(torch.autograd.Function):
    """``banded_product`` with gradients, those of each band added up in place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, matrix: Tensor, bands: Sequence[Band]) -> Tensor:
        """Return the product, (P, outputs)."""
        ctx.save_for_backward(values, matrix)
        ctx.bands = bands
        return banded_product(values, matrix, bands, values.new_empty(len(values), matrix.shape[1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of the values and the matrix, where they are wanted."""
        values, matrix = ctx.saved_tensors
        (gradient,) = gradients
        of_values = torch.zeros_like(values) if ctx.needs_input_grad[0] else None
        of_matrix = torch.zeros_like(matrix) if ctx.needs_input_grad[1] else None
        for inputs, outputs in ctx.bands:
            if of_values is not None:
                of_values[:, inputs].addmm_(gradient[:, outputs], matrix[inputs, outputs].T)
            if of_matrix is not None:
                of_matrix[inputs, outputs] = values[:, inputs].T @ gradient[:, outputs]
        return of_values, of_matrix, None


@remembered
def reach(
    starts: Tensor,
    length: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    shape: tuple[int, int],
) -> tuple[Tensor, Tensor, tuple[int, int], tuple[int, int]]:
    """Return which outputs of a sliding kernel, a map of a shape (H, W), see windows.

    Args:
        starts: (L, 2) int64 of the windows.
        length: (h, w) of the windows.
        kernel: of the sliding kernel, as are stride, padding and dilation.
        stride: along each axis.
        padding: along each axis.
        dilation: along each axis.
        shape: (H, W) of the outputs.

    Returns:
        The first output of each window, (L, 2); how far the input window begins after the first
        input that this output sees, (L, 2); and how many outputs there are along each axis, and
        how many inputs they see.
    """
    steps, before = torch.tensor(stride), torch.tensor(padding)
    extent = (torch.tensor(kernel) - 1) * torch.tensor(dilation)
    first = -((extent - starts - before).div(steps, rounding_mode="floor"))
    offsets = starts - (first * steps - before)
    last = (offsets + torch.tensor(length) - 1).div(steps, rounding_mode="floor").amax(0)
    size = last.clamp(min=0) + 1
    most = torch.tensor(shape)
    first = torch.where(size < most, first, 0)  # else all of the map
    size = torch.minimum(size, most)
    offsets = starts - (first * steps - before)
    needed = (size - 1) * steps + extent + 1
    (rows_, columns), (high, wide) = size.tolist(), needed.tolist()
    return first, offsets, (rows_, columns), (high, wide)


class Scale(Affine):
    """y = a z + b with one factor and one term for each channel.

    Args:
        factor_and_term: a and b, (C,) each or one value.
        magnitude: the sum of the magnitudes of what b is computed from, (C,), if that is more.
    """

    terms = 4

    def __init__(
        self,
        factor_and_term: Callable[[], tuple[Tensor, Tensor]],
        magnitude: Callable[[], Tensor] | None = None,
    ) -> None:
        self._factor_and_term = factor_and_term
        self._magnitude = magnitude

    def _shaped(self, values: Tensor) -> tuple[Tensor, Tensor]:
        factor, term = self._factor_and_term()
        shape = (-1, *[1] * (values.ndim - 2))
        return factor.to(values.device).reshape(shape), term.to(values.device).reshape(shape)

    def magnitude(self, values: Tensor) -> Tensor:
        """Return |a| values + the sum of the parts of |b|, which may cancel in b."""
        if self._magnitude is None:
            return super().magnitude(values)
        factor, _ = self._shaped(values)
        return values * factor.abs() + self._magnitude().reshape(factor.shape)

    def apply(self, values: Tensor, *, absolute: bool) -> Tensor:
        """Return a values, or |a| values."""
        factor, _ = self._shaped(values)
        return values * (factor.abs() if absolute else factor)

    def forward(self, values: Tensor) -> Tensor:
        """Return a values + b."""
        factor, term = self._shaped(values)
        return values * factor + term

    def propagate(self, clean: Clean, *inputs: Bounds) -> Bounds:
        """Return bounds on the same windows."""
        (given,) = inputs
        if not isinstance(given, Windows):
            return self.everywhere(clean, given)
        factor = self._shaped(given.clean.value)[0].flatten(1)  # (C, 1)
        radius = given.radius * factor.abs()
        if clean.error is not None:
            radius = widened(radius, self.terms)
        return Windows(clean, given.shift * factor, radius, given.starts, given.each)


class Monotone(Operator):
    """An activation that never falls: bounds go through it one by one (Equations 7 and 8).

    Args:
        function: of each value.
        exact: it rounds nothing, as it is linear in pieces.
        never_negative: it has no value below 0.

    Attributes:
        alone: whether nothing else takes what an affine layer gives it, so that it may overwrite
            that.
    """

    alone = False

    def __init__(
        self, function: Callable[[Tensor], Tensor], *, exact: bool, never_negative: bool
    ) -> None:
        self._function = function
        self._exact = exact
        self.never_negative = never_negative

    @property
    def is_relu(self) -> bool:
        """Whether it is max(z, 0)."""
        return self._function is torch.relu

    def clean(self, *inputs: Clean) -> Clean:
        """Return the activations, and how far a rounded input moves them."""
        (given,) = inputs
        value = self._function(given.value)
        if given.error is None:
            return Clean(value, None)
        above = self._outward(given.value + given.error, 1) - value
        below = value - self._outward(given.value - given.error, -1)
        return Clean(value, torch.maximum(above, below) * (1 + 4 * HALF_ULP))

    def _of_centred(self, given: Centred, slack: bool) -> Box:
        """Return the bounds of the activations of what an affine layer gives."""
        if not self.is_relu or self.kept is None:
            return self._outward(given.lower, -slack), self._outward(given.upper, slack)
        buffer = partial(self._buffer, like=given.centre, shape=tuple(given.centre.shape))
        lower = torch.sub(given.centre, given.radius, out=buffer("low"))
        upper = torch.add(
            given.centre, given.radius, out=given.centre if self.alone else buffer("high")
        )
        if given.error is not None:
            lower, upper = lower.sub_(given.error), upper.add_(given.error)
        return lower.relu_(), upper.relu_()

    def _of_windows(self, given: Windows, slack: bool) -> tuple[Tensor, Tensor]:
        """Return shift and radius of the activations of what an affine layer gives."""
        error = given.clean.error
        if not self.is_relu or self.kept is None:
            before = given.before()
            radius = given.radius if error is None else given.radius + given.cut(error)
            centre = given.shift + before
            lower = self._outward(centre - radius, -slack)
            upper = self._outward(centre + radius, slack)
            return (lower + upper) / 2 - self._function(before), (upper - lower) / 2
        buffer = partial(self._buffer, like=given.shift, shape=tuple(given.shift.shape))
        before = given.before(buffer("before"))
        most: Tensor | float = 0.0
        if error is not None:  # laid out by columns, as sums with single numbers are slow
            most = given.clean.largest_error.expand(-1, -1, -1, given.size[1])
            most = rows(most.contiguous(), given.each)
        radius = torch.add(given.radius.expand_as(given.shift), most, out=buffer("radius"))
        upper = torch.add(given.shift, before, out=buffer("high"))
        lower = torch.sub(upper, radius, out=buffer("low")).relu_()
        upper = upper.add_(radius).relu_()
        radius = torch.sub(upper, lower, out=radius).mul_(0.5)
        return lower.add_(radius).sub_(before.relu_()), radius

    def _outward(self, values: Tensor, sign: int) -> Tensor:
        """Apply the function, and move what it rounds up (1), down (-1) or not at all."""
        moved = self._function(values)
        if self._exact or not sign:
            return moved
        return moved + sign * 64 * HALF_ULP * (moved.abs() + 1e-6)

    def plain(self, *inputs: Box) -> Box:
        """Return the function of both bounds."""
        ((lower, upper),) = inputs
        return self._function(lower), self._function(upper)

    def propagate(self, clean: Clean, *inputs: Bounds) -> Bounds:
        """Return the bounds of the activations."""
        (given,) = inputs
        slack = clean.error is not None
        if isinstance(given, Centred):
            return Everywhere(clean, *self._of_centred(given, slack), given.each)
        if isinstance(given, Everywhere):
            lower, upper = self._outward(given.lower, -slack), self._outward(given.upper, slack)
            return Everywhere(clean, lower, upper, given.each)
        windows = Windows(clean, *self._of_windows(given, slack), given.starts, given.each)
        return self._on_map(windows) if slack or not self._exact else windows


class MaximumPool(Operator):
    """Max pooling: the maximum of the bounds."""

    def __init__(
        self,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> None:
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation

    def _pool(self, values: Tensor, padding: tuple[int, int]) -> Tensor:
        return functional.max_pool2d(values, self.kernel, self.stride, padding, self.dilation)

    def clean(self, *inputs: Clean) -> Clean:
        """Return the maxima; rounding moves them by no more than the largest error below them."""
        (given,) = inputs
        value = self._pool(given.value, self.padding)
        error = None if given.error is None else self._pool(given.error, self.padding)
        return Clean(value, error)

    def plain(self, *inputs: Box) -> Box:
        """Return the maxima of both bounds."""
        ((lower, upper),) = inputs
        return self._pool(lower, self.padding), self._pool(upper, self.padding)

    def propagate(self, clean: Clean, *inputs: Bounds) -> Bounds:
        """Return bounds of all maxima over the windows and the clean activations around them."""
        (given,) = inputs
        if not isinstance(given, Windows):
            lower, upper = (
                _over_pairs(partial(self._pool, padding=self.padding), bound)
                for bound in (given.lower, given.upper)
            )
            return Everywhere(clean, lower, upper, given.each)
        shape = (clean.value.shape[2], clean.value.shape[3])
        first, offsets, size, needed = reach(
            given.starts, given.size, self.kernel, self.stride, self.padding, self.dilation, shape
        )
        seen = first * torch.tensor(self.stride) - torch.tensor(self.padding)
        value = cut(given.clean.value, seen, needed, given.each, -torch.inf)
        error = (
            0.0 if given.clean.error is None else cut(given.clean.error, seen, needed, given.each)
        )
        shift = placed(given.shift, offsets, needed)
        radius = placed(given.radius, offsets, needed)
        lower, upper = (
            _over_pairs(partial(self._pool, padding=(0, 0)), bound.transpose(2, 3)).transpose(2, 3)
            for bound in (value - error + shift - radius, value + error + shift + radius)
        )
        base = cut(clean.value, first, size, given.each)
        on_map = inside_map(first, size, shape)
        shift, radius = (lower + upper) / 2 - base, (upper - lower) / 2
        if on_map is not None:  # windows that see nothing of the map hold no number
            on_map = on_map.to(shift.device)
            shift = torch.where(on_map, shift, 0.0)
            radius = torch.where(on_map, radius, 0.0)
        return Windows(clean, shift, radius, first, given.each)


class Mean(Affine):
    """The mean of each map: global average pooling, to (N, C) or (N, C, 1, 1)."""

    def __init__(self, keep: bool, terms: int) -> None:
        self._keep = keep
        self.terms = terms

    def apply(self, values: Tensor, *, absolute: bool) -> Tensor:
        """Return the means."""
        return values.mean((2, 3), keepdim=self._keep)

    def forward(self, values: Tensor) -> Tensor:
        """Return the means."""
        return values.mean((2, 3), keepdim=self._keep)

    def propagate(self, clean: Clean, *inputs: Bounds) -> Centred:
        """Return bounds of the means."""
        (given,) = inputs
        if not isinstance(given, Windows):
            return self.everywhere(clean, given)
        cells = given.clean.value[0, 0].numel()
        moved, radius = (values.sum((2, 4)) / cells for values in (given.shift, given.radius))
        if self._keep:
            moved, radius = moved[..., None, None], radius[..., None, None]
        return self._centred(clean, rows(clean.value, given.each) + moved, radius, given.each)


class Maximum(Operator):
    """The maximum of each map: global max pooling, to (N, C) or (N, C, 1, 1)."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep

    def _largest(self, values: Tensor) -> Tensor:
        return values.amax((-2, -1), keepdim=self._keep)

    def clean(self, *inputs: Clean) -> Clean:
        """Return the maxima; rounding moves them by no more than the largest error below them."""
        (given,) = inputs
        error = None if given.error is None else self._largest(given.error)
        return Clean(self._largest(given.value), error)

    def plain(self, *inputs: Box) -> Box:
        """Return the maxima of both bounds."""
        ((lower, upper),) = inputs
        return self._largest(lower), self._largest(upper)

    def propagate(self, clean: Clean, *inputs: Bounds) -> Bounds:
        """Return bounds of the maxima over the windows and the clean activations around them."""
        (given,) = inputs
        if isinstance(given, Windows):
            given = everywhere(given)
        lower, upper = self._largest(given.lower), self._largest(given.upper)
        return Everywhere(clean, lower, upper, given.each)


class Flatten(Operator):
    """Flattening to (N, features).

    Args:
        before_linear: fully connected layers alone follow, which take windows of maps as they are.
    """

    def __init__(self, before_linear: bool) -> None:
        self._before_linear = before_linear

    def clean(self, *inputs: Clean) -> Clean:
        """Flatten."""
        (given,) = inputs
        return Clean(
            given.value.flatten(1), None if given.error is None else given.error.flatten(1)
        )

    def plain(self, *inputs: Box) -> Box:
        """Flatten both bounds."""
        ((lower, upper),) = inputs
        return lower.flatten(1), upper.flatten(1)

    def propagate(self, clean: Clean, *inputs: Bounds) -> Bounds:
        """Return windows as they are before fully connected layers, and flatten other bounds."""
        (given,) = inputs
        if isinstance(given, Windows):
            return given if self._before_linear else flattened(given)
        return Everywhere(clean, given.lower.flatten(2), given.upper.flatten(2), given.each)


class Sum(Operator):
    """The sum of two branches."""

    def clean(self, *inputs: Clean) -> Clean:
        """Add up activations and errors."""
        one, other = inputs
        value = one.value + other.value
        if one.error is None or other.error is None:
            return Clean(value, None)
        rounded = 4 * HALF_ULP * (one.value.abs() + other.value.abs())
        return Clean(value, (one.error + other.error + rounded) * (1 + 4 * HALF_ULP))

    def plain(self, *inputs: Box) -> Box:
        """Add up the bounds."""
        one, other = inputs
        return one[0] + other[0], one[1] + other[1]

    def propagate(self, clean: Clean, *inputs: Bounds) -> Bounds:
        """Return bounds on windows that hold both windows."""
        one, other = inputs
        if not isinstance(one, Windows) and not isinstance(other, Windows):
            lower, upper = one.lower + other.lower, one.upper + other.upper
            if clean.error is not None:
                magnitude = torch.maximum(lower.abs(), upper.abs())
                rounded = 8 * HALF_ULP * (magnitude + rows(clean.value.abs(), one.each))
                lower, upper = lower - rounded, upper + rounded
            return Everywhere(clean, lower, upper, one.each)
        if not isinstance(one, Windows) or not isinstance(other, Windows):
            whole = [everywhere(side) if isinstance(side, Windows) else side for side in inputs]
            return self.propagate(clean, *whole)
        starts = torch.minimum(one.starts, other.starts)
        size = torch.stack(
            [side.starts + torch.tensor(side.size) - starts for side in (one, other)]
        ).amax((0, 1))
        height, width = size.tolist()
        shift, radius = (
            placed(first, one.starts - starts, (height, width))
            + placed(second, other.starts - starts, (height, width))
            for first, second in ((one.shift, other.shift), (one.radius, other.radius))
        )
        if clean.error is not None:
            radius = widened(radius, 2)
        return Windows(clean, shift, radius, starts, one.each)


def _over_pairs(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Apply a function of batches to (L, N, ...)."""
    result = function(values.flatten(0, 1))
    return result.reshape(*values.shape[:2], *result.shape[1:])


def everywhere(given: Windows) -> Everywhere:
    """Return bounds of all activations of maps, windows being part of them."""
    height, width = given.clean.value.shape[2:]
    shift = placed(given.shift, given.starts, (height, width)).transpose(2, 3)
    radius = placed(given.radius, given.starts, (height, width)).transpose(2, 3)
    centre = rows(given.clean.value, given.each) + shift
    if given.clean.error is not None:
        radius = radius + rows(given.clean.error, given.each)
    return Everywhere(given.clean, centre - radius, centre + radius, given.each)


def flattened(given: Windows) -> Everywhere:
    """Return bounds of all activations of maps as features."""
    bounds = everywhere(given)
    clean = Clean(
        given.clean.value.flatten(1),
        None if given.clean.error is None else given.clean.error.flatten(1),
    )
    return Everywhere(clean, bounds.lower.flatten(2), bounds.upper.flatten(2), given.each)


def pooled(given: Bounds, count: int) -> Bounds:
    """Return bounds that hold for each of ``count`` regions, one after the other, together.

    Bound pooling (Appendix A.3): the least lower and the largest upper bounds of the group.
    """
    each = None if given.each is None else given.each // count
    if not isinstance(given, Windows):
        lowest = given.lower.reshape(-1, count, *given.lower.shape[1:]).amin(1)
        highest = given.upper.reshape(-1, count, *given.upper.shape[1:]).amax(1)
        return Everywhere(given.clean, lowest, highest, each)
    starts = given.starts.reshape(-1, count, 2)
    first = starts.amin(1)
    offsets = starts - first[:, None]
    height, width = (offsets.amax((0, 1)) + torch.tensor(given.size)).tolist()
    members = [
        [
            placed(bound[member::count], offsets[:, member], (height, width))
            for member in range(count)
        ]
        for bound in (given.shift - given.radius, given.shift + given.radius)
    ]
    lowest, highest = reduce(torch.minimum, members[0]), reduce(torch.maximum, members[1])
    return Windows(given.clean, (lowest + highest) / 2, (highest - lowest) / 2, first, each)
