"""What the model sees of an image: views, and which patch regions corrupt which of them."""

from patchproof.views.base import Views
from patchproof.views.masked import MaskPairViews

__all__ = ["MaskPairViews", "Views"]
