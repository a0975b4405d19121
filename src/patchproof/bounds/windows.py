"""Bounds of activations on the windows that a patch reaches, as differences to the clean image.

Outside the window of a region, an activation is the clean image's whatever the patch shows. Inside
it lies in ``clean + shift +- radius``. Where a layer is affine, shift and radius go through it
without its bias, and zeros stand for all that lies outside: only windows are computed, for many
regions at once. A window is held row by row, all channels of a row together, (h, C, w): what one
row of outputs sees then lies together in memory.

Rounding. ``clean`` is computed in float32, and so is what ``predict`` says of an attacked image.
``error`` bounds how far either is from exact arithmetic, where nothing is attacked: for a dot
product of n terms in any order of summation, and with z the clean activation,

    error' = |W| error + 2 gamma (|W| |z| + |b|) + 4 n 2^-126,     gamma = (n + 16) 2^-24.

Inside the window an attacked activation z' has |z'| <= |z| + |shift| + radius <= |z| + 2 radius, as
the clean image is one of those that the patch can show. The roundings of the network on it, and of
shift and radius themselves, together stay below ``4 gamma |W| radius`` more; ``widened`` adds that.
This holds for layers that are summed directly, and not for those that transform the image first
(Winograd, FFT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, update_wrapper
from typing import TypeVar, TypeVarTuple

import torch
from torch import Tensor
from torch.nn import functional

HALF_ULP = 2.0**-24
"""The relative rounding error of float32."""
SMALLEST = 2.0**-126
"""The rounding error of float32 where products underflow."""
MOST_TERMS = 2**17
"""Terms of a sum up to which its rounding is proportional to its length."""

_Numbers = TypeVarTuple("_Numbers")
_Result = TypeVar("_Result")
_FEW_PLACES = 64
"""Places up to which what is worked out from them is remembered."""


def remembered(
    function: Callable[[Tensor, *_Numbers], _Result],
) -> Callable[[Tensor, *_Numbers], _Result]:
    """Remember what a function makes of few places, (L, 2) int64, and of numbers.

    It is the same for each batch of images, and costs about as much as small layers do. What it
    returns must not be changed.
    """

    @lru_cache(maxsize=2**11)
    def of_few(listed: tuple[tuple[int, ...], ...], numbers: tuple[*_Numbers]) -> _Result:
        with to_remember():
            return function(torch.tensor(listed), *numbers)

    def of_any(starts: Tensor, /, *numbers: *_Numbers) -> _Result:
        if len(starts) > _FEW_PLACES:
            return function(starts, *numbers)
        return of_few(tuple(map(tuple, starts.tolist())), numbers)

    return update_wrapper(of_any, function)


@contextmanager
def to_remember() -> Iterator[None]:
    """Make tensors that can be used in any mode later, in training too."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


def gamma(terms: int) -> float:
    """Return the relative error of a float32 dot product of so many terms, with some to spare."""
    return (terms + 16) * HALF_ULP


def widening(terms: int) -> float:
    """Return the factor of radii that also hold the rounding of a dot product of so many terms."""
    return 1 + 6 * gamma(terms)


def widened(radius: Tensor, terms: int) -> Tensor:
    """Return radii that also hold the rounding of a dot product of so many terms."""
    return radius * widening(terms)


@dataclass(frozen=True, eq=False)
class Clean:
    """Activations of N clean images.

    Attributes:
        value: (N, ...) as the network computes it.
        error: (N, ...) how far rounding may move it; None if rounding is left out of account, as
            in training.
    """

    value: Tensor
    error: Tensor | None

    @property
    def flat(self) -> Tensor:
        """The activations (N, C, H, W) flattened, and a zero after the last, (N, C H W + 1)."""
        return self._flat() if self.value.requires_grad else self._kept_flat

    def _flat(self) -> Tensor:
        return functional.pad(self.value.flatten(1), (0, 1))

    @cached_property
    def _kept_flat(self) -> Tensor:
        return self._flat()

    @property
    def by_place(self) -> Tensor:
        """``flat`` by place, (C H W + 1, N)."""
        return self.flat.T.contiguous() if self.value.requires_grad else self._kept_by_place

    @cached_property
    def _kept_by_place(self) -> Tensor:
        return self._kept_flat.T.contiguous()

    @cached_property
    def largest_error(self) -> Tensor:
        """The largest error on each map of activations (N, C, H, W), (N, 1, C, 1)."""
        assert self.error is not None
        return self.error.amax((2, 3))[:, None, :, None]


