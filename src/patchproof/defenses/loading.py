"""Loading a defense that was saved with its model."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from patchproof.defenses.bagcert import BagCert
from patchproof.defenses.clipped_bagnet import ClippedBagNet
from patchproof.defenses.derandomized_smoothing import DerandomizedSmoothing
from patchproof.defenses.digital_watermarking import DigitalWatermarking
from patchproof.defenses.interval_bound_propagation import IntervalBoundPropagation
from patchproof.defenses.local_gradient_smoothing import LocalGradientSmoothing
from patchproof.defenses.minority_reports import MinorityReports
from patchproof.defenses.patchcleanser import PatchCleanser
from patchproof.defenses.patchguard import PatchGuard
from patchproof.defenses.patchguard_plus_plus import PatchGuardPlusPlus
from patchproof.defenses.randomized_cropping import RandomizedCropping
from patchproof.defenses.robust_statistics import RobustStatistics
from patchproof.defenses.undefended import Undefended
from patchproof.errors import PatchproofError
from patchproof.models import load_classifier

FeatureDefense = (
    PatchGuard
    | PatchGuardPlusPlus
    | ClippedBagNet
    | DerandomizedSmoothing
    | BagCert
    | RobustStatistics
)
NamedDefense = (
    PatchCleanser | MinorityReports | FeatureDefense | IntervalBoundPropagation | RandomizedCropping
)
"""The defenses with a certificate."""

HeuristicDefense = Undefended | LocalGradientSmoothing | DigitalWatermarking
"""Those without."""

AnyDefense = NamedDefense | HeuristicDefense

_TYPES: dict[str, type[AnyDefense]] = {
    defense.__name__: defense for defense in get_args(AnyDefense)
}


def load(path: Path | str, *, device: str = "cpu", allow_code: bool = False) -> AnyDefense:
    """Load a defense that its ``save`` wrote, with its model in eval mode on ``device``.

    Args:
        path: the file.
        device: where the model goes.
        allow_code: let the file name a ``python:`` factory, which is imported and called: only for
            files from somebody you trust.

    Raises:
        PatchproofError: no such file, a file without a defense, or a defense of another version.
        RunError: weights that are damaged or do not fit the model that the card names.
    """
    model, card = load_classifier(path, allow_code=allow_code)
    values = card["made"].get("defense")
    if values is None:
        raise PatchproofError(f"expected a file with a defense, got a classifier alone: {path}")
    if values["type"] not in _TYPES:
        raise PatchproofError(
            f"expected a defense of type {' or '.join(_TYPES)}, got {values['type']}: {path}"
        )
    return _TYPES[values["type"]].from_dict(model.to(device), values)
