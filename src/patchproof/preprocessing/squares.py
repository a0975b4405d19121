"""Square windows of an image, and the pixels in them."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def window_means(values: Tensor, side: int) -> Tensor:
    """Return the mean of (N, 1, H, W) over each window of ``side`` x ``side`` pixels.

    Returns:
        (N, 1, H - side + 1, W - side + 1), by the first row and column of the window.
    """
    return functional.avg_pool2d(values, side, stride=1)


def pixels_in(chosen: Tensor, side: int) -> Tensor:
    """Return which pixels some chosen window contains.

    Args:
        chosen: (N, 1, H - side + 1, W - side + 1) bool, by the first row and column of the window.
        side: of the windows, in pixels.

    Returns:
        (N, 1, H, W) bool.
    """
    around = functional.pad(chosen.float(), [side - 1] * 4)
    return functional.max_pool2d(around, side, stride=1) > 0
