"""Running a model reproducibly, in batches that fit and that are quick."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError, RunError

_CPU_VALUES = 2**20
"""Input values of a default batch on the CPU: larger batches leave its caches."""
_GPU_VALUES = 2**24
_LARGEST_BATCH = 1024
_BETWEEN_BATCHES = 0.004
"""Seconds that choosing the next views takes, about, whatever the size of the batch."""
_TIMED = 3
"""Forward passes timed for each batch size; the quickest counts, since other work only slows."""


def model_device(model: nn.Module) -> torch.device:
    """Return where a model's parameters and buffers are (the CPU if it has none)."""
    held = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if held is None else held.device


def default_batch_size(image: Tensor, device: torch.device) -> int:
    """Return a batch size for images like ``image``, (C, H, W), by their number of values."""
    values = _CPU_VALUES if device.type == "cpu" else _GPU_VALUES
    fitting = max(8, min(_LARGEST_BATCH, values // image.numel()))
    return 1 << (fitting.bit_length() - 1)


def bytes_per_image(model: nn.Module, run: Callable[[], object]) -> int:
    """Estimate the memory that a forward pass takes for each image of a batch.

    Twice the largest input and output of any one layer: a residual connection keeps a second
    activation alive.

    Args:
        model: whose layers are measured.
        run: runs it on one image.
    """
    largest = 0

    def measure(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        tensors = [value for value in (*inputs, output) if isinstance(value, Tensor)]
        largest = max(largest, sum(value.numel() * value.element_size() for value in tensors))

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(measure) for module in leaves]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * largest


def fastest_batch_size(forward: Callable[[int], object], largest: int, device: torch.device) -> int:
    """Time batches of 8, 16, ... up to ``largest`` images and return the best size.

    The largest within 2% of the highest throughput is taken, of those that fit into memory; half
    of the first if it does not.
    """
    rates: dict[int, float] = {}
    size = min(8, largest)
    while size <= largest:
        seconds = []
        try:
            for _ in range(1 + _TIMED):
                start = time.perf_counter()
                forward(size)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            break
        rates[size] = size / (min(seconds[1:]) + _BETWEEN_BATCHES)
        size *= 2
    if not rates:
        return max(1, size // 2)
    return max(size for size, rate in rates.items() if rate >= 0.98 * max(rates.values()))


def in_fitting_batches(
    run: Callable[[Tensor, Tensor], Tensor], images: Tensor, forwards: Tensor
) -> tuple[Tensor, int]:
    """Call ``run`` on a batch, halving it as often as the device runs out of memory.

    Returns:
        The outputs of the whole batch, and the size of the batches that fit.

    Raises:
        RunError: not even one image fits.
    """
    size = len(images)
    while True:
        try:
            parts = [
                run(images[start : start + size], forwards[start : start + size])
                for start in range(0, len(images), size)
            ]
            return torch.cat(parts), size
        except torch.OutOfMemoryError as error:
            if size == 1:
                raise RunError(
                    f"out of memory on {images.device} for a single image: {error}"
                ) from error
            size = (size + 1) // 2
            if images.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(f"out of memory: batches are halved to {size} images", stacklevel=2)


def check_batch_size(batch_size: int | None) -> int | None:
    """Return a batch size of at least 1, or None for the default, or raise."""
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise PatchproofError(f"batch_size: expected images >= 1, got {batch_size!r}")
    return batch_size
