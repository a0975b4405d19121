"""Provable robustness of image classifiers against adversarial patches."""

from patchproof.defenses import MinorityReports, PatchCleanser, ViewDefense, ViewDetector, load
from patchproof.detection import DetectionCertification, Thresholds, TradeOff
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
    "AnyRectangle",
    "Box",
    "Case",
    "Certification",
    "DetectionCertification",
    "MaskSet",
    "MinorityReports",
    "MultiplePatches",
    "PatchCleanser",
    "PatchproofError",
    "Prediction",
    "RectanglePatch",
    "RectanglePatches",
    "Regions",
    "RunError",
    "SquarePatch",
    "StencilPatch",
    "Threat",
    "Thresholds",
    "TradeOff",
    "Verdict",
    "ViewDefense",
    "ViewDetector",
    "load",
]
