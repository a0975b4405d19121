"""What defenses return that draw at random: certificates that hold with a probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchproof.results import Certificates, Kind


@dataclass(frozen=True)
class ProbableCertification(Certificates):
    """Certified recovery with a probability: each prediction is right at least so often.

    The probability is over what the defense draws, secretly and anew for each prediction, after the
    patch is chosen. ``prediction`` is what one draw says of the clean image. Where a defense bounds
    the probability from samples, the bound of an image holds with the defense's ``confidence``.

    Attributes:
        certified_with_probability: (N,) bool: ``success_probability`` is what was asked for, or
            more.
        success_probability: (N,) float64, a lower bound of the probability that a prediction is
            right, whatever the patch shows, at the worst patch region.
        clean_probability: (N,) float64, a lower bound of it without a patch.
        paper_condition: (N,) bool: the criterion that the defense's paper states.
    """

    certified_with_probability: Tensor
    success_probability: Tensor
    clean_probability: Tensor
    paper_condition: Tensor

    kind: ClassVar[Kind] = "probable"
