"""The defense by the votes of crops, by the options of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchproof.cli.options import parse_pair
from patchproof.errors import PatchproofError

if TYPE_CHECKING:
    from torch import nn

    from patchproof.defenses import RandomizedCropping
    from patchproof.threat import Threat

RANDOMIZED_CROPPING = "randomized-cropping"
"""What ``--defense`` calls it."""

_EXPECTED = {
    "mode": (str, "all-crops, fixed-crops or random-crops"),
    "crop": (None, "a side in pixels such as 10, or rows and columns such as 10x8"),
    "crops": (int, "a number of crops such as 128"),
    "replacement": (bool, "true or false"),
    "seed": (int, "a whole number"),
    "probability": (float, "a number in (0, 1) such as 0.95"),
    "samples": (int, "a number of crops such as 1000"),
    "confidence": (float, "a number in (0, 1) such as 0.99"),
}
"""What ``--defense-option`` takes: the type of its value, and what it means."""


_ONLY_IN = {
    ("crops", "replacement", "seed"): ("fixed-crops", "random-crops"),
    ("probability", "samples", "confidence"): ("random-crops",),
}


def build_randomized_cropping(
    model: nn.Module, threat: Threat, options: Mapping[str, Any], **shared: Any
) -> RandomizedCropping:
    """Let crops vote as ``--defense-option`` says.

    Args:
        model: the crop classifier.
        threat: what the attacker may do.
        options: the values of ``--defense-option`` by their names.
        **shared: more arguments of the defense.

    Raises:
        PatchproofError: an option that the defense does not take, or a value of another type.
    """
    from patchproof.defenses import RandomizedCropping

    mode = options.get("mode", "all-crops")
    for names, modes in _ONLY_IN.items():
        if mode not in modes and (given := [name for name in names if name in options]):
            raise PatchproofError(
                f"--defense-option {given[0]}: expected with mode={' or mode='.join(modes)}, "
                f"got mode={mode}"
            )
    values: dict[str, Any] = {}
    for option, value in options.items():
        if option not in _EXPECTED:
            raise PatchproofError(
                f"--defense-option: expected one of {', '.join(_EXPECTED)} for "
                f"{RANDOMIZED_CROPPING}, got {option!r}"
            )
        kind, expected = _EXPECTED[option]
        if kind is None:
            values["crop_size"] = parse_pair("--defense-option crop", str(value))
        elif type(value) is kind:
            values[option] = value
        else:
            raise PatchproofError(f"--defense-option {option}: expected {expected}, got {value!r}")
    return RandomizedCropping(model, threat, **values, **shared)
