"""Heuristic defenses that papers broke, as steps before a network: kept to show it."""

from patchproof.preprocessing.gradient_smoothing import GradientSmoothing
from patchproof.preprocessing.saliency_masking import SaliencyMasking

__all__ = ["GradientSmoothing", "SaliencyMasking"]
