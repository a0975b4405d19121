"""What the model sees of an image: views, and which patch regions corrupt which of them."""

from patchproof.views.ablated import AblatedViews
from patchproof.views.base import Views
from patchproof.views.local import LocalFeatureViews
from patchproof.views.masked import MaskPairViews
from patchproof.views.occluded import OccludedViews, UnmaskedAndMaskedViews
from patchproof.views.receptive import ReceptiveFields, receptive_fields

__all__ = [
    "AblatedViews",
    "LocalFeatureViews",
    "MaskPairViews",
    "OccludedViews",
    "ReceptiveFields",
    "UnmaskedAndMaskedViews",
    "Views",
    "receptive_fields",
]
