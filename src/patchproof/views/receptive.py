"""Receptive fields of local features: computed from the network, confirmed by running it.

PatchGuard (Section 3.3) counts the features that a patch can corrupt from the receptive field's
size and stride. Both are properties of the network, never of its name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.threat.regions import ImageSize, PixelSets, check_image_size
from patchproof.views.reach import output_reach

_PLANTED_PIXELS = 2**16
"""Pixels of all images in which rows are planted, and of those in which columns are, which is
enough for every line of a 32x32 image."""
_FEWEST_PLANTED = 4
"""Images in which rows, and in which columns are planted, however large they are."""
_PIXELS_AT_ONCE = 2**15
"""Pixels of the images in a batch."""


@dataclass(frozen=True, eq=False)
class ReceptiveFields:
    """The box of pixels that each of h x w local features sees.

    Attributes:
        image_size: (H, W) in pixels.
        rows: (h, 2) int64, the half-open rows [first, end) that a feature of each feature row sees.
        columns: (w, 2) int64, likewise.
    """

    image_size: ImageSize
    rows: Tensor
    columns: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w), the size of the feature map."""
        return len(self.rows), len(self.columns)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the largest receptive field in pixels."""
        return _size(self.rows), _size(self.columns)

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels between neighbouring features, down and across; the most where they differ."""
        return _stride(self.rows), _stride(self.columns)

    @property
    def offset(self) -> tuple[int, int]:
        """Top and left of the first receptive field, were it whole: negative with padding."""
        return _offset(self.rows), _offset(self.columns)

    def window(self, patch: tuple[int, int]) -> tuple[int, int]:
        """Return the most features that a patch can corrupt, down and across.

        ceil((p + r - 1) / s) for a patch of p pixels, a receptive field of r and a stride of s
        (PatchGuard, Equation 1), but no more than there are.

        Args:
            patch: height and width of the patch in pixels.
        """
        height, width = (
            min(-(-(p + r - 1) // s), count)
            for p, r, s, count in zip(patch, self.size, self.stride, self.grid, strict=True)
        )
        return height, width

    def pixels(self) -> PixelSets:
        """Return the pixels that each of the h * w features sees, row by row."""
        inside = []
        for fields, length in zip((self.rows, self.columns), self.image_size, strict=True):
            pixel = torch.arange(length)
            inside.append((pixel >= fields[:, :1]) & (pixel < fields[:, 1:]))
        down = PixelSets.of(inside[0][:, :, None])
        across = PixelSets.of(inside[1][:, None, :])
        cells = down.cells[:, None] & across.cells[None]
        return PixelSets(down.rows, across.columns, cells.flatten(0, 1))


def receptive_fields(model: nn.Module, image_size: ImageSize, channels: int) -> ReceptiveFields:
    """Compute what each local feature sees, and confirm it by planting NaN in the image.

    The boxes are followed through every operation of ``model.local_logits``. A float64 copy then
    runs on images of which some rows or columns of pixels are NaN, two receptive fields apart; only
    features may become NaN that see one of them. (The converse need not be: comparisons can swallow
    a NaN.) Every row and column is planted once, but of large images only as many as there is time
    for.

    Args:
        model: a network with ``local_logits``, from images (N, C, H, W) to (N, classes, h, w), in
            eval mode.
        image_size: (H, W) in pixels.
        channels: C.

    Raises:
        PatchproofError: no such network; an operation whose reach is not known; or a feature that
            sees the whole image. The last two name the layer.
    """
    size = check_image_size(image_size)
    if not callable(getattr(model, "local_logits", None)):
        raise PatchproofError(
            "model: expected a network with local_logits, such as a BagNet, got "
            f"{type(model).__name__}"
        )
    if model.training:
        raise PatchproofError("model: expected eval mode, got training mode: call model.eval()")
    output, reach, sees_everything = output_reach(_local_logits, model, size, channels)
    if output.ndim != 4 or output.shape[0] != 1:
        raise PatchproofError(
            "model: expected local logits of shape (1, classes, h, w) for one image, got "
            f"{tuple(output.shape)}"
        )
    top, left, minus_bottom, minus_right = (
        part.expand(output.shape).amin((0, 1)) for part in reach
    )
    rows = _intervals(top.amin(1), minus_bottom.amin(1))
    columns = _intervals(left.amin(0), minus_right.amin(0))
    fields = ReceptiveFields(size, rows, columns)
    if fields.size == size:
        raise PatchproofError(
            "model: expected local features that each see a part of the image, got one that sees "
            f"all {size[0]}x{size[1]} pixels, as outputs of {sees_everything} do"
        )
    _confirm(model, fields, channels)
    return fields


def planted(model: nn.Module, image_size: ImageSize, channels: int, pixels: Tensor) -> Tensor:
    """Tell which local features become NaN where pixels are, in float64.

    Args:
        model: a network with ``local_logits``.
        image_size: (H, W) in pixels.
        channels: C.
        pixels: (S, H, W) bool, the pixels planted in each of S runs, in all channels.

    Returns:
        (S, h, w) bool.
    """
    network = copy.deepcopy(model).double()
    device = next(network.parameters(), torch.empty(0)).device
    batch = max(1, _PIXELS_AT_ONCE // (image_size[0] * image_size[1]))
    marks = []
    with torch.inference_mode():
        for part in torch.split(pixels.to(device), batch):
            images = torch.full(
                (len(part), channels, *image_size), 0.5, dtype=torch.float64, device=device
            ).masked_fill(part[:, None], torch.nan)
            marks.append(_local_logits(network, images).isnan().any(1))
    return torch.cat(marks).cpu()


def _local_logits(model: Any, images: Tensor) -> Tensor:
    logits: Tensor = model.local_logits(images)
    return logits


def _confirm(model: nn.Module, fields: ReceptiveFields, channels: int) -> None:
    """Raise if a planted NaN marks a feature whose receptive field does not hold it."""
    height, width = fields.image_size
    seen = fields.pixels().pixels()
    for pixels in _plants(fields):
        marks = planted(model, fields.image_size, channels, pixels).flatten(1)
        reached = (pixels.flatten(1).float() @ seen.flatten(1).float().T) > 0
        if (marks & ~reached).any():
            run, feature = (marks & ~reached).nonzero()[0].tolist()
            row, column = (pixels[run].nonzero()[0]).tolist()
            raise PatchproofError(
                "receptive fields: expected a change of pixel "
                f"({row}, {column}) of {height}x{width} to leave feature {feature} as it is, which "
                "does not see it by the network's layers, but it does not"
            )


def _plants(fields: ReceptiveFields) -> Iterator[Tensor]:
    """Yield sets of rows, then sets of columns to plant, (S, H, W) bool."""
    height, width = fields.image_size
    most = max(_FEWEST_PLANTED, _PLANTED_PIXELS // (height * width))
    for dim, (length, size) in enumerate(zip(fields.image_size, fields.size, strict=True)):
        apart = min(length, 2 * size)
        first = torch.linspace(0, apart - 1, min(apart, most)).round().long()
        lines = torch.arange(length) % apart == first[:, None]
        yield lines.unsqueeze(2 - dim).expand(-1, height, width)


def _intervals(first: Tensor, minus_end: Tensor) -> Tensor:
    """Return (n, 2) int64 half-open intervals; [0, 0) where nothing is seen."""
    intervals = torch.stack([first, -minus_end], 1)
    return intervals.masked_fill(first.isinf()[:, None], 0).long()


def _size(fields: Tensor) -> int:
    return int((fields[:, 1] - fields[:, 0]).max())


def _stride(fields: Tensor) -> int:
    """Return the most that either end moves from one feature to the next: borders cut some off."""
    return max(1, int(fields.diff(dim=0).max())) if len(fields) > 1 else 1


def _offset(fields: Tensor) -> int:
    place = int((fields[:, 1] - fields[:, 0]).argmax())
    return int(fields[place, 0]) - place * _stride(fields)
