"""What patches may show: boxes of pixels at many places."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchproof.bounds.windows import Clean, Windows, inside_map, places

if TYPE_CHECKING:
    from patchproof.threat.regions import Regions


@dataclass(frozen=True, eq=False)
class PatchBoxes:
    """What L patches of one size may show: any values within ``epsilon`` of the image's, in [0, 1].

    Attributes:
        starts: (L, 2) int64, top row and left column of each.
        size: (h, w) in pixels.
        each: how many belong to each image, in the order of the images; None if all to all.
        shape: (L, h, w) bool, which pixels of the window belong to the patch; None for all.
        epsilon: 1 for any content; less while training warms up.
        joined: how many regions, one after the other, are bounded as one from the first layer on,
            how many of these from the second on, and so forth (Appendix A.3).
        places: (L, h C w) int64, the pixels of flattened images that they are on, where known.
    """

    starts: Tensor
    size: tuple[int, int]
    each: int | None = None
    shape: Tensor | None = None
    epsilon: float = 1.0
    joined: tuple[int, ...] = ()
    places: Tensor | None = None

    def on(self, image_shape: tuple[int, int, int]) -> PatchBoxes:
        """Return them with their places on images (C, H, W), cut off where they stick out."""
        shape = self.shape
        inside = inside_map(self.starts, self.size, image_shape[1:])
        if inside is not None:
            shape = inside[:, 0, :, 0] if shape is None else shape & inside[:, 0, :, 0]
        return replace(self, shape=shape, places=places(image_shape, self.starts, self.size))

    def choose(self, chosen: Tensor) -> PatchBoxes:
        """Return some of the patches, by (n,) indices, for all images."""
        return replace(
            self,
            starts=self.starts[chosen],
            shape=None if self.shape is None else self.shape[chosen],
            places=None if self.places is None else self.places[chosen],
        )


def patch_boxes(regions: Regions) -> list[tuple[Tensor, PatchBoxes]]:
    """Return patch regions by the size of the box around them: their indices, and the boxes."""
    parts = regions.parts
    used = parts[..., 2] > 0
    huge = torch.iinfo(torch.int64).max
    first = torch.where(used[..., None], parts[..., :2], huge).amin(1)
    end = torch.where(used[..., None], parts[..., :2] + parts[..., 2:], 0).amax(1)
    sizes, which = torch.unique(end - first, dim=0, return_inverse=True)
    found = []
    for number, (height, width) in enumerate(sizes.tolist()):
        places = (which == number).nonzero().squeeze(1)
        shape = torch.zeros(len(places), height, width, dtype=torch.bool)
        rows_, columns = torch.arange(height)[:, None], torch.arange(width)
        for box in (parts[places] - torch.cat([first, 0 * first], 1)[places, None]).unbind(1):
            top, left, high, wide = (box[:, axis, None, None] for axis in range(4))
            shape |= (
                (rows_ >= top) & (rows_ < top + high) & (columns >= left) & (columns < left + wide)
            )
        boxes = PatchBoxes(
            first[places], (height, width), shape=None if bool(shape.all()) else shape
        )
        found.append((places, boxes))
    return found


def pixel_bounds(clean: Clean, boxes: PatchBoxes) -> Windows:
    """Return the bounds of the pixels, around the middle of what the patch may show."""
    images = clean.value
    count, channels, height, width = images.shape
    if boxes.places is None:
        boxes = boxes.on((channels, height, width))
    assert boxes.places is not None
    rows, columns = boxes.size
    index = boxes.places.to(images.device)
    if boxes.each is None:
        before = torch.index_select(clean.by_place, 0, index.flatten())
        before = before.reshape(len(index), rows, channels, columns, count).permute(0, 4, 1, 2, 3)
    else:
        before = clean.flat.gather(1, index.reshape(count, -1))
        before = before.reshape(len(index), 1, rows, channels, columns)
    if boxes.epsilon >= 1:
        shift = 0.5 - before
        radius = before.new_full((len(boxes.starts), 1, rows, channels, columns), 0.5)
    else:
        lower = (before - boxes.epsilon).clamp(min=0)
        upper = (before + boxes.epsilon).clamp(max=1)
        shift, radius = (lower + upper) / 2 - before, (upper - lower) / 2
    if boxes.shape is not None:
        shape = boxes.shape[:, None, :, None].to(images.device)
        shift, radius = shift * shape, radius * shape
    return Windows(clean, shift, radius, boxes.starts, boxes.each, index)
