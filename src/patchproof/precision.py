"""Running a network so that the same pixels score the same up to the order of summation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import cudnn

_PRECISIONS = [
    getattr(library, kind)
    for library, kinds in (
        (torch.backends.cuda, ("matmul",)),
        (torch.backends.cudnn, ("conv", "rnn")),
        (torch.backends.mkldnn, ("matmul", "conv", "rnn")),
    )
    for kind in kinds
]
"""Where PyTorch holds how float32 is computed, by the library and the kind of operator."""


@contextmanager
def exact_inference(device: torch.device) -> Iterator[None]:
    """Run without gradients, autocast, TF32, bfloat16 and autotuning, whatever was set before.

    The same pixels then score the same up to the order of summation, which ``tolerance`` covers.
    """
    with (
        torch.inference_mode(),
        torch.autocast(device.type, enabled=False),
        _whole_float32(),
        _set(cudnn, enabled=True, benchmark=False, deterministic=True),
    ):
        yield


@contextmanager
def direct_inference(device: torch.device) -> Iterator[None]:
    """Run as ``exact_inference`` does, every convolution summed term by term.

    Algorithms that transform the image first (Winograd, FFT) round by far more, and let a pixel
    disturb outputs that do not see it, which bounds do not allow for. NNPACK has them, where oneDNN
    is missing, and cuDNN, of which there is no telling; what takes their place is slower.
    """
    with (
        exact_inference(device),
        torch.backends.nnpack.flags(enabled=False),
        _set(cudnn, enabled=False),
    ):
        yield


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Compute float32 as float32.

    PyTorch has an older setting for all matrix products beside one for each kind of operator; where
    the two differ it refuses to read the older one.
    """
    before = [kind.fp32_precision for kind in _PRECISIONS]
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = None
    torch.set_float32_matmul_precision("highest")
    for kind in _PRECISIONS:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        if old is not None:
            torch.set_float32_matmul_precision(old)
        for kind, precision in zip(_PRECISIONS, before, strict=True):
            kind.fp32_precision = precision


@contextmanager
def _set(module: Any, **values: bool) -> Iterator[None]:
    """Set attributes of a module for a while."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
