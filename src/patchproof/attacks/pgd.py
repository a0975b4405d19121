"""Projected gradient ascent on the pixels of a patch (Madry et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from patchproof.attacks.gradient import GradientAttack


@dataclass(frozen=True, kw_only=True)
class PatchPGD(GradientAttack):
    """Steps by the sign of the gradient from random contents, on the pixels of the patch alone.

    With several surrogates of the victim it aims at each in turn, so that with the defaults it is
    an adaptive attack on any defense of this library.
    """

    name: ClassVar[str] = "pgd"
