"""Provable robustness of image classifiers against adversarial patches."""

from patchproof.defenses import (
    BagCert,
    ClippedBagNet,
    DerandomizedSmoothing,
    MinorityReports,
    PatchCleanser,
    PatchGuard,
    PatchGuardPlusPlus,
    RobustStatistics,
    TopCertification,
    ViewDefense,
    ViewDetector,
    load,
)
from patchproof.detection import DetectionCertification, Thresholds, TradeOff
from patchproof.models.ablation import Ablation
from patchproof.results import (
    ALERT,
    Case,
    Certification,
    PatchproofError,
    Prediction,
    RunError,
    Verdict,
)
from patchproof.threat import (
    AnyRectangle,
    Box,
    MaskSet,
    MultiplePatches,
    RectanglePatch,
    RectanglePatches,
    Regions,
    SquarePatch,
    StencilPatch,
    Threat,
)

__version__ = "0.1.0"

__all__ = [
    "ALERT",
    "Ablation",
    "AnyRectangle",
    "BagCert",
    "Box",
    "Case",
    "Certification",
    "ClippedBagNet",
    "DerandomizedSmoothing",
    "DetectionCertification",
    "MaskSet",
    "MinorityReports",
    "MultiplePatches",
    "PatchCleanser",
    "PatchGuard",
    "PatchGuardPlusPlus",
    "PatchproofError",
    "Prediction",
    "RectanglePatch",
    "RectanglePatches",
    "Regions",
    "RobustStatistics",
    "RunError",
    "SquarePatch",
    "StencilPatch",
    "Threat",
    "Thresholds",
    "TopCertification",
    "TradeOff",
    "Verdict",
    "ViewDefense",
    "ViewDetector",
    "load",
]
