"""Bounds of what a network says over all contents of a patch, by interval arithmetic."""

from patchproof.bounds.propagation import BoundedNetwork, PatchBoxes, patch_boxes

__all__ = ["BoundedNetwork", "PatchBoxes", "patch_boxes"]
