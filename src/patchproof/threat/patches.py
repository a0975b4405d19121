"""Threat models: patches of known shapes at any allowed place, or any few pixels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import torch
from torch import Tensor

from patchproof.errors import PatchproofError
from patchproof.results import Corruption
from patchproof.threat.regions import Box, ImageSize, PixelSets, Regions, check_image_size
from patchproof.threat.shapes import Point, Shape, largest, touched_pixels

Locations = Literal["anywhere", "corners"] | Box

_PUBLISHED_SIDES = {
    (32, 32): {"0.4%": 2, "2.4%": 5},
    (224, 224): {"1%": 23, "2%": 32, "3%": 39},
}
"""Side in pixels of the squares that the papers name by their share of the image."""


class Threat(ABC):
    """What the attacker may do: overwrite the pixels of some regions with anything in [0, 1]."""

    @property
    def patches(self) -> int:
        """How many patches there are; each takes one of ``regions``."""
        return 1

    @abstractmethod
    def shapes(self, image_size: ImageSize) -> tuple[Shape, ...]:
        """List the largest shapes of one patch; every other one is part of one of them.

        Raises:
            PatchproofError: a patch larger than the image.
        """

    @abstractmethod
    def regions(self, image_size: ImageSize) -> Regions:
        """List every region that one patch can take on an image of (height, width) pixels.

        Raises:
            PatchproofError: the patch does not fit in the image or in its allowed locations.
        """

    @abstractmethod
    def label(self) -> str:
        """Name the threat in a few words for tables, such as ``"5x5 square"``."""

    @abstractmethod
    def describe(self) -> str:
        """Say the threat in words, with its pixels."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the threat as JSON values; ``threat_from_dict`` is the inverse."""

    def corruption(self, visible: PixelSets) -> Corruption:
        """Enumerate which views each patch region corrupts: those that see a pixel of it.

        Args:
            visible: the pixels of the image that each of V views shows the model.
        """
        size = (len(visible.rows), len(visible.columns))
        return Corruption(*self.regions(size).patterns(visible))


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
        _check_sides(self.height, self.width)
        shape = Shape.rectangle(self.height, self.width)
        object.__setattr__(self, "locations", _check_locations(self.locations, (shape,)))

    @staticmethod
    def of_aspect(pixels: int, ratio: float, locations: Locations = "anywhere") -> RectanglePatch:
        """Return a rectangle of about ``pixels`` pixels (randomized cropping, Section 4.3).

        Its sides are the whole numbers nearest to sqrt(pixels ratio) and sqrt(pixels / ratio), so
        that it may have a few pixels more or less.

        Args:
            pixels: the area that the sides are for.
            ratio: height over width.
            locations: where the patch may be.
        """
        if not _is_count(pixels):
            raise PatchproofError(f"pixels: expected at least 1, got {pixels!r}")
        if not 0 < ratio < math.inf:
            raise PatchproofError(f"aspect ratio: expected height over width > 0, got {ratio!r}")
        exact = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
        if not 0.5 <= min(exact) <= max(exact) < math.inf:
            raise PatchproofError(
                f"aspect ratio: expected sides of at least half a pixel, got {exact[0]:.3g} high "
                f"and {exact[1]:.3g} wide for {pixels} pixels"
            )
        height, width = (math.floor(side + 0.5) for side in exact)
        return _rectangle(height, width, locations)

    def shapes(self, image_size: ImageSize) -> tuple[Shape, ...]:
        """Return the rectangle."""
        return (_fitting(Shape.rectangle(self.height, self.width), image_size),)

    def regions(self, image_size: ImageSize) -> Regions:
        """List every placement inside the image and the allowed locations."""
        return _placements(self.shapes(image_size), image_size, self.locations)

    def label(self) -> str:
        """Return such as ``"5x5 square"``."""
        return f"{self.height}x{self.width} {self._noun}{_place_in_short(self.locations)}"

    def describe(self) -> str:
        """Say the shape, its pixels and where it may be."""
        return (
            f"one {self._noun} of {self.height}x{self.width} pixels with any content, "
            f"{_place(self.locations)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the shape and its locations as JSON values."""
        return {
            "type": "rectangle",
            "height": self.height,
            "width": self.width,
            "locations": _listed(self.locations),
        }

    @property
    def _noun(self) -> str:
        return "square" if self.height == self.width else "rectangle"


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
        return cls(math.isqrt(math.ceil(_pixels(fraction, image_size)) - 1) + 1)

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


@dataclass(frozen=True)
class RectanglePatches(Threat):
    """One rectangle of any of several sizes (PatchCleanser, Section 5.1), with any content.

    Attributes:
        sizes: (height, width) of each, in pixels.
        locations: ``"anywhere"``, ``"corners"`` of the image, or a ``Box`` that holds every patch.
    """

    sizes: tuple[tuple[int, int], ...]
    locations: Locations = "anywhere"

    def __init__(self, sizes: Iterable[Sequence[int]], locations: Locations = "anywhere") -> None:
        listed = [tuple(size) if isinstance(size, Sequence) else (size,) for size in sizes]
        if not listed:
            raise PatchproofError("patch sizes: expected at least one, got none")
        for size in listed:
            if len(size) != 2:
                raise PatchproofError(f"patch sizes: expected (height, width), got {size!r}")
            _check_sides(*size)
        object.__setattr__(self, "sizes", tuple(sorted(set(listed))))
        shapes = tuple(Shape.rectangle(*size) for size in self.sizes)
        object.__setattr__(self, "locations", _check_locations(locations, shapes))

    def shapes(self, image_size: ImageSize) -> tuple[Shape, ...]:
        """Return the rectangles that are not part of another."""
        return largest(_fitting(Shape.rectangle(*size), image_size) for size in self.sizes)

    def regions(self, image_size: ImageSize) -> Regions:
        """List every placement of every rectangle inside the image and the allowed locations."""
        shapes = tuple(_fitting(Shape.rectangle(*size), image_size) for size in self.sizes)
        return _placements(shapes, image_size, self.locations)

    def label(self) -> str:
        """Return such as ``"3x8 or 8x3 rectangle"``."""
        names = " or ".join(f"{height}x{width}" for height, width in self.sizes)
        return f"{names} rectangle{_place_in_short(self.locations)}"

    def describe(self) -> str:
        """Say the sizes and where the patch may be."""
        names = " or ".join(f"{height}x{width}" for height, width in self.sizes)
        return f"one rectangle of {names} pixels with any content, {_place(self.locations)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes and locations as JSON values."""
        return {
            "type": "rectangles",
            "sizes": [list(size) for size in self.sizes],
            "locations": _listed(self.locations),
        }


@dataclass(frozen=True)
class AnyRectangle(Threat):
    """One rectangle of any height and width, of at most ``max_pixels`` pixels, with any content.

    PatchCleanser, Section 5.1 and Appendix B. ``MaskSet.for_threat`` covers it by few shapes.

    Attributes:
        max_pixels: the largest area.
        locations: ``"anywhere"``, ``"corners"`` of the image, or a ``Box`` that holds every patch.
    """

    max_pixels: int
    locations: Locations = "anywhere"

    def __post_init__(self) -> None:
        if not _is_count(self.max_pixels):
            raise PatchproofError(f"max_pixels: expected pixels >= 1, got {self.max_pixels!r}")
        object.__setattr__(self, "locations", _check_locations(self.locations, ()))

    @classmethod
    def of_share(cls, fraction: float | Decimal, image_size: ImageSize) -> AnyRectangle:
        """Return every rectangle of at most ``fraction`` of the image's pixels."""
        pixels = math.floor(_pixels(fraction, image_size))
        if not pixels:
            raise PatchproofError(
                f"fraction of pixels: expected at least one pixel of {image_size}, got {fraction!r}"
            )
        return cls(pixels)

    def shapes(self, image_size: ImageSize) -> tuple[Shape, ...]:
        """Return the rectangles that no higher or wider one of the area contains."""
        rows, columns = self._room(check_image_size(image_size))
        tallest: dict[int, int] = {}
        for height in range(1, min(self.max_pixels, rows) + 1):
            tallest[min(self.max_pixels // height, columns)] = height
        return tuple(Shape.rectangle(height, width) for width, height in tallest.items())

    def regions(self, image_size: ImageSize) -> Regions:
        """List every placement of the largest rectangles; every other is part of one of them."""
        return _placements(self.shapes(image_size), image_size, self.locations)

    def label(self) -> str:
        """Return such as ``"any rectangle of 10 pixels"``."""
        return f"any rectangle of {self.max_pixels} pixels{_place_in_short(self.locations)}"

    def describe(self) -> str:
        """Say the area and where the patch may be."""
        return (
            f"one rectangle of any height and width, of at most {self.max_pixels} pixels, with any "
            f"content, {_place(self.locations)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the area and the locations as JSON values."""
        return {
            "type": "any-rectangle",
            "max_pixels": self.max_pixels,
            "locations": _listed(self.locations),
        }

    def _room(self, image_size: ImageSize) -> tuple[int, int]:
        height, width = image_size
        if isinstance(self.locations, Box):
            return min(height, self.locations.height), min(width, self.locations.width)
        return height, width


@dataclass(frozen=True)
class StencilPatch(Threat):
    """One patch of any shape, with any content; it moves by whole pixels and does not turn.

    The constructors take every pixel whose area the shape touches. ``subpixel=True`` takes also
    those that it touches when it is moved down and to the right by less than a pixel, for stickers
    that do not keep to the grid. It contains every placement but those that end within a pixel of
    the image's bottom or right border, where the larger stencil does not fit.

    Attributes:
        rows: the shape, ``#`` for its pixels and ``.`` for others.
        name: what the shape is called.
        locations: ``"anywhere"``, ``"corners"`` of the image, or a ``Box`` that holds the patch.
    """

    rows: tuple[str, ...]
    name: str = "stencil"
    locations: Locations = "anywhere"

    def __init__(
        self,
        pixels: Tensor | Sequence[Sequence[Any]],
        name: str = "stencil",
        locations: Locations = "anywhere",
    ) -> None:
        mask = _stencil(pixels)
        if not mask.any():
            raise PatchproofError("stencil: expected at least one pixel, got none")
        shape = Shape.of(mask)
        rows = tuple("".join(".#"[pixel] for pixel in row) for row in shape.pixels.int().tolist())
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "locations", _check_locations(locations, (shape,)))

    def __repr__(self) -> str:
        return f"StencilPatch({self.label()})"

    @classmethod
    def line(
        cls, length: float, thickness: float = 1.0, degrees: float = 0.0, *, subpixel: bool = False
    ) -> StencilPatch:
        """Return a straight bar; 0 degrees is horizontal, 90 vertical, 45 rises to the right."""
        corners = _turned(_box_corners(thickness, length), degrees)
        name = f"{length:g}x{thickness:g} line at {degrees:g} degrees"
        return cls(touched_pixels(corners, subpixel), _sub(name, subpixel))

    @classmethod
    def rectangle(
        cls, height: float, width: float, degrees: float, *, subpixel: bool = False
    ) -> StencilPatch:
        """Return a rectangle turned counterclockwise (randomized cropping, Section 4.3)."""
        corners = _turned(_box_corners(height, width), degrees)
        noun = "square" if height == width else "rectangle"
        name = f"{height:g}x{width:g} {noun} at {degrees:g} degrees"
        return cls(touched_pixels(corners, subpixel), _sub(name, subpixel))

    @classmethod
    def square(cls, side: float, degrees: float, *, subpixel: bool = False) -> StencilPatch:
        """Return a square turned by ``degrees``."""
        return cls.rectangle(side, side, degrees, subpixel=subpixel)

    @classmethod
    def diamond(cls, diagonal: float, *, subpixel: bool = False) -> StencilPatch:
        """Return a square that stands on its corner, ``diagonal`` pixels high and wide."""
        half = diagonal / 2
        corners = [(-half, 0.0), (0.0, half), (half, 0.0), (0.0, -half)]
        return cls(
            touched_pixels(corners, subpixel), _sub(f"diamond of {diagonal:g} pixels", subpixel)
        )

    @classmethod
    def parallelogram(
        cls, height: float, width: float, degrees: float, *, subpixel: bool = False
    ) -> StencilPatch:
        """Return a parallelogram with level top and bottom, its sides ``degrees`` off upright."""
        if not -90 < degrees < 90:
            raise PatchproofError(f"parallelogram: expected degrees in (-90, 90), got {degrees!r}")
        slant = height * math.tan(math.radians(degrees))
        top_left, top_right, *bottom = _box_corners(height, width)
        corners = [(0.0, slant + top_left[1]), (0.0, slant + top_right[1]), *bottom]
        name = f"{height:g}x{width:g} parallelogram at {degrees:g} degrees"
        return cls(touched_pixels(corners, subpixel), _sub(name, subpixel))

    @property
    def shape(self) -> Shape:
        """The pixels of the patch."""
        return Shape.of(_stencil(self.rows))

    def at(self, locations: Locations) -> StencilPatch:
        """Return the same shape at other places."""
        return StencilPatch(self.rows, self.name, locations)

    def bounding_rectangle(self) -> RectanglePatch:
        """Return the smallest upright rectangle that holds the patch, at the same locations.

        Of a turned patch it is what randomized cropping, Section 4.3, takes. It contains the patch
        at every place.
        """
        shape = self.shape
        return _rectangle(shape.height, shape.width, self.locations)

    def shapes(self, image_size: ImageSize) -> tuple[Shape, ...]:
        """Return the shape."""
        return (_fitting(self.shape, image_size),)

    def regions(self, image_size: ImageSize) -> Regions:
        """List every placement inside the image and the allowed locations."""
        return _placements(self.shapes(image_size), image_size, self.locations)

    def label(self) -> str:
        """Return the name, the pixels and the box."""
        shape = self.shape
        return (
            f"{self.name} ({shape.area} pixels in {shape.height}x{shape.width})"
            f"{_place_in_short(self.locations)}"
        )

    def describe(self) -> str:
        """Say the shape and where it may be."""
        shape = self.shape
        return (
            f"one {self.name}, {shape.area} pixels in a box of {shape.height}x{shape.width}, with "
            f"any content, {_place(self.locations)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the shape and its locations as JSON values."""
        return {
            "type": "stencil",
            "rows": list(self.rows),
            "name": self.name,
            "locations": _listed(self.locations),
        }


@dataclass(frozen=True)
class SparsePixels(Threat):
    """Any few pixels anywhere, all channels of each, with any content (IBP, Section 4.3).

    The pixels need not be neighbours, so that their sets are too many to list: the one region is
    the whole image. Only ``IntervalBoundPropagation`` certifies it; defenses that look at views
    would have to assume that every view is corrupted.

    Attributes:
        count: the largest number of pixels.
    """

    count: int

    def __post_init__(self) -> None:
        if not _is_count(self.count):
            raise PatchproofError(f"number of pixels: expected at least 1, got {self.count!r}")

    def shapes(self, image_size: ImageSize) -> tuple[Shape, ...]:
        """Raise ``PatchproofError``: the pixels have no shape."""
        raise self._not_listed()

    def regions(self, image_size: ImageSize) -> Regions:
        """Return one region, the whole image, of which no more than ``count`` pixels change.

        Raises:
            PatchproofError: more pixels than the image has.
        """
        height, width = check_image_size(image_size)
        if self.count > height * width:
            raise PatchproofError(
                f"number of pixels: expected at most the {height * width} of a {height}x{width} "
                f"image, got {self.count}"
            )
        return Regions(image_size, torch.tensor([[[0, 0, height, width]]]))

    def label(self) -> str:
        """Return such as ``"4 pixels"``."""
        return "1 pixel" if self.count == 1 else f"{self.count} pixels"

    def describe(self) -> str:
        """Say how many pixels."""
        if self.count == 1:
            return "any one pixel of the image, with any content in all its channels"
        return f"any {self.count} pixels of the image, with any content in all their channels"

    def to_dict(self) -> dict[str, Any]:
        """Return the number of pixels as JSON values."""
        return {"type": "sparse", "count": self.count}

    def corruption(self, visible: PixelSets) -> Corruption:
        """Raise ``PatchproofError``: the sets of views that the pixels corrupt are too many."""
        raise self._not_listed()

    def _not_listed(self) -> PatchproofError:
        return PatchproofError(
            f"threat: expected patches, whose places can be listed, got {self.describe()}: take "
            "IntervalBoundPropagation (--defense interval-bounds), or count patches of 1x1 pixels "
            "(--patch '2*1')"
        )


@dataclass(frozen=True)
class AnyPatch(Threat):
    """One patch of any of several kinds: the worst case over them.

    Attributes:
        threats: what the patch may be, each of them once; all of one patch.
        name: what they are called together; by default their labels.
    """

    threats: tuple[Threat, ...]
    name: str = ""

    def __init__(self, threats: Iterable[Threat], name: str = "") -> None:
        members: list[Threat] = []
        for threat in threats:
            members += threat.threats if isinstance(threat, AnyPatch) else [_one_patch(threat)]
        if not members:
            raise PatchproofError("patches to choose from: expected at least one, got none")
        object.__setattr__(self, "threats", tuple(dict.fromkeys(members)))
        object.__setattr__(self, "name", name)

    def shapes(self, image_size: ImageSize) -> tuple[Shape, ...]:
        """Return the shapes of all that are not part of another."""
        return largest(shape for threat in self.threats for shape in threat.shapes(image_size))

    def regions(self, image_size: ImageSize) -> Regions:
        """List the regions of all, those that several have in common once."""
        groups = [threat.regions(image_size).parts for threat in self.threats]
        return Regions.join(image_size, groups).distinct()

    def label(self) -> str:
        """Return the name, or such as ``"5x5 square or 3x8 rectangle"``."""
        return self.name or " or ".join(threat.label() for threat in self.threats)

    def describe(self) -> str:
        """Say what the patch may be."""
        kinds = "; ".join(threat.label() for threat in self.threats)
        return (
            "one patch with any content, any of these (anywhere on the image where no place is "
            f"said): {kinds}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what the patch may be as JSON values."""
        return {
            "type": "any",
            "threats": [threat.to_dict() for threat in self.threats],
            "name": self.name,
        }


@dataclass(frozen=True)
class MultiplePatches(Threat):
    """Several patches at once, each with any content, anywhere that one may be (Section 5.1).

    Attributes:
        count: the largest number of patches.
        patch: what each of them may be.
    """

    count: int
    patch: Threat

    def __post_init__(self) -> None:
        if not _is_count(self.count):
            raise PatchproofError(f"number of patches: expected at least 1, got {self.count!r}")
        _one_patch(self.patch)

    @property
    def patches(self) -> int:
        """How many patches there are; each takes one of ``regions``."""
        return self.count

    def shapes(self, image_size: ImageSize) -> tuple[Shape, ...]:
        """Return the shapes of each patch."""
        return self.patch.shapes(image_size)

    def regions(self, image_size: ImageSize) -> Regions:
        """List the regions of each patch; they combine freely."""
        return self.patch.regions(image_size)

    def corruption(self, visible: PixelSets) -> Corruption:
        """Combine the sets of views that one patch corrupts.

        A view is corrupted if it sees a pixel of any of the patches. Only the largest sets of views
        that one patch can corrupt are combined: a certificate that holds for these holds for the
        smaller ones.
        """
        return self.patch.corruption(visible).combined(self.count)

    def label(self) -> str:
        """Return such as ``"2 patches: 5x5 square"``."""
        return f"{self.count} patches: {self.patch.label()}"

    def describe(self) -> str:
        """Say how many patches and what each may be."""
        return f"up to {self.count} patches at once, each {self.patch.describe()}"

    def to_dict(self) -> dict[str, Any]:
        """Return the number and the patch as JSON values."""
        return {"type": "multiple", "count": self.count, "patch": self.patch.to_dict()}


def threat_from_dict(values: dict[str, Any]) -> Threat:
    """Return the threat that ``Threat.to_dict`` wrote."""
    place = _check_locations(values.get("locations", "anywhere"), ())
    match values:
        case {"type": "rectangle", "height": int(height), "width": int(width)}:
            return _rectangle(height, width, place)
        case {"type": "rectangles", "sizes": [*sizes]}:
            return RectanglePatches(sizes, place)
        case {"type": "any-rectangle", "max_pixels": int(pixels)}:
            return AnyRectangle(pixels, place)
        case {"type": "stencil", "rows": [*rows], "name": str(name)}:
            return StencilPatch(rows, name, place)
        case {"type": "any", "threats": [*threats], "name": str(name)} if all(
            isinstance(threat, dict) for threat in threats
        ):
            return AnyPatch(map(threat_from_dict, threats), name)
        case {"type": "multiple", "count": int(count), "patch": dict(patch)}:
            return MultiplePatches(count, threat_from_dict(patch))
        case {"type": "sparse", "count": int(count)}:
            return SparsePixels(count)
    raise PatchproofError(f"expected a threat written by to_dict, got {values!r}")


def _rectangle(height: int, width: int, locations: Locations) -> RectanglePatch:
    """Return a rectangle, as a square where it is one."""
    if height == width:
        return SquarePatch(height, locations)
    return RectanglePatch(height, width, locations)


def _one_patch(threat: object) -> Threat:
    if not isinstance(threat, Threat) or isinstance(threat, (MultiplePatches, SparsePixels)):
        raise PatchproofError(f"patch: expected a threat of one patch, got {threat!r}")
    return threat


def _placements(shapes: tuple[Shape, ...], image_size: ImageSize, locations: Locations) -> Regions:
    """List the regions of each shape inside the image and the locations."""
    height, width = image_size
    area = locations if isinstance(locations, Box) else Box(0, 0, height, width)
    if area.top + area.height > height or area.left + area.width > width:
        raise PatchproofError(
            f"locations: expected a box inside the {height}x{width} image, got {area}"
        )
    groups = []
    for shape in dict.fromkeys(shapes):
        tops = range(area.top, area.top + area.height - shape.height + 1)
        lefts = range(area.left, area.left + area.width - shape.width + 1)
        if locations == "corners":
            tops, lefts = _ends(tops), _ends(lefts)
        corners = torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts))
        offsets = torch.nn.functional.pad(corners, (0, 2))
        groups.append(offsets[:, None] + torch.tensor(shape.parts))
    return Regions.join(image_size, groups)


def _fitting(shape: Shape, image_size: ImageSize) -> Shape:
    height, width = check_image_size(image_size)
    if shape.height > height or shape.width > width:
        raise PatchproofError(
            f"expected a patch no larger than the {height}x{width} image, "
            f"got {shape.height}x{shape.width}"
        )
    return shape


def _check_sides(height: object, width: object) -> None:
    for name, side in (("height", height), ("width", width)):
        if not _is_count(side):
            raise PatchproofError(f"patch {name}: expected pixels >= 1, got {side!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_locations(locations: Locations, shapes: tuple[Shape, ...]) -> Locations:
    """Return where the patch may be, or raise where it is no place, or too small for a shape."""
    if isinstance(locations, str):
        if locations not in ("anywhere", "corners"):
            raise PatchproofError(
                f"locations: expected 'anywhere', 'corners' or a box, got {locations!r}"
            )
        return locations
    try:
        box = Box(*locations)
    except TypeError as error:
        raise PatchproofError(
            f"locations: expected 'anywhere', 'corners' or a box, got {locations!r}"
        ) from error
    height = max((shape.height for shape in shapes), default=1)
    width = max((shape.width for shape in shapes), default=1)
    if box.top < 0 or box.left < 0 or box.height < height or box.width < width:
        raise PatchproofError(
            f"locations: expected a box inside the image that holds a {height}x{width} patch, "
            f"got {box}"
        )
    return box


def _place(locations: Locations) -> str:
    if locations == "anywhere":
        return "anywhere on the image"
    if locations == "corners":
        return "in one of the image's corners"
    box = Box(*locations)
    return (
        f"within rows {box.top} to {box.top + box.height - 1} "
        f"and columns {box.left} to {box.left + box.width - 1}"
    )


def _place_in_short(locations: Locations) -> str:
    if isinstance(locations, str):
        return {"anywhere": "", "corners": " in a corner"}[locations]
    return " in a box"


def _listed(locations: Locations) -> str | list[int]:
    return locations if isinstance(locations, str) else list(locations)


def _pixels(fraction: float | Decimal, image_size: ImageSize) -> Decimal:
    """Return a share of the image's pixels, the fraction read as its decimal digits say."""
    height, width = check_image_size(image_size)
    if not 0 < fraction <= 1:
        raise PatchproofError(f"fraction of pixels: expected in (0, 1], got {fraction!r}")
    digits = fraction if isinstance(fraction, Decimal) else Decimal(repr(float(fraction)))
    return digits * height * width


def _stencil(pixels: Tensor | Sequence[Sequence[Any]]) -> Tensor:
    """Return (h, w) bool from a tensor or array, or from rows such as ``"#.#"``."""
    if isinstance(pixels, (list, tuple)) and pixels and all(isinstance(r, str) for r in pixels):
        pixels = [[pixel == "#" for pixel in row] for row in pixels]
    try:
        mask = torch.as_tensor(pixels)
    except (TypeError, ValueError) as error:
        raise PatchproofError(f"stencil: expected rows of equal length, got {error}") from error
    if mask.ndim != 2:
        raise PatchproofError(f"stencil: expected shape (h, w), got {tuple(mask.shape)}")
    return mask != 0


def _box_corners(height: float, width: float) -> list[Point]:
    if not min(height, width) > 0:
        raise PatchproofError(f"expected a patch of positive lengths, got {height:g} and {width:g}")
    return [(0.0, 0.0), (0.0, width), (height, width), (height, 0.0)]


def _turned(corners: list[Point], degrees: float) -> list[Point]:
    """Turn the points counterclockwise, as one sees an image (rows go down)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(row * cos - column * sin, row * sin + column * cos) for row, column in corners]


def _sub(name: str, subpixel: bool) -> str:
    return f"{name}, between pixels" if subpixel else name


def _ends(positions: range) -> range:
    """Return the first and last position (one where they coincide)."""
    return range(positions[0], positions[-1] + 1, max(1, positions[-1] - positions[0]))
