"""What the attacker may do: patch shapes, their regions, and mask sets that cover them."""

from patchproof.threat.masks import MaskSet
from patchproof.threat.patches import (
    AnyPatch,
    AnyRectangle,
    MultiplePatches,
    RectanglePatch,
    RectanglePatches,
    SparsePixels,
    SquarePatch,
    StencilPatch,
    Threat,
    threat_from_dict,
)
from patchproof.threat.regions import Box, PixelSets, Regions
from patchproof.threat.shapes import Shape
from patchproof.threat.transformations import transformations

__all__ = [
    "AnyPatch",
    "AnyRectangle",
    "Box",
    "MaskSet",
    "MultiplePatches",
    "PixelSets",
    "RectanglePatch",
    "RectanglePatches",
    "Regions",
    "Shape",
    "SparsePixels",
    "SquarePatch",
    "StencilPatch",
    "Threat",
    "threat_from_dict",
    "transformations",
]
