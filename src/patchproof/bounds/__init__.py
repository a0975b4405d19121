"""Bounds of what a network says over all contents of a patch, by interval arithmetic."""

from patchproof.bounds.boxes import PatchBoxes, patch_boxes
from patchproof.bounds.propagation import BoundedNetwork

__all__ = ["BoundedNetwork", "PatchBoxes", "patch_boxes"]
