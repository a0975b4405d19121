"""Running a network so that the same pixels score the same up to the order of summation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_inference(device: torch.device) -> Iterator[None]:
    """Run without gradients, autocast, TF32 and autotuning.

    The same pixels then score the same up to the order of summation, which ``tolerance`` covers.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.inference_mode(),
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


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
        torch.backends.cudnn.flags(enabled=False, allow_tf32=False),
    ):
        yield