@dataclass(frozen=True, eq=False)
class Windows:
    """Bounds on windows of activations (N, C, H, W), for L regions.

    Attributes:
        clean: of the clean images.
        shift: (L, N, h, C, w), the centre of the bounds minus the clean activation; (L, 1, ...) if
            each region goes with one image.
        radius: (L, N, h, C, w), or (L, 1, ...) if all images have the same.
        starts: (L, 2) int64, row and column of each window's first activation; windows may stick
            out, shift and radius are 0 there.
        each: regions of each image, in the order of the images; None if all go with all.
        known_places: ``places``, where they are known.
    """

    clean: Clean
    shift: Tensor
    radius: Tensor
    starts: Tensor
    each: int | None
    known_places: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Return (h, w) of the windows."""
        return self.shift.shape[2], self.shift.shape[4]

    @property
    def places(self) -> Tensor:
        """Which activations of flattened maps the windows are on, (L, h C w); C H W outside."""
        if self.known_places is not None:
            return self.known_places
        value = self.clean.value
        return places(value.shape[1:], self.starts, self.size).to(value.device)

    def before(self, out: Tensor | None = None) -> Tensor:
        """Return the windows of the clean activations, (L, N, h, C, w).

        Args:
            out: memory for them, where there are no gradients.
        """
        shape = self.clean.value.shape[1:]
        return cut_flat(self.clean.flat, shape, self.starts, self.size, self.each, out)

    def cut(self, values: Tensor) -> Tensor:
        """Return the windows of values (N, C, H, W), (L, N, h, C, w)."""
        return cut(values, self.starts, self.size, self.each)


@dataclass(frozen=True, eq=False)
class Everywhere:
    """Bounds of all activations (N, ...) of a layer that sees the whole image, for L regions.

    Attributes:
        clean: of the clean images.
        lower: (L, N, ...), or (L, 1, ...) if each region goes with one image.
        upper: of the same shape.
        each: regions of each image, in the order of the images; None if all go with all.
    """

    clean: Clean
    lower: Tensor
    upper: Tensor
    each: int | None


@dataclass(eq=False)
class Centred:
    """Bounds of all outputs of an affine layer, before they are added up.

    Attributes:
        clean: of the clean images.
        centre: (L, N, ...), or (L, 1, ...) if each region goes with one image.
        radius: of the same shape, or (L, 1, ...) if all images have the same.
        error: (1, N, ...), or (L, 1, ...), what rounding adds to the radius; None without slack.
        each: regions of each image, in the order of the images; None if all go with all.
    """

    clean: Clean
    centre: Tensor
    radius: Tensor
    error: Tensor | None
    each: int | None

    @cached_property
    def lower(self) -> Tensor:
        """(L, N, ...)."""
        lower = self.centre + -self.radius  # negating a radius of all images costs nothing
        return lower if self.error is None else lower.sub_(self.error)

    @cached_property
    def upper(self) -> Tensor:
        """(L, N, ...)."""
        upper = self.centre + self.radius
        return upper if self.error is None else upper.add_(self.error)


def rows(values: Tensor, each: int | None) -> Tensor:
    """Return values (N, ...) of the images so that they broadcast against bounds (L, N, ...)."""
    if each is None:
        return values[None]
    return values[:, None].expand(-1, each, *values.shape[1:]).flatten(0, 1)[:, None]


def cut(
    values: Tensor,
    starts: Tensor,
    size: tuple[int, int],
    each: int | None = None,
    outside: float = 0.0,
) -> Tensor:
    """Return windows of maps.

    Args:
        values: (N, C, H, W).
        starts: (L, 2), first row and column of each window; it may stick out of the map.
        size: (h, w) of the windows.
        each: windows of each map, in the order of the maps; None to cut all from all.
        outside: the value outside of the map.

    Returns:
        (L, N, h, C, w), or (L, 1, h, C, w) with ``each``; windows of one map may lie together.
    """
    flat = functional.pad(values.flatten(1), (0, 1), value=outside)
    return cut_flat(flat, values.shape[1:], starts, size, each)


def cut_flat(
    flat: Tensor,
    shape: torch.Size,
    starts: Tensor,
    size: tuple[int, int],
    each: int | None,
    out: Tensor | None = None,
) -> Tensor:
    """Return windows of flattened maps of a shape (C, H, W), as ``cut`` does.

    Args:
        flat: (N, C H W + 1), the value outside of the maps last.
        shape: (C, H, W).
        starts: (L, 2), first row and column of each window.
        size: (h, w) of the windows.
        each: windows of each map; None to cut all from all.
        out: memory for the result, where there are no gradients.
    """
    channels, (height, width) = shape[0], size
    index = places(shape, starts, size).to(flat.device)
    if each is not None:
        chosen = flat.gather(1, index.reshape(len(flat), -1))
        return chosen.reshape(len(starts), 1, height, channels, width)
    # of a table, whose gradient is one table for all windows
    out = None if out is None else out.view(len(flat), -1)
    chosen = torch.index_select(flat, 1, index.flatten(), out=out)
    return chosen.reshape(len(flat), len(starts), height, channels, width).transpose(0, 1)


def places(shape: tuple[int, ...], starts: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which activations of maps (C, H, W) windows are on, (L, h C w); C H W outside."""
    channels, height, width = shape
    first = _first_window((channels, height, width), size)
    place = (starts[:, 0] * width + starts[:, 1])[:, None] + first.flatten()
    inside = inside_map(starts, size, (height, width))
    if inside is None:
        return place
    on_map = inside[:, 0].expand(-1, -1, channels, -1).flatten(1)
    return place.where(on_map, channels * height * width)


