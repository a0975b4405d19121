"""Patch attacks: the upper side of a certified accuracy."""

from patchproof.attacks.base import AttackResult, PatchAttack, Problem
from patchproof.attacks.gradient import GradientAttack
from patchproof.attacks.ifgsm import PatchIFGSM
from patchproof.attacks.lavan import LaVAN
from patchproof.attacks.pgd import PatchPGD
from patchproof.attacks.places import PlaceSearch
from patchproof.attacks.square import SquareSearch
from patchproof.attacks.universal import (
    PrintablePatch,
    UniversalAttack,
    UniversalTraining,
    train_universal_patch,
)
from patchproof.attacks.victim import Victim

__all__ = [
    "AttackResult",
    "GradientAttack",
    "LaVAN",
    "PatchAttack",
    "PatchIFGSM",
    "PatchPGD",
    "PlaceSearch",
    "PrintablePatch",
    "Problem",
    "SquareSearch",
    "UniversalAttack",
    "UniversalTraining",
    "Victim",
    "train_universal_patch",
]
