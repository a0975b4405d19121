"""What the model sees of an image: views, and which patch regions corrupt which of them."""

from patchproof.views.base import Views
from patchproof.views.masked import MaskPairViews
from patchproof.views.occluded import OccludedViews, UnmaskedAndMaskedViews

__all__ = ["MaskPairViews", "OccludedViews", "UnmaskedAndMaskedViews", "Views"]
