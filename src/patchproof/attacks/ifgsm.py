"""The iterative fast gradient sign method on a patch (Chiang et al., 2020, Section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from patchproof.attacks.base import Loss
from patchproof.attacks.gradient import GradientAttack, Schedule, Start


@dataclass(frozen=True, kw_only=True)
class PatchIFGSM(GradientAttack):
    """Equal steps by the sign of the gradient from the image as it is, with momentum.

    The attack that the heuristic defenses were broken with (Kurakin et al., 2017; momentum: Dong et
    al., 2018).
    """

    loss: Loss = "cross-entropy"
    steps: int = 50
    step_size: float = 0.05
    schedule: Schedule = "constant"
    momentum: float = 0.9
    start: Start = "image"

    name: ClassVar[str] = "ifgsm"
