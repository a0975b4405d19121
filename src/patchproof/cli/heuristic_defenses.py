"""The defenses without a certificate by their names, and the options that each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchproof.errors import PatchproofError

if TYPE_CHECKING:
    from torch import nn

    from patchproof.defenses import HeuristicDefense
    from patchproof.threat import Threat

WATERMARKING = "digital-watermarking"
"""The one that hides pixels."""


@dataclass(frozen=True)
class _Named:
    """What a name stands for.

    Attributes:
        type: the class, one of ``patchproof.defenses``.
        options: the arguments that ``--defense-option`` may give.
    """

    type: str
    options: tuple[str, ...]


HEURISTIC_DEFENSES = {
    "undefended": _Named("Undefended", ()),
    "local-gradient-smoothing": _Named(
        "LocalGradientSmoothing", ("window", "overlap", "threshold", "smoothing")
    ),
    WATERMARKING: _Named("DigitalWatermarking", ("window", "regions", "threshold", "opening")),
}
"""What ``--defense`` names to be attacked."""

_EXPECTED = {
    "window": "a side in pixels such as 5",
    "overlap": "a number of pixels such as 2",
    "regions": "a number of squares such as 1",
    "opening": "a side in pixels such as 2",
    "threshold": "a number from 0 to 1 such as 0.1",
    "smoothing": "a number above 0 such as 2.3",
}
_PLAIN_NUMBERS = ("threshold", "smoothing")


def build_heuristic_defense(
    name: str, model: nn.Module, threat: Threat, options: Mapping[str, Any], **shared: Any
) -> HeuristicDefense:
    """Put a step before a model as ``--defense`` and ``--defense-option`` say.

    Args:
        name: one of ``HEURISTIC_DEFENSES``.
        model: the classifier.
        threat: what an attacker may do.
        options: the values of ``--defense-option`` by their names.
        **shared: more arguments of the defense.

    Raises:
        PatchproofError: an option that the defense does not take, or a value of another type or out
            of range.
    """
    from patchproof import defenses

    which = HEURISTIC_DEFENSES[name]
    if unknown := [option for option in options if option not in which.options]:
        known = f"one of {', '.join(which.options)}" if which.options else "none"
        raise PatchproofError(f"--defense-option: expected {known} for {name}, got {unknown[0]!r}")
    values = {
        option: read_setting(f"--defense-option {option}", option, value)
        for option, value in options.items()
    }
    build: Callable[..., HeuristicDefense] = getattr(defenses, which.type)
    return build(model, threat, **values, **shared)


def read_setting(where: str, name: str, value: Any) -> int | float:
    """Return the argument that a value means.

    Args:
        where: the option that brings it, for the message.
        name: of the argument.
        value: from JSON.

    Raises:
        PatchproofError: a value of another type.
    """
    kinds = (int, float) if name in _PLAIN_NUMBERS else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise PatchproofError(f"{where}: expected {_EXPECTED[name]}, got {value!r}")
    return value
