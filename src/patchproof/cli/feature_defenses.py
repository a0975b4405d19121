"""The defenses over features by their names, and the options that each takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from patchproof.cli.options import parse_ablation, parse_pair, parse_threat
from patchproof.errors import PatchproofError

if TYPE_CHECKING:
    from torch import nn

    from patchproof.defenses import FeatureDefense
    from patchproof.threat import Threat

_VIEWS = ("ablation", "bands")


@dataclass(frozen=True)
class NamedDefense:
    """What a name stands for.

    Attributes:
        type: the class, one of ``patchproof.defenses``.
        options: the arguments that ``--defense-option`` may give.
        fixed: the arguments that the name decides.
    """

    type: str
    options: tuple[str, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)


FEATURE_DEFENSES = {
    "patchguard": NamedDefense(
        "PatchGuard", ("feature", "threshold", "window", "mask_for", "high", *_VIEWS)
    ),
    "patchguard++": NamedDefense("PatchGuardPlusPlus", ("tau", "window", "mask_for", *_VIEWS)),
    "clipped-bagnet": NamedDefense("ClippedBagNet", _VIEWS),
    "derandomized-smoothing": NamedDefense("DerandomizedSmoothing", ("vote_threshold", *_VIEWS)),
    "bagcert": NamedDefense("BagCert", ("feature", *_VIEWS)),
    **{
        name: NamedDefense(
            "RobustStatistics", (*own, "feature", "high", *_VIEWS), {"statistic": name}
        )
        for name, own in {
            "median": (),
            "trimmed-mean": ("trim",),
            "top-masking": ("count",),
        }.items()
    },
}
"""What ``--defense`` names, beyond the defenses over masks."""


def build_feature_defense(
    name: str,
    model: nn.Module,
    threat: Threat,
    options: Mapping[str, Any],
    *,
    image_size: tuple[int, int],
    **shared: Any,
) -> FeatureDefense:
    """Defend a model as ``--defense`` and ``--defense-option`` say.

    Args:
        name: one of ``FEATURE_DEFENSES``.
        model: the classifier.
        threat: what the attacker may do.
        options: the values of ``--defense-option`` by their names.
        image_size: (H, W) in pixels.
        **shared: more arguments that all defenses take.

    Raises:
        PatchproofError: an option that the defense does not take, or a value that cannot be read.
    """
    from patchproof import defenses

    which = FEATURE_DEFENSES[name]
    if unknown := [option for option in options if option not in which.options]:
        raise PatchproofError(
            f"--defense-option: expected one of {', '.join(which.options)} for {name}, "
            f"got {unknown[0]!r}"
        )
    values = {option: _read(option, value, image_size) for option, value in options.items()}
    build: Callable[..., FeatureDefense] = getattr(defenses, which.type)
    return build(model, threat, image_size=image_size, **which.fixed, **values, **shared)


def _read(option: str, value: Any, image_size: tuple[int, int]) -> Any:
    """Return the argument that a value of ``--defense-option`` means."""
    match option, value:
        case "ablation", str(text):
            return parse_ablation("--defense-option ablation", text)
        case "window", [int(rows), int(columns)]:
            return rows, columns
        case "window", int(side):
            return side
        case "window", str(text):
            return parse_pair("--defense-option window", text)
        case "mask_for", int() | str():
            return parse_threat(str(value), None, "anywhere", image_size)
        case "feature", str(text):
            return text
        case "bands" | "trim" | "count", int() if not isinstance(value, bool):
            return value
        case "vote_threshold", None:
            return None
        case "threshold" | "high" | "tau" | "vote_threshold", int() | float() if not isinstance(
            value, bool
        ):
            return float(value)
    raise PatchproofError(f"--defense-option {option}: expected {_EXPECTED[option]}, got {value!r}")


_EXPECTED = {
    "ablation": "column:4, row:4 or block:8 (pixels)",
    "bands": "a number of bands that each view keeps, such as 2",
    "window": "features a side such as 6, or rows and columns such as 6x4 or [6,4]",
    "mask_for": "a patch as --patch takes it, such as 8",
    "feature": "logits, confidence or prediction",
    "threshold": "a share of the evidence from 0 to 1, such as 0.2",
    "high": "an upper bound of logits, such as 50",
    "tau": "a confidence from 0 to 1, such as 0.6",
    "vote_threshold": "a confidence from 0 to 1, such as 0.3, or null for one vote a view",
    "trim": "a number of views, such as 10",
    "count": "a number of views, such as 30",
}
