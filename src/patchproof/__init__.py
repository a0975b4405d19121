"""Provable robustness of image classifiers against adversarial patches."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchproof.defenses import (
        BagCert,
        ClippedBagNet,
        DerandomizedSmoothing,
        DigitalWatermarking,
        IntervalBoundPropagation,
        LocalGradientSmoothing,
        MinorityReports,
        PatchCleanser,
        PatchGuard,
        PatchGuardPlusPlus,
        RandomizedCropping,
        RobustStatistics,
        TopCertification,
        Undefended,
        ViewDefense,
        ViewDetector,
        load,
    )
    from patchproof.detection import DetectionCertification, Thresholds, TradeOff
    from patchproof.errors import PatchproofError, RunError
    from patchproof.models.ablation import Ablation
    from patchproof.probability import ProbableCertification
    from patchproof.results import ALERT, Case, Certification, Prediction, Verdict
    from patchproof.threat import (
        AnyPatch,
        AnyRectangle,
        Box,
        MaskSet,
        MultiplePatches,
        RectanglePatch,
        RectanglePatches,
        Regions,
        SparsePixels,
        SquarePatch,
        StencilPatch,
        Threat,
        transformations,
    )

__version__ = "0.1.0"

__all__ = [
    "ALERT",
    "Ablation",
    "AnyPatch",
    "AnyRectangle",
    "BagCert",
    "Box",
    "Case",
    "Certification",
    "ClippedBagNet",
    "DerandomizedSmoothing",
    "DetectionCertification",
    "DigitalWatermarking",
    "IntervalBoundPropagation",
    "LocalGradientSmoothing",
    "MaskSet",
    "MinorityReports",
    "MultiplePatches",
    "PatchCleanser",
    "PatchGuard",
    "PatchGuardPlusPlus",
    "PatchproofError",
    "Prediction",
    "ProbableCertification",
    "RandomizedCropping",
    "RectanglePatch",
    "RectanglePatches",
    "Regions",
    "RobustStatistics",
    "RunError",
    "SparsePixels",
    "SquarePatch",
    "StencilPatch",
    "Threat",
    "Thresholds",
    "TopCertification",
    "TradeOff",
    "Undefended",
    "Verdict",
    "ViewDefense",
    "ViewDetector",
    "load",
    "transformations",
]

_HOMES = ("errors", "threat", "results", "defenses", "detection", "models.ablation", "probability")
"""Where the names above are."""


def __getattr__(name: str) -> Any:
    """Import what is asked for, by then: the command speaks before PyTorch is there."""
    if name in __all__:
        for home in _HOMES:
            value = vars(import_module(f"patchproof.{home}")).get(name)
            if value is not None:
                globals()[name] = value
                return value
    if not name.startswith("_") and find_spec(f"patchproof.{name}") is not None:
        return import_module(f"patchproof.{name}")
    raise AttributeError(f"module 'patchproof' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
