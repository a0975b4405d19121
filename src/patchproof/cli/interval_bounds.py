"""The defense by interval bounds, by the options of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from patchproof.errors import PatchproofError

if TYPE_CHECKING:
    from torch import nn

    from patchproof.defenses import IntervalBoundPropagation
    from patchproof.threat import Threat

INTERVAL_BOUNDS = "interval-bounds"
"""What ``--defense`` calls it."""

_OPTIONS = ("method", "screen")


def build_interval_bounds(
    model: nn.Module, threat: Threat, options: Mapping[str, Any], **shared: Any
) -> IntervalBoundPropagation:
    """Bound a model as ``--defense-option`` says.

    Args:
        model: the classifier.
        threat: what the attacker may do.
        options: the values of ``--defense-option`` by their names.
        **shared: more arguments of the defense.

    Raises:
        PatchproofError: an option that the defense does not take, or a model without bounds.
    """
    from patchproof.defenses import IntervalBoundPropagation

    if unknown := [option for option in options if option not in _OPTIONS]:
        raise PatchproofError(
            f"--defense-option: expected {' or '.join(_OPTIONS)} for {INTERVAL_BOUNDS}, "
            f"got {unknown[0]!r}"
        )
    return IntervalBoundPropagation(model, threat, **options, **shared)
