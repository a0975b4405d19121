"""Provable robustness of image classifiers against adversarial patches."""

from patchproof.defenses import PatchCleanser, ViewDefense, load
from patchproof.results import (
    ALERT,
    Case,
    Certification,
    PatchproofError,
    Prediction,
    RunError,
    Verdict,
)
from patchproof.threat import Box, MaskSet, RectanglePatch, Regions, SquarePatch, Threat

__version__ = "0.1.0"

__all__ = [
    "ALERT",
    "Box",
    "Case",
    "Certification",
    "MaskSet",
    "PatchCleanser",
    "PatchproofError",
    "Prediction",
    "RectanglePatch",
    "Regions",
    "RunError",
    "SquarePatch",
    "Threat",
    "Verdict",
    "ViewDefense",
    "load",
]
