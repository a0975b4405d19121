"""The named systems: each is views and an aggregation, evaluated by one loop, or bounds.

And three without a certificate, which attacks are for.
"""

from patchproof.defenses.bagcert import BagCert
from patchproof.defenses.clipped_bagnet import ClippedBagNet
from patchproof.defenses.derandomized_smoothing import DerandomizedSmoothing
from patchproof.defenses.digital_watermarking import DigitalWatermarking
from patchproof.defenses.interval_bound_propagation import IntervalBoundPropagation
from patchproof.defenses.loading import (
    AnyDefense,
    FeatureDefense,
    HeuristicDefense,
    NamedDefense,
    load,
)
from patchproof.defenses.local_gradient_smoothing import LocalGradientSmoothing
from patchproof.defenses.minority_reports import MinorityReports
from patchproof.defenses.patchcleanser import PatchCleanser
from patchproof.defenses.patchguard import PatchGuard, TopCertification
from patchproof.defenses.patchguard_plus_plus import PatchGuardPlusPlus
from patchproof.defenses.randomized_cropping import RandomizedCropping
from patchproof.defenses.robust_statistics import RobustStatistics
from patchproof.defenses.undefended import Undefended
from patchproof.defenses.view_defense import ViewDefense, ViewDetector

__all__ = [
    "AnyDefense",
    "BagCert",
    "ClippedBagNet",
    "DerandomizedSmoothing",
    "DigitalWatermarking",
    "FeatureDefense",
    "HeuristicDefense",
    "IntervalBoundPropagation",
    "LocalGradientSmoothing",
    "MinorityReports",
    "NamedDefense",
    "PatchCleanser",
    "PatchGuard",
    "PatchGuardPlusPlus",
    "RandomizedCropping",
    "RobustStatistics",
    "TopCertification",
    "Undefended",
    "ViewDefense",
    "ViewDetector",
    "load",
]
