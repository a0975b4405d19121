"""Mask sets that cover every patch region (PatchCleanser, Section 3.4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchproof.results import PatchproofError
from patchproof.threat.patches import Threat
from patchproof.threat.regions import Box, ImageSize, check_image_size


@dataclass(frozen=True)
class MaskSet:
    """Masks (half-open boxes of pixels), verified to be R-covering when built.

    R-covering (PatchCleanser, Definition 1): every patch region lies entirely inside at least one
    mask. That is checked by enumerating the regions of the threat, pixel by pixel.

    Attributes:
        image_size: (H, W) in pixels.
        boxes: the M distinct masks, in the order that the inference algorithms use.
        threat: what the masks cover.

    Raises:
        PatchproofError: no masks, a mask outside the image or listed twice, or a region that no
            mask covers.
    """

    image_size: ImageSize
    boxes: tuple[Box, ...]
    threat: Threat

    def __post_init__(self) -> None:
        height, width = check_image_size(self.image_size)
        object.__setattr__(self, "boxes", tuple(Box(*box) for box in self.boxes))
        if not self.boxes:
            raise PatchproofError("mask set: expected at least one mask, got none")
        for box in self.boxes:
            if (
                min(box.top, box.left) < 0
                or min(box.height, box.width) < 1
                or box.top + box.height > height
                or box.left + box.width > width
            ):
                raise PatchproofError(
                    f"mask set: expected boxes inside the {height}x{width} image, got {box}"
                )
        if len(set(self.boxes)) < len(self.boxes):
            raise PatchproofError("mask set: expected distinct masks, got one more than once")
        uncovered = (self.multiplicity() == 0).nonzero()
        if len(uncovered):
            region = self.threat.regions(self.image_size).box(int(uncovered[0]))
            raise PatchproofError(
                f"mask set: expected masks that cover every patch region, "
                f"got none that covers {region}"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def masked(self) -> Tensor:
        """Return the pixels that each mask hides, (M, H, W) bool."""
        masked = torch.zeros(len(self), *self.image_size, dtype=torch.bool)
        for mask, box in zip(masked, self.boxes, strict=True):
            mask[box.top : box.top + box.height, box.left : box.left + box.width] = True
        return masked

    def multiplicity(self) -> Tensor:
        """Return how many masks cover each patch region of the threat, (R,) int64."""
        return (~self.threat.regions(self.image_size).seen_by(~self.masked())).sum(1)

    def to_dict(self) -> dict[str, Any]:
        """Return the mask set as JSON values."""
        return {
            "image_size": list(self.image_size),
            "boxes": [list(box) for box in self.boxes],
            "threat": self.threat.to_dict(),
        }

    @classmethod
    def for_threat(
        cls,
        threat: Threat,
        image_size: ImageSize,
        masks_per_side: int | tuple[int, int] = 6,
        multiplicity: int | tuple[int, int] = 1,
    ) -> MaskSet:
        """Build the grid of masks for a budget per axis (PatchCleanser, Equations 1 to 3).

        Per axis, with n pixels, a patch of p, a budget of k masks and a multiplicity of c, masks of
        p + c s - 1 pixels stand at every s-th pixel, s = ceil((n - p + 1) / (k - c + 1)). Every
        stretch of p pixels then lies inside at least c of them: the positions that cover it fill
        an interval of c s consecutive integers. For c = 1 these are the paper's masks, the last
        one moved back to the border. For c > 1 the grid starts c - 1 strides before the image and
        masks are cut off at the borders, so that border regions have c covering masks as well.

        Args:
            threat: its bounding box (``extent``) is what a mask must cover.
            image_size: (H, W) in pixels.
            masks_per_side: the budget k, the same for both axes or (rows, columns).
            multiplicity: the least number c of masks per axis that cover each stretch of p pixels,
                the same for both axes or (rows, columns); at least their product covers a region.

        Raises:
            PatchproofError: a budget below 1 or below the multiplicity, a patch larger than the
                image, or a multiplicity so high that masks coincide.
        """
        size = check_image_size(image_size)
        budgets = per_axis("masks_per_side", masks_per_side)
        multiplicities = per_axis("multiplicity", multiplicity)
        rows, columns = (
            _intervals(n, p, k, c)
            for n, p, k, c in zip(size, threat.extent(), budgets, multiplicities, strict=True)
        )
        return cls(
            size,
            tuple(Box(top, left, h, w) for top, h in rows for left, w in columns),
            threat,
        )


def per_axis(name: str, value: object) -> tuple[int, int]:
    """Return ``value`` for rows and columns, or raise."""
    match (value, value) if isinstance(value, int) else value:
        case (int(rows), int(columns)) if min(rows, columns) >= 1:
            return rows, columns
    raise PatchproofError(f"{name}: expected one or two whole numbers >= 1, got {value!r}")


def _intervals(n: int, p: int, k: int, c: int) -> list[tuple[int, int]]:
    """Return the (start, length) of the masks along an axis of ``n`` pixels."""
    if p > n:
        raise PatchproofError(f"expected a patch no larger than the image's {n} pixels, got {p}")
    if c > k:
        raise PatchproofError(f"multiplicity: expected at most the {k} masks per side, got {c}")
    stride = -(-(n - p + 1) // (k - c + 1))
    size = p + c * stride - 1
    if c == 1:
        starts: Iterable[int] = (*range(0, n - size, stride), max(0, n - size))
    else:
        starts = range(-(c - 1) * stride, n - p + 1, stride)
    clipped = [(max(0, start), min(n, start + size)) for start in starts]
    if len(set(clipped)) < len(clipped):
        raise PatchproofError(
            f"multiplicity: expected distinct masks, but {c} of {size} pixels on an axis of {n} "
            f"coincide: take a smaller multiplicity or a larger budget than {k}"
        )
    return [(start, end - start) for start, end in clipped]
