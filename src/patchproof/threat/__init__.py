"""What the attacker may do: patch shapes, their regions, and mask sets that cover them."""

from patchproof.threat.masks import MaskSet
from patchproof.threat.patches import RectanglePatch, SquarePatch, Threat, threat_from_dict
from patchproof.threat.regions import Box, Regions

__all__ = [
    "Box",
    "MaskSet",
    "RectanglePatch",
    "Regions",
    "SquarePatch",
    "Threat",
    "threat_from_dict",
]
