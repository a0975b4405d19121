"""Mask sets that cover every patch region (PatchCleanser, Sections 3.4 and 5.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from patchproof.errors import PatchproofError
from patchproof.results import distinct_rows
from patchproof.threat.covering import least_staircase
from patchproof.threat.patches import AnyPatch, AnyRectangle, MultiplePatches, Threat
from patchproof.threat.regions import Box, ImageSize, PixelSets, check_image_size
from patchproof.threat.shapes import Shape, largest, pixels_of

Layout = Literal["paper", "balanced"]
Mask = tuple[Box, ...]
"""The union of boxes of pixels."""

DEFAULT_SHAPES = 6
"""Covering rectangles for ``AnyRectangle``, as many as in the paper."""

_MOST_ENTRIES = 2**29
"""Masks times pairs of masks that fit into memory."""


@dataclass(frozen=True)
class MaskSet:
    """Masks, verified to be R-covering when built.

    R-covering (PatchCleanser, Definition 1): every patch region lies entirely inside at least one
    mask; of several patches, every combination of their regions. That is checked by enumerating
    the regions of the threat, pixel by pixel.

    Attributes:
        image_size: (H, W) in pixels.
        masks: the M distinct masks, in the order that the inference algorithms use; each is a
            union of half-open boxes. A single box may be given as it is.
        threat: what the masks cover.

    Raises:
        PatchproofError: no masks, a mask outside the image or listed twice, more masks than fit
            into memory in pairs, or a region that no mask covers.
    """

    image_size: ImageSize
    masks: tuple[Mask, ...]
    threat: Threat

    def __post_init__(self) -> None:
        height, width = check_image_size(self.image_size)
        masks = unlisted_masks(self.masks)
        object.__setattr__(self, "masks", masks)
        if not masks:
            raise PatchproofError("mask set: expected at least one mask, got none")
        check_pairs(len(masks))
        for box in {box for mask in masks for box in mask}:
            if (
                min(box.top, box.left) < 0
                or min(box.height, box.width) < 1
                or box.top + box.height > height
                or box.left + box.width > width
            ):
                raise PatchproofError(
                    f"mask set: expected boxes inside the {height}x{width} image, got {box}"
                )
        hidden = self.hidden()
        if len(distinct_rows(hidden.cells.flatten(1))[0]) < len(masks):
            raise PatchproofError("mask set: expected distinct masks, got one more than once")
        self._check_covering(hidden)

    def __len__(self) -> int:
        return len(self.masks)

    def masked(self) -> Tensor:
        """Return the pixels that each mask hides, (M, H, W) bool."""
        return torch.stack([pixels_of(boxes, self.image_size) for boxes in self.masks])

    def hidden(self) -> PixelSets:
        """Return the pixels that each mask hides."""
        return PixelSets.of(self.masked())

    def multiplicity(self) -> Tensor:
        """Return how many masks cover each patch region of the threat, (R,) int64.

        Of several patches, a number that cover the region with others at any place.
        """
        return self.threat.corruption(self.hidden().complements()).spared()

    def to_dict(self) -> dict[str, Any]:
        """Return the mask set as JSON values."""
        return {
            "image_size": list(self.image_size),
            "masks": listed_masks(self.masks),
            "threat": self.threat.to_dict(),
        }

    @classmethod
    def for_threat(
        cls,
        threat: Threat,
        image_size: ImageSize,
        masks_per_side: int | tuple[int, int] = 6,
        multiplicity: int | tuple[int, int] = 1,
        layout: Layout = "paper",
        shapes: int | None = None,
    ) -> MaskSet:
        """Build the grid of masks for a budget per axis (PatchCleanser, Equations 1 to 3).

        Along an axis of n pixels a patch of p has N = n - p + 1 places. A mask serves adjacent
        places, and hides what the patch hides at any of them. ``"paper"`` gives each mask
        s = ceil(N / (k - c + 1)) places, or c s for a multiplicity of c; for c = 1 these are the
        paper's masks, the last one moved back to the border. That can take fewer masks than k, and
        larger ones than needed; ``"balanced"`` shares the places out as evenly as k masks can. For
        c > 1 the grid begins before the image and masks are cut off at the borders, so that border
        regions have c covering masks as well.

        There is one grid for each shape of a patch, and for several patches the masks are the
        unions of up to as many masks.

        Args:
            threat: what the masks must cover.
            image_size: (H, W) in pixels.
            masks_per_side: the budget k, the same for both axes or (rows, columns).
            multiplicity: the least number c of masks per axis that cover each place of the patch,
                the same for both axes or (rows, columns); at least their product covers a region.
            layout: ``"paper"`` or ``"balanced"``.
            shapes: for ``AnyRectangle``, how many rectangles cover it, by default 6: those whose
                masks hide the least pixels in total. None for other threats.

        Raises:
            PatchproofError: a budget below 1 or below the multiplicity, a patch larger than the
                image, a multiplicity so high that masks coincide, or more masks than fit into
                memory in pairs.
        """
        size = check_image_size(image_size)
        budgets = per_axis("masks_per_side", masks_per_side)
        multiplicities = per_axis("multiplicity", multiplicity)
        if layout not in get_args(Layout):
            raise PatchproofError(f"layout: expected {get_args(Layout)}, got {layout!r}")

        def spans(shape: Shape) -> list[list[tuple[int, int]]]:
            return [
                _spans(n, p, k, c, layout)
                for n, p, k, c in zip(
                    size, (shape.height, shape.width), budgets, multiplicities, strict=True
                )
            ]

        def grid(shape: Shape) -> list[Mask]:
            rows, columns = spans(shape)
            return [
                tuple(box.shifted(top, left) for box in shape.swept(places_down, places_across))
                for top, places_down in rows
                for left, places_across in columns
            ]

        def hidden_pixels(rectangle: Shape) -> int:
            heights, widths = (
                sum(length + places - 1 for _, places in along)
                for length, along in zip(
                    (rectangle.height, rectangle.width), spans(rectangle), strict=True
                )
            )
            return heights * widths

        def covering_shapes(patch: Threat) -> tuple[Shape, ...]:
            if isinstance(patch, AnyRectangle):
                count = DEFAULT_SHAPES if shapes is None else shapes
                return least_staircase(patch.max_pixels, size, count, hidden_pixels)
            return patch.shapes(size)

        patch = threat.patch if isinstance(threat, MultiplePatches) else threat
        kinds = patch.threats if isinstance(patch, AnyPatch) else (patch,)
        if shapes is not None and not any(isinstance(kind, AnyRectangle) for kind in kinds):
            raise PatchproofError(
                f"shapes: expected a number for any rectangle only, got {shapes} for "
                f"{patch.label()}"
            )
        covering = largest(shape for kind in kinds for shape in covering_shapes(kind))
        check_pairs(sum(math.prod(map(len, spans(shape))) for shape in covering))
        masks = _distinct([mask for shape in covering for mask in grid(shape)], size)
        if threat.patches > 1:
            together = range(1, min(threat.patches, len(masks)) + 1)
            total = sum(math.comb(len(masks), count) for count in together)
            check_pairs(total, f"the unions of up to {threat.patches} of {len(masks)} masks")
            unions = [
                tuple(sorted({box for mask in chosen for box in mask}))
                for count in together
                for chosen in combinations(masks, count)
            ]
            masks = _distinct(unions, size)
        mask_set = cls(size, tuple(masks), threat)
        least = math.prod(multiplicities)  # one mask over each region is checked already
        if least > 1 and int(mask_set.multiplicity().min()) < least:
            raise PatchproofError(
                f"multiplicity: expected {threat.patches} patches to be inside "
                f"{least} masks, got fewer, as unions of masks coincide: take "
                "a smaller multiplicity or a larger budget"
            )
        return mask_set

    def _check_covering(self, hidden: PixelSets) -> None:
        corruption = self.threat.corruption(hidden.complements())
        bare = corruption.patterns.all(1).nonzero()
        if not len(bare):
            return
        where = f"some regions of {self.threat.patches} patches together"
        if corruption.combinations is None:
            place = int((corruption.region_to_pattern == bare[0]).nonzero()[0])
            where = str(self.threat.regions(self.image_size).box(place))
        raise PatchproofError(
            f"mask set: expected masks that cover every patch region, got none that covers {where}"
        )


def listed_masks(masks: Iterable[Mask]) -> list[Any]:
    """Return masks as JSON values; a single box stands for itself."""
    return [list(mask[0]) if len(mask) == 1 else [list(box) for box in mask] for mask in masks]


def unlisted_masks(values: Iterable[Any]) -> tuple[Mask, ...]:
    """Return the masks that ``listed_masks`` wrote."""
    return tuple(
        tuple(Box(*box) for box in (mask if isinstance(mask[0], Sequence) else [mask]))
        for mask in values
        if len(mask)
    )


def per_axis(name: str, value: object) -> tuple[int, int]:
    """Return ``value`` for rows and columns, or raise."""
    match (value, value) if isinstance(value, int) else value:
        case (int(rows), int(columns)) if min(rows, columns) >= 1:
            return rows, columns
    raise PatchproofError(f"{name}: expected one or two whole numbers >= 1, got {value!r}")


def check_pairs(masks: int, what: str = "the masks") -> None:
    """Raise unless all pairs of masks fit into memory."""
    pairs = masks * (masks + 1) // 2
    if masks * pairs > _MOST_ENTRIES:
        raise PatchproofError(
            f"mask set: expected at most {_most_masks():,} masks, got {masks:,} ({what}), which "
            f"have {pairs:,} pairs: take fewer masks per side, or fewer patches"
        )


def _most_masks() -> int:
    return int((2 * _MOST_ENTRIES) ** (1 / 3))


def _distinct(masks: Sequence[Mask], image_size: ImageSize) -> list[Mask]:
    """Return the masks, in order, without those that hide the same pixels as an earlier one."""
    pixels = torch.stack([pixels_of(boxes, image_size) for boxes in masks])
    first: dict[int, Mask] = {}
    which = distinct_rows(PixelSets.of(pixels).cells.flatten(1))[1]
    for number, mask_boxes in zip(which.tolist(), masks, strict=True):
        first.setdefault(number, mask_boxes)
    return list(first.values())


def _spans(n: int, p: int, k: int, c: int, layout: Layout) -> list[tuple[int, int]]:
    """Return the (first place, number of places) of each mask along an axis of ``n`` pixels."""
    if c > k:
        raise PatchproofError(f"multiplicity: expected at most the {k} masks per side, got {c}")
    places = n - p + 1
    blocks = k - c + 1
    stride = -(-places // blocks)
    if layout == "balanced":
        blocks = min(blocks, places)
        edges = [number * places // blocks for number in range(blocks + 1)]
        ends = [
            (edges[max(0, first)], edges[min(blocks, first + c)]) for first in range(1 - c, blocks)
        ]
    elif c == 1:
        starts = (*range(0, places - stride, stride), max(0, places - stride))
        ends = [(start, min(places, start + stride)) for start in starts]
    else:
        starts = tuple(range(-(c - 1) * stride, places, stride))
        ends = [(max(0, start), min(places, start + c * stride)) for start in starts]
    if len(set(ends)) < len(ends):
        raise PatchproofError(
            f"multiplicity: expected distinct masks, but {c} masks on an axis of {n} pixels "
            f"coincide: take a smaller multiplicity or a larger budget than {k}"
        )
    return [(start, end - start) for start, end in ends]
