"""Threat models: one patch of known shape, with any content, at any allowed place."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, cast

from patchproof.results import PatchproofError
from patchproof.threat.regions import Box, ImageSize, Regions, check_image_size

Locations = Literal["anywhere", "corners"] | Box

_PUBLISHED_SIDES = {
    (32, 32): {"0.4%": 2, "2.4%": 5},
    (224, 224): {"1%": 23, "2%": 32, "3%": 39},
}
"""Side in pixels of the squares that the papers name by their share of the image."""


class Threat(ABC):
    """What the attacker may do: overwrite the pixels of one region with anything in [0, 1]."""

    @abstractmethod
    def regions(self, image_size: ImageSize) -> Regions:
        """List every region that the patch can take on an image of (height, width) pixels.

        Raises:
            PatchproofError: the patch does not fit in the image or in its allowed locations.
        """

    @abstractmethod
    def extent(self) -> tuple[int, int]:
        """Return the height and width in pixels of the smallest box that holds the patch."""

    @abstractmethod
    def describe(self) -> str:
        """Say the threat in words, with its pixels."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the threat as JSON values; ``threat_from_dict`` is the inverse."""


@dataclass(frozen=True)
class RectanglePatch(Threat):
    """One rectangle of ``height`` x ``width`` pixels with any content.

    Attributes:
        height: rows of pixels.
        width: columns of pixels.
        locations: ``"anywhere"``, ``"corners"`` of the image, or a ``Box`` that holds the patch.
    """

    height: int
    width: int
    locations: Locations = "anywhere"

    def __post_init__(self) -> None:
        for name, side in (("height", self.height), ("width", self.width)):
            if not isinstance(side, int) or isinstance(side, bool) or side < 1:
                raise PatchproofError(f"patch {name}: expected pixels >= 1, got {side!r}")
        if isinstance(self.locations, str):
            if self.locations not in ("anywhere", "corners"):
                raise PatchproofError(
                    f"locations: expected 'anywhere', 'corners' or a box, got {self.locations!r}"
                )
        else:
            box = Box(*self.locations)
            if box.top < 0 or box.left < 0 or box.height < self.height or box.width < self.width:
                raise PatchproofError(
                    f"locations: expected a box inside the image that holds a "
                    f"{self.height}x{self.width} patch, got {box}"
                )
            object.__setattr__(self, "locations", box)

    def regions(self, image_size: ImageSize) -> Regions:
        """List every placement inside the image and the allowed locations."""
        height, width = check_image_size(image_size)
        if self.height > height or self.width > width:
            raise PatchproofError(
                f"expected a patch no larger than the {height}x{width} image, "
                f"got {self.height}x{self.width}"
            )
        area = self.locations if isinstance(self.locations, Box) else Box(0, 0, height, width)
        if area.top + area.height > height or area.left + area.width > width:
            raise PatchproofError(
                f"locations: expected a box inside the {height}x{width} image, got {area}"
            )
        tops = range(area.top, area.top + area.height - self.height + 1)
        lefts = range(area.left, area.left + area.width - self.width + 1)
        if self.locations == "corners":
            tops, lefts = _ends(tops), _ends(lefts)
        return Regions.of(
            (height, width),
            (Box(top, left, self.height, self.width) for top in tops for left in lefts),
        )

    def extent(self) -> tuple[int, int]:
        """Return (height, width)."""
        return self.height, self.width

    def describe(self) -> str:
        """Say the shape, its pixels and where it may be."""
        if self.locations == "anywhere":
            place = "anywhere on the image"
        elif self.locations == "corners":
            place = "in one of the image's corners"
        else:
            box = Box(*self.locations)
            place = (
                f"within rows {box.top} to {box.top + box.height - 1} "
                f"and columns {box.left} to {box.left + box.width - 1}"
            )
        shape = "square" if self.height == self.width else "rectangle"
        return f"one {shape} of {self.height}x{self.width} pixels with any content, {place}"

    def to_dict(self) -> dict[str, Any]:
        """Return the shape and its locations as JSON values."""
        place = self.locations if isinstance(self.locations, str) else list(self.locations)
        return {
            "type": "rectangle",
            "height": self.height,
            "width": self.width,
            "locations": place,
        }


@dataclass(frozen=True, init=False, repr=False)
class SquarePatch(RectanglePatch):
    """One square of ``side`` x ``side`` pixels with any content."""

    def __init__(self, side: int, locations: Locations = "anywhere") -> None:
        super().__init__(side, side, locations)

    def __repr__(self) -> str:
        place = "" if self.locations == "anywhere" else f", locations={self.locations!r}"
        return f"SquarePatch({self.height}{place})"

    @classmethod
    def covering(cls, fraction: float, image_size: ImageSize) -> SquarePatch:
        """Return the smallest square of at least ``fraction`` of the image's pixels.

        The side is rounded up, so that the threat contains every square of that share; the
        fraction is read as its decimal digits say.
        """
        height, width = check_image_size(image_size)
        if not 0 < fraction <= 1:
            raise PatchproofError(f"fraction of pixels: expected in (0, 1], got {fraction!r}")
        pixels = math.ceil(Decimal(repr(float(fraction))) * height * width)
        return cls(math.isqrt(pixels - 1) + 1)

    @classmethod
    def published(cls, share: str, image_size: ImageSize) -> SquarePatch:
        """Return what the papers mean by ``share`` (such as ``"2.4%"``) at ``image_size``.

        Rounded as published, which may be down: 0.4% of 32x32 is 2x2.
        """
        sides = _PUBLISHED_SIDES.get(check_image_size(image_size), {})
        if share not in sides:
            known = "; ".join(
                f"{height}x{width}: {', '.join(shares)}"
                for (height, width), shares in _PUBLISHED_SIDES.items()
            )
            raise PatchproofError(
                f"expected a published patch size ({known}), got {share!r} at {image_size}"
            )
        return cls(sides[share])


def threat_from_dict(values: dict[str, Any]) -> Threat:
    """Return the threat that ``Threat.to_dict`` wrote."""
    match values:
        case {"type": "rectangle", "height": int(height), "width": int(width), "locations": place}:
            locations = cast(Locations, place if isinstance(place, str) else Box(*place))
            if height == width:
                return SquarePatch(height, locations)
            return RectanglePatch(height, width, locations)
    raise PatchproofError(f"expected a threat written by to_dict, got {values!r}")


def _ends(positions: range) -> range:
    """Return the first and last position (one where they coincide)."""
    return range(positions[0], positions[-1] + 1, max(1, positions[-1] - positions[0]))
