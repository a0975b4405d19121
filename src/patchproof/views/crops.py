"""Crops of the image: where they are, how they are drawn, and which ones a patch meets."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.models.crops import CropNetwork, CropSize, check_crop_size, cut
from patchproof.precision import exact_inference
from patchproof.results import Corruption, distinct_rows
from patchproof.threat import Regions, Threat
from patchproof.threat.regions import Box, ImageSize
from patchproof.threat.shapes import boxes_of, pixels_of

_MOST_DRAWN = 20_000
"""Crops of a draw: of more than there are places only few are new."""


class CropPlaces:
    """Every place of a crop of one size in an image; place p is row p // w and column p % w.

    Args:
        image_size: (H, W) in pixels.
        crop_size: side of the crops, or (height, width), in pixels.

    Attributes:
        image_size: (H, W).
        crop_size: (height, width).
        grid: (h, w) of the places, (H - height + 1, W - width + 1).
        count: V = h * w (Equation 3).

    Raises:
        PatchproofError: crops larger than the image.
    """

    def __init__(self, image_size: ImageSize, crop_size: int | CropSize) -> None:
        self.image_size = image_size
        self.crop_size = check_crop_size(crop_size, image_size)
        self.grid = (
            image_size[0] - self.crop_size[0] + 1,
            image_size[1] - self.crop_size[1] + 1,
        )
        self.count = math.prod(self.grid)

    def corners(self, places: Tensor) -> Tensor:
        """Return the top left pixel of each place, (..., 2) int64, of (...) int64."""
        return torch.stack([places // self.grid[1], places % self.grid[1]], -1)

    def check_number(self, name: str, number: object, replacement: bool) -> int:
        """Return a number of crops that can be drawn, or raise ``PatchproofError``."""
        most = _MOST_DRAWN if replacement else self.count
        if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= most:
            return number
        why = "" if replacement else " places, without replacement"
        raise PatchproofError(f"{name}: expected a number from 1 to {most:,}{why}, got {number!r}")

    def draw(
        self, images: int, number: int, replacement: bool, generator: np.random.Generator
    ) -> Tensor:
        """Draw places uniformly, (images, number) int64.

        Args:
            images: how many draws, each independent of the others.
            number: of crops in each.
            replacement: whether a draw may hold a place twice.
            generator: of the random numbers.
        """
        if replacement:
            return torch.from_numpy(generator.integers(self.count, size=(images, number)))
        every = np.tile(np.arange(self.count), (images, 1))
        return torch.from_numpy(generator.permuted(every, axis=1)[:, :number].copy())

    def meeting(self, regions: Regions) -> Regions:
        """Return the places whose crops meet each patch region, as regions of the grid.

        A crop meets a pixel if it begins less than its own size before it, or there (Equations 2
        and 7 count these for a rectangle at the centre). Regions of one shape meet the same places
        but for where they are, and those that the image has not.

        Args:
            regions: R regions of the image.
        """
        parts, used = regions.parts, regions.parts[..., 2:3] > 0
        corner = torch.where(used, parts[..., :2], max(self.image_size)).amin(1, keepdim=True)
        shapes = torch.cat([parts[..., :2] - corner, parts[..., 2:]], -1) * used
        distinct, which = torch.unique(shapes.flatten(1), dim=0, return_inverse=True)
        grown = [self._grown(shape) for shape in distinct.view(-1, *shapes.shape[1:])]
        most = max(map(len, grown))
        boxes = torch.stack([functional.pad(some, (0, 0, 0, most - len(some))) for some in grown])
        boxes = boxes[which]
        first = boxes[..., :2] + corner - torch.tensor(self.crop_size) + 1
        last = torch.minimum(first + boxes[..., 2:], torch.tensor(self.grid))
        first = first.clamp(min=0)
        inside = ((last > first).all(-1) & (boxes[..., 2] > 0))[..., None]
        return Regions(self.grid, torch.cat([first, last - first], -1) * inside)

    def _grown(self, shape: Tensor) -> Tensor:
        """Return where crops begin that meet a shape of boxes (B, 4), as disjoint boxes (b, 4).

        A crop that begins at the corner of the shape's smallest box is at the crop's size less one.
        """
        boxes = [Box(*box) for box in shape.tolist() if box[2]]
        height = max(box.top + box.height for box in boxes)
        width = max(box.left + box.width for box in boxes)
        rows, columns = self.crop_size
        pixels = pixels_of(boxes, (height, width)).float()[None, None]
        around = functional.pad(pixels, (columns - 1, columns - 1, rows - 1, rows - 1))
        met = functional.max_pool2d(around, self.crop_size, 1)[0, 0] > 0
        return torch.tensor(boxes_of(met))


def box_sums(values: Tensor, boxes: Tensor) -> Tensor:
    """Add up values on a grid over unions of disjoint boxes, by a summed-area table.

    Args:
        values: (..., h, w) integers, so that every sum is exact.
        boxes: (R, B, 4) int64, as of ``Regions``.

    Returns:
        (..., R) integers of the same type.
    """
    table = functional.pad(
        values.cumsum(-1, dtype=values.dtype).cumsum(-2, dtype=values.dtype), (1, 0, 1, 0)
    ).flatten(-2)
    width = values.shape[-1] + 1
    top, left, height, across = boxes.unbind(-1)
    sums = table.new_zeros(*values.shape[:-2], len(boxes))
    for part in range(boxes.shape[1]):
        rows, columns = top[:, part], left[:, part]
        end, right = rows + height[:, part], columns + across[:, part]
        sums += table[..., end * width + right] - table[..., rows * width + right]
        sums += table[..., rows * width + columns] - table[..., end * width + columns]
    return sums


class CropViews:
    """The crops at all places, as the views of a recording; see ``Views``.

    Args:
        image_size: (H, W) in pixels.
        crop_size: side of the crops, or (height, width), in pixels.

    Attributes:
        places: where they are.
        count: V, one for each place.
        grid: (h, w) of the places; views are numbered row by row.
        wraps: no crop goes on across a border.

    Raises:
        PatchproofError: crops larger than the image.
    """

    per_forward = 1
    wraps = (False, False)

    def __init__(self, image_size: ImageSize, crop_size: int | CropSize) -> None:
        self.places = CropPlaces(image_size, crop_size)
        self.count = self.places.count
        self.grid = self.places.grid

    def corruption(self, threat: Threat) -> Corruption:
        """Enumerate which crops each patch region meets."""
        meeting = self.places.meeting(threat.regions(self.places.image_size))
        each = torch.eye(self.count, dtype=torch.int32).view(self.count, *self.grid)
        patterns, pattern = distinct_rows(box_sums(each, meeting.parts).T > 0)
        return Corruption(patterns, pattern).combined(threat.patches)

    def evaluate(self, model: nn.Module, images: Tensor, forwards: Tensor) -> Tensor:
        """Return the scores, (B, 1, classes), of crop ``forwards[b]`` of image b."""
        each = torch.arange(len(images), device=images.device)
        corners = self.places.corners(forwards)
        return crop_scores(model, images, each, corners, self.places.crop_size)[:, None]


def check_local(model: nn.Module, places: CropPlaces, images: Tensor) -> None:
    """Raise ``PatchproofError`` unless a model scores each crop by its own pixels.

    Five crops of a random image are scored with other pixels around them, NaN among them. Models
    without the method ``cropped`` see nothing else.

    Args:
        model: of crops.
        places: of the crops.
        images: (N, C, H, W), for the number of channels, the type and the device.
    """
    if not hasattr(model, "cropped"):
        return
    (height, width), last, right = places.crop_size, places.count - 1, places.grid[1] - 1
    pixels = np.random.default_rng(0).random((2, images.shape[1], *places.image_size))
    shown, other = torch.from_numpy(pixels).to(images)
    around = [shown, other, *(torch.full_like(shown, value) for value in (0.0, 1.0, torch.nan))]
    for place in sorted({0, right, last - right, last // 2, last}):
        corner = places.corners(torch.tensor([place]))
        top, left = corner[0].tolist()
        probes = torch.stack(around)
        inside = (..., slice(top, top + height), slice(left, left + width))
        probes[inside] = shown[inside]
        first = torch.zeros(1, dtype=torch.int64, device=images.device)
        with exact_inference(images.device):
            scores = torch.cat(
                [
                    crop_scores(
                        model, probe[None], first, corner.to(images.device), (height, width)
                    )
                    for probe in probes
                ]
            )
        if scores[0].isfinite().all() and not torch.allclose(
            scores, scores[:1].expand_as(scores), rtol=1e-4, atol=1e-4
        ):
            raise PatchproofError(
                "model: expected scores of a crop that depend on its pixels alone, got scores that "
                "change with the rest of the image"
            )


def crop_scores(
    model: nn.Module, images: Tensor, image: Tensor, corners: Tensor, size: CropSize
) -> Tensor:
    """Return what a model says about crops, (B, classes); see ``CropNetwork.cropped``.

    A model without the method ``cropped`` sees each crop alone.

    Raises:
        PatchproofError: what it says is not one row of logits for each crop.
    """
    if hasattr(model, "cropped"):  # it may change its input in place
        scores = cast(CropNetwork, model).cropped(images.clone(), image, corners)
    else:
        scores = model(cut(images, image, corners, size))
    fits = isinstance(scores, Tensor) and scores.ndim == 2 and len(scores) == len(image)
    if not fits or scores.shape[1] < 2:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PatchproofError(
            f"model: expected logits of shape ({len(image)}, classes >= 2), got {got}"
        )
    return scores
