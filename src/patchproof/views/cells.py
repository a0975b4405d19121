"""The places of a network's last feature map as views (PatchGuard, Section 2.4)."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.threat.regions import ImageSize, check_image_size
from patchproof.views.reach import output_reach


class _CellNetwork(Protocol):
    def cell_logits(self, images: Tensor) -> Tensor: ...


class CellViews:
    """What a network's classifier says of each place of its last feature map.

    The places may see the whole image, so that one patch can change all of them: nothing is
    certified from these views. They show what a patch does to a network with large receptive
    fields. One forward pass yields all of them.

    Args:
        model: a network with ``cell_logits``, from images (N, C, H, W) to (N, classes, h, w), in
            eval mode.
        image_size: (H, W) in pixels.
        channels: of the images.

    Attributes:
        grid: (h, w), the size of the feature map; views are numbered row by row.
        count: V = h * w.
        per_forward: V.
        size: height and width in pixels of the largest box that a place can depend on, as followed
            through the network.

    Raises:
        PatchproofError: no such network.
    """

    def __init__(self, model: nn.Module, image_size: ImageSize, channels: int) -> None:
        if not callable(getattr(model, "cell_logits", None)):
            raise PatchproofError(
                "model: expected a network with cell_logits, such as small-resnet, got "
                f"{type(model).__name__}"
            )
        output, (top, left, minus_bottom, minus_right), _ = output_reach(
            _cell_logits, model, check_image_size(image_size), channels
        )
        self.grid = (output.shape[2], output.shape[3])
        self.count = self.per_forward = self.grid[0] * self.grid[1]
        self.size = (int((-minus_bottom - top).max()), int((-minus_right - left).max()))

    def evaluate(self, model: nn.Module, images: Tensor, forwards: Tensor) -> Tensor:
        """Return the logits of all places, (B, V, classes); ``forwards`` are all 0."""
        return _cell_logits(model, images).flatten(2).transpose(1, 2)


def _cell_logits(model: nn.Module, images: Tensor) -> Tensor:
    return cast(_CellNetwork, model).cell_logits(images)
