"""A pretended accelerator: its memory is the CPU's, but its tensors do not mix with the CPU's.

It stands in for a GPU where there is none: what would fail on one for a tensor that was left on the
CPU fails here. Importing this changes the whole process: ``torch.inference_mode`` does without its
bookkeeping, which such tensors lack, and ``torch.tensor`` makes them by a copy.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("pretended", backend_module=_Backend())
DEVICE = torch.device("pretended:0")
_MAY_MIX = {
    "aten::_to_copy",
    "aten::copy_",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
}
"""Operators of two devices: copies, and indices, which may lie on the CPU."""


class Held(Tensor):
    """A tensor of the pretended device, around one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})


def run(operator, args, kwargs):
    """Run an operator on what the tensors hold, if they are of one device."""
    name = operator._schema.name
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    here = [isinstance(value, Held) for value in tensors]
    left = [value for value in tensors if not isinstance(value, Held) and value.ndim]
    if any(here) and left and name not in _MAY_MIX:
        raise RuntimeError(f"{name}: a tensor of shape {tuple(left[0].shape)} is on the CPU")
    if any(here) and name.startswith("aten::index") and not here[0]:
        raise RuntimeError(f"{name}: a tensor on the CPU is indexed from the device")
    if name == "aten::copy_":
        _held(args[0]).copy_(_held(args[1]))
        return args[0]
    given, named = tree_map(_held, args), tree_map(_held, kwargs)
    ours = any(here)
    if kwargs.get("device") is not None:
        ours = torch.device(kwargs["device"]).type == DEVICE.type
        named["device"] = torch.device("cpu")
    result = operator(*given, **named)
    for number, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[number] if number < len(args) else kwargs[argument.name]
    return tree_map(
        lambda value: Held(value) if ours and isinstance(value, Tensor) else value, result
    )


def _held(value):
    return value.held if isinstance(value, Held) else value


def _fall_back(operator, *args, **kwargs):
    return run(operator, args, kwargs)


def _no_bookkeeping(mode=True):
    if callable(mode):
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else nullcontext()


def _tensor(data, *, device=None, _make=torch.tensor, **options):
    made = _make(data, **options)
    return made if device is None else made.to(device)


def _arange(start, end, step=1, *, dtype=None, layout=None, device=None, pin_memory=None):
    return Held(torch.arange(start, end, step, dtype=dtype))


_OTHERS = torch.library.Library("_", "IMPL")
_OTHERS.fallback(_fall_back, "PrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")  # which would resize a tensor
_ATEN.impl("arange", lambda end, **options: _arange(0, end, **options), "PrivateUse1")
_ATEN.impl("arange.start", _arange, "PrivateUse1")
_ATEN.impl("arange.start_step", _arange, "PrivateUse1")
torch.inference_mode = _no_bookkeeping
torch.tensor = _tensor
torch.autograd.set_multithreading_enabled(False)  # else gradients have a thread of the device