@lru_cache
def _first_window(shape: tuple[int, int, int], size: tuple[int, int]) -> Tensor:
    """Return which activations of flattened maps (C, H, W) the first window is on, (h, C, w)."""
    with to_remember():
        channel, row, column = (torch.arange(length) for length in (shape[0], *size))
        return (channel[:, None] * shape[1] + row[:, None, None]) * shape[2] + column


@remembered
def inside_map(starts: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor | None:
    """Return which activations of the windows are on the map, (L, 1, h, 1, w); None if all are."""
    last = starts.amax(0) + torch.tensor(size)
    if int(starts.amin()) >= 0 and bool((last <= torch.tensor(shape)).all()):
        return None
    on_map = []
    for axis in (0, 1):
        place = starts[:, axis, None] + torch.arange(size[axis])
        on_map.append((place >= 0) & (place < shape[axis]))
    return (on_map[0][:, :, None] & on_map[1][:, None])[:, None, :, None]


@remembered
def distinct_pairs(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different rows of (n, 2) int64, and for each row which of them it is, (n,).

    ``torch.unique`` of whole rows compares them one by one.
    """
    least = pairs.amin(0)
    span = int((pairs[:, 1] - least[1]).max()) + 1
    number, which = torch.unique((pairs - least) @ torch.tensor([span, 1]), return_inverse=True)
    return torch.stack([number // span, number % span], 1) + least, which


def placed(values: Tensor, offsets: Tensor, size: tuple[int, int]) -> Tensor:
    """Return windows (L, N, h, C, w) inside larger ones of zeros, each at its offset (L, 2).

    What lies beyond the size is cut off.
    """
    distinct, which = distinct_pairs(offsets)
    parts = [
        padded(values if len(distinct) == 1 else values[which == number], (top, left), size)
        for number, (top, left) in enumerate(distinct.tolist())
    ]
    return in_order(parts, which)


def padded(values: Tensor, offset: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return windows (..., h, C, w) inside zeros of ``size``, cut off where they stick out."""
    (top, left), (height, width) = offset, size
    rows_, channels, columns = values.shape[-3:]
    if not (-rows_ < top < height and -columns < left < width):
        return values.new_zeros(*values.shape[:-3], height, channels, width)
    around = (left, width - left - columns, 0, 0, top, height - top - rows_)
    return functional.pad(values, around)


def in_order(parts: list[Tensor], which: Tensor) -> Tensor:
    """Join parts of L windows, where ``which`` (L,) says in which part each is."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[which.argsort(stable=True).argsort()]
