"""Which box of pixels each value inside a network can depend on, operation by operation.

A network runs once on tensors without values. Beside every tensor that comes from the image goes
the reach of each of its elements: a box of pixels outside which nothing has an influence, whatever
the weights and the pixels are. Operations that are not known here are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from patchproof.errors import PatchproofError

Reach = tuple[Tensor, ...]
"""First row, first column, minus end row, minus end column of the half-open box of each element.

Each has the dimensions of the tensor that it is about, of size 1 where all elements agree. Joining
boxes is the minimum of each of the four; +inf is a box without pixels.
"""

Part = Callable[[Any], Tensor | None]
"""One of the four numbers of a tensor's reach; None for a tensor that is the same for all images.

The rules below work on one number at a time.
"""
Rule = Callable[[Any, Part, tuple[Any, ...], dict[str, Any], Any], Tensor | list[Tensor]]
"""From an operation, the parts, its arguments and its outputs to the part of the outputs."""


def output_reach(
    run: Callable[[nn.Module, Tensor], Any],
    model: nn.Module,
    image_size: tuple[int, int],
    channels: int,
) -> tuple[Tensor, Reach, str | None]:
    """Follow an image through a network.

    Args:
        run: calls the network, or one of its methods, on images (1, C, H, W).
        model: the network, in eval mode; it is copied, not changed.
        image_size: (H, W) in pixels.
        channels: C.

    Returns:
        The output, without values; its reach; and the first layer of which an output can depend on
        the whole image, None if there is none.

    Raises:
        PatchproofError: an operation that is not known, or values that decide what is computed; the
            message names the layer.
    """
    network = copy.deepcopy(model).to("meta", torch.float32)
    image = torch.empty(1, channels, *image_size, device="meta")
    tracer = _Tracer(image, image_size)
    try:
        with torch.no_grad(), tracer.naming_layers(network), tracer:
            output = run(network, image)
    except PatchproofError:
        raise
    except Exception as error:
        raise tracer.refusal(
            "an operation", f"it fails for tensors without values ({_line(error)})"
        ) from error
    if not isinstance(output, Tensor) or output not in tracer.reach:
        raise PatchproofError(
            "receptive fields: expected logits that the network computes from the image, got "
            f"{type(output).__name__}"
        )
    tracer.check_current(output, "the output")
    return output, tracer.reach[output], tracer.sees_everything


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Carry the reach along while a network runs."""

    def __init__(self, image: Tensor, image_size: tuple[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.layer = [""]
        self.sees_everything: str | None = None
        height, width = image_size
        rows = torch.arange(height, dtype=torch.float64).view(1, 1, -1, 1)
        columns = torch.arange(width, dtype=torch.float64).view(1, 1, 1, -1)
        self.reach: Any = WeakTensorKeyDictionary()
        self.reach[image] = (rows, columns, -rows - 1, -columns - 1)
        self._whole = (0, 0, -height, -width)
        self._written: dict[int, tuple[Any, int]] = {}
        self._version: Any = WeakTensorKeyDictionary()

    @contextmanager
    def naming_layers(self, network: nn.Module) -> Iterator[None]:
        """Know which layer runs."""

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self.layer.append(name)

        def leave(*_: object) -> None:
            self.layer.pop()

        hooks = []
        for name, module in network.named_modules():
            hooks.append(module.register_forward_pre_hook(enter(name)))
            hooks.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def refusal(self, operation: str, reason: str) -> PatchproofError:
        """Return the error that names the layer that runs."""
        return PatchproofError(
            "receptive fields: expected operations that see a known part of the image, got "
            f"{operation} in {self._where()}: {reason}"
        )

    def check_current(self, tensor: Tensor, operation: str) -> None:
        """Raise if a tensor was written to since its reach was found."""
        if self._version.get(tensor, 0) != self._written.get(_storage(tensor), (None, 0))[1]:
            raise self.refusal(operation, "its input was changed in place through another tensor")

    def _where(self) -> str:
        return f"layer {self.layer[-1]!r}" if self.layer[-1] else "the network itself"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and find the reach of its outputs."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self.check_current(tensor, name)
        if name in _OF_SHAPES.split() or not any(tensor in self.reach for tensor in inputs):
            return func(*args, **kwargs)
        in_place = name.endswith("_") and not name.endswith("__")
        rule = _RULES.get(name.rstrip("_")) if func.namespace == "aten" else None
        writes = in_place or func._schema.is_mutable
        if rule is None or (writes and (rule is not _elementwise or "out" in kwargs)):
            raise self.refusal(
                name, "it is not known to be local, or what it computes depends on values"
            )
        outputs = func(*args, **kwargs)
        listed = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        parts: list[list[Tensor]] = []
        for number in range(4):

            def part(tensor: Any, number: int = number) -> Tensor | None:
                reach = self.reach.get(tensor) if isinstance(tensor, Tensor) else None
                return None if reach is None else reach[number]

            try:
                found = rule(func, part, args, kwargs, outputs)
            except (_UnknownError, RuntimeError, IndexError) as error:
                raise self.refusal(name, _line(error)) from error
            parts.append([found] * len(listed) if isinstance(found, Tensor) else found)
        for place, output in enumerate(listed):
            reach = tuple(found[place] for found in parts)
            if in_place:
                self._note_write(output, reach)
            self.reach[output] = reach
            self._version[output] = self._written.get(_storage(output), (None, 0))[1]
        if self.sees_everything is None:
            whole = (p <= side for p, side in zip(self.reach[listed[0]], self._whole, strict=True))
            if reduce(torch.logical_and, whole).any():
                self.sees_everything = self._where()
        return outputs

    def _note_write(self, target: Tensor, reach: Reach) -> None:
        """Void what is known of other tensors that share memory with the one written to."""
        before = self.reach.get(target)
        if before is None or any(
            (old != new).any() for old, new in zip(before, reach, strict=True)
        ):
            storage = target.untyped_storage()
            _, version = self._written.get(_storage(target), (None, 0))
            self._written[_storage(target)] = (storage, version + 1)  # held, so that ids stay apart


class _UnknownError(Exception):
    """An operation that the rules do not cover."""


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Return an argument by the name in the operation's schema, or its default."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[place] if place < len(args) else kwargs.get(name, argument.default_value)
    return None


def _only_first(part: Part, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the part of the first argument, where weights must not depend on the image."""
    first, *others = (part(leaf) for leaf in tree_leaves((args, kwargs)))
    if first is None or any(other is not None for other in others):
        raise _UnknownError("weights depend on the image")
    return first


def _spread(part: Tensor, size: tuple[int, ...]) -> Tensor:
    """Write the last two dimensions out."""
    return part.expand(*part.shape[:-2], *size[-2:])


def _elementwise(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    parts = [part(leaf) for leaf in tree_leaves((args, kwargs))]
    found = reduce(torch.minimum, [p for p in parts if p is not None])
    output = outputs if isinstance(outputs, Tensor) else outputs[0]
    return found.view(*[1] * (output.ndim - found.ndim), *found.shape)  # constants may have more


def _rearranged(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> list[Tensor]:
    """Rearrange the boxes as the elements are."""
    first = _only_first(part, args, kwargs).expand(args[0].shape)
    if func.overloadpacket.__name__ in ("view", "_unsafe_view"):
        moved = first.reshape(outputs.shape)
    else:
        moved = func(first, *args[1:], **kwargs)
    return [_agreeing(leaf) for leaf in tree_leaves(moved)]


def _agreeing(part: Tensor) -> Tensor:
    """Return dimensions along which all elements are one in memory as of size 1."""
    for dim, (size, stride) in enumerate(zip(part.shape, part.stride(), strict=True)):
        if size > 1 and stride == 0:
            part = part.narrow(dim, 0, 1)
    return part


def _reduced(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    if len(args) > 1 and isinstance(args[1], Tensor):  # max and min of two tensors
        return _elementwise(func, part, args, kwargs, outputs)
    first = _only_first(part, args, kwargs)
    dims = _argument(func, args, kwargs, "dim")
    output = outputs if isinstance(outputs, Tensor) else outputs[0]
    if dims is None or dims == []:
        dims = list(range(first.ndim))
    return first.amin(dims, keepdim=output.ndim == args[0].ndim)


def _mixed_along(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    """All elements along a dimension see what any of them saw."""
    return _only_first(part, args, kwargs).amin(_argument(func, args, kwargs, "dim"), keepdim=True)


def _layer_norm(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    first = _only_first(part, args, kwargs)
    return first.amin([-1 - place for place in range(len(args[1]))], keepdim=True)


def _group_norm(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> list[Tensor]:
    everything = _only_first(part, args, kwargs).amin()
    return [everything.reshape([1] * output.ndim) for output in outputs]


def _batch_norm(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> list[Tensor]:
    first = _only_first(part, args, kwargs)
    everything = first.amin()
    training = args[5]
    return [everything.expand([1] * first.ndim) if training else first, everything, everything]


def _product(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    """Matrix products, of the last two arguments, with what is added first."""
    *added, left, right = (part(factor) for factor in args)
    found = [
        *added,
        None if left is None else left.amin(-1, keepdim=True),
        None if right is None else right.amin(-2, keepdim=True),
    ]
    return reduce(torch.minimum, [p for p in found if p is not None])


def _convolution(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    image, weight, _, stride, padding, dilation, transposed = args[:7]
    if transposed or image.ndim != 4:
        raise _UnknownError("of convolutions, only those from planes to planes are known")
    seen = _spread(_only_first(part, args, kwargs), image.shape).amin(1, keepdim=True)
    return _windows(seen, weight.shape[2:], stride, padding, dilation, outputs.shape)


def _pool(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    output = outputs if isinstance(outputs, Tensor) else outputs[0]
    kernel, stride, padding, dilation = (
        _argument(func, args, kwargs, name)
        for name in ("kernel_size", "stride", "padding", "dilation")
    )
    seen = _spread(_only_first(part, args, kwargs), args[0].shape)
    return _windows(seen, kernel, stride or kernel, padding, dilation or 1, output.shape)


def _windows(
    part: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, output: tuple[int, ...]
) -> Tensor:
    """Join the boxes in each window; padding sees nothing."""
    sides = []
    values = [
        [number, number] if isinstance(number, int) else list(number) * (3 - len(number))
        for number in (kernel, stride, padding, dilation)
    ]
    for k, s, p, d, before, after in zip(*values, part.shape[-2:], output[-2:], strict=True):
        needed = (after - 1) * s + d * (k - 1) + 1
        sides.append([p, needed - before - p])
    padded = functional.pad(part, (*sides[1], *sides[0]), value=torch.inf)
    kernels, strides, _, dilations = values
    return -functional.max_pool2d(-padded, kernels, strides, 0, dilations)


def _adaptive_pool(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    output = outputs if isinstance(outputs, Tensor) else outputs[0]
    seen = _spread(_only_first(part, args, kwargs), args[0].shape)
    return -functional.adaptive_max_pool2d(-seen, output.shape[-2:])


def _resized(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    """Find out which rows and columns the resize itself mixes, by planting NaN."""
    seen = _spread(_only_first(part, args, kwargs), args[0].shape)
    for dim in (2, 3):
        side = seen.shape[dim]
        planted = torch.zeros(side, 1, *args[0].shape[2:], dtype=torch.float64)
        planted.diagonal(dim1=0, dim2=dim).fill_(torch.nan)
        marks = func(planted, *args[1:], **kwargs).isnan().amax((1, 5 - dim))  # (from, to)
        lines = seen.movedim(dim, -1).unsqueeze(-1).where(marks, torch.inf)
        seen = lines.amin(-2).movedim(-1, dim)
    return seen


def _padded(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    seen = _only_first(part, args, kwargs)
    sides = list(args[1])
    shape = list(seen.shape)
    for place, (before, after) in enumerate(zip(sides[::2], sides[1::2], strict=True)):
        if before or after:
            shape[-1 - place] = args[0].shape[-1 - place]
    return functional.pad(seen.expand(shape), sides, value=torch.inf)


def _joined(
    func: Any, part: Part, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
) -> Tensor:
    """Concatenation or stacking."""
    dim = _argument(func, args, kwargs, "dim") % outputs.ndim
    stacked = func.overloadpacket.__name__ == "stack"
    parts, sizes = [], []
    for tensor in args[0]:
        found = part(tensor)
        if found is None:
            found = torch.full([1] * tensor.ndim, torch.inf, dtype=torch.float64)
        parts.append(found.unsqueeze(dim) if stacked else found)
        sizes.append(1 if stacked else tensor.shape[dim])
    if max(sizes) > 1 and all(p.shape[dim] == 1 for p in parts):  # channels see the same
        return reduce(torch.minimum, parts)
    shape = reduce(torch.minimum, [p.narrow(dim, 0, 1) for p in parts]).shape
    return torch.cat(
        [
            p.expand(*shape[:dim], size, *shape[dim + 1 :])
            for p, size in zip(parts, sizes, strict=True)
        ],
        dim,
    )


_ELEMENTWISE = """
    abs add addcmul bitwise_and bitwise_not bitwise_or bitwise_xor clamp clamp_max clamp_min clone
    copy cos div elu eq erf exp expm1 fill floor floor_divide ge gelu gt hardsigmoid hardswish
    hardtanh isfinite isinf isnan le leaky_relu lerp log log1p log_sigmoid_forward logical_and
    logical_not logical_or logical_xor lt masked_fill maximum minimum mish mul nan_to_num ne neg pow
    _prelu_kernel reciprocal relu relu6 round rsqrt rsub sgn sigmoid sign silu sin softplus sqrt
    square sub tan tanh threshold _to_copy trunc where
"""
_REARRANGING = """
    alias detach expand flip lift_fresh permute pixel_shuffle pixel_unshuffle reflection_pad2d
    repeat replication_pad2d roll select slice split split_with_sizes squeeze t transpose unbind
    _unsafe_view unsqueeze view
"""
_REDUCING = "all amax amin any argmax argmin max mean min std sum var"
_MIXING = "cumsum _log_softmax _safe_softmax _softmax"
_RESIZING = """
    upsample_bicubic2d upsample_bilinear2d upsample_nearest2d _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa _upsample_nearest_exact2d
"""
_OF_SHAPES = "empty_like full_like new_empty new_full new_ones new_zeros ones_like zeros_like"
"""Operations that read the size of a tensor alone."""
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REARRANGING.split(), _rearranged),
    **dict.fromkeys(_REDUCING.split(), _reduced),
    **dict.fromkeys(_MIXING.split(), _mixed_along),
    **dict.fromkeys(_RESIZING.split(), _resized),
    **dict.fromkeys(["mm", "bmm", "addmm", "baddbmm"], _product),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
    "convolution": _convolution,
    "max_pool2d_with_indices": _pool,
    "avg_pool2d": _pool,
    "_adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool,
    "constant_pad_nd": _padded,
    "cat": _joined,
    "stack": _joined,
}
"""What is known of ATen's operations, by their names; in place they are the same."""
