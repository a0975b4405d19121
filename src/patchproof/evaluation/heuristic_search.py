"""Search for the best settings of a defense without a certificate (Chiang et al., 2020, Section 5).

The papers of these defenses name no way to choose their settings. Here they are chosen against an
attacker who does not know of the defense, as those papers attack; an attacker who does needs no
less than another attack on the settings that were chosen (``evaluation.attack``). Choose on
validation images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

import pandas as pd
from torch import Tensor

from patchproof.attacks import PatchAttack, Victim
from patchproof.defenses import (
    DigitalWatermarking,
    HeuristicDefense,
    LocalGradientSmoothing,
    Undefended,
)
from patchproof.errors import PatchproofError
from patchproof.evaluation.feature_analyses import accuracies

Settings = Mapping[str, Any]
"""Arguments of a defense by their names."""

Tunable = LocalGradientSmoothing | DigitalWatermarking
"""The defenses that have settings."""

_ROUNDING = 1e-9
"""Differences of accuracies that differ by no more are equal."""


@dataclass(frozen=True, eq=False)
class AttackedImages:
    """N labelled images, and what an attacker made of them who knows of no defense.

    Attributes:
        clean: (N, C, H, W) float32 in [0, 1].
        attacked: (N, C, H, W) float32 in [0, 1].
        labels: (N,) int64.
    """

    clean: Tensor
    attacked: Tensor
    labels: Tensor

    @classmethod
    def of(
        cls,
        undefended: Undefended,
        attack: PatchAttack,
        images: Tensor,
        labels: Tensor,
        indices: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Self:
        """Attack an undefended network.

        Images that it gets wrong stay as they are.

        Args:
            undefended: the network, and what the attacker may do.
            attack: how.
            images: (N, C, H, W) float32 in [0, 1].
            labels: (N,) integers, the right classes.
            indices: (N,) integers that name the images, for their random numbers.
            progress: called with the number of images still under attack.
        """
        victim = Victim.of_undefended(undefended.model, undefended.device)
        result = attack.run(
            victim, images, labels, threat=undefended.threat, indices=indices, progress=progress
        )
        return cls(images, result.images.cpu(), labels.long())

    def right(self, defense: HeuristicDefense) -> dict[str, Tensor]:
        """Return which images a defense gets right, (N,) bool, clean and attacked."""
        return {
            "clean": defense.predict(self.clean) == self.labels,
            "attacked": defense.predict(self.attacked) == self.labels,
        }


def all_settings(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return each combination of a grid, by the names and values of each setting."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def possible_defenses(
    family: Callable[..., Tunable],
    undefended: Undefended,
    settings: Iterable[Settings],
    **shared: Any,
) -> list[Tunable]:
    """Return a defense of each of the settings but those that it refuses.

    Args:
        family: the class of the defense.
        undefended: the network, and what the attacker may do.
        settings: arguments of the defense by their names.
        **shared: more arguments of all of them.

    Raises:
        PatchproofError: no settings, or all are refused.
    """
    made: list[Tunable] = []
    refusal = PatchproofError("settings: expected at least one, got none")
    for chosen in settings:
        try:
            made.append(
                family(
                    undefended.model,
                    undefended.threat,
                    image_size=undefended.image_size,
                    **chosen,
                    **shared,
                )
            )
        except PatchproofError as error:
            refusal = error
    if not made:
        raise refusal
    return made


def search_settings(
    undefended: Undefended,
    defenses: Sequence[Tunable],
    images: AttackedImages,
    most_lost: float = 1.0,
) -> pd.DataFrame:
    """Try defenses on images that were attacked without knowledge of them.

    Args:
        undefended: the network that they defend.
        defenses: of one class, with the settings that are tried.
        images: clean and attacked.
        most_lost: the most clean accuracy, in [0, 1], that the best may lose of the undefended one.

    Returns:
        A row for each defense: all its settings, then ``count``, and with the ends of their 95%
        Wilson intervals ``clean`` (the share right on clean images), ``attacked`` (the share right
        on attacked images) and the same of the undefended network, ``vanilla`` and
        ``vanilla_attacked``. ``best`` is True in one row: of those that lose no more clean accuracy
        than ``most_lost``, that with the highest share on attacked images; of equal ones, with the
        highest clean accuracy, and then the first. In none where all lose more.

    Raises:
        PatchproofError: no images or defenses, or ``most_lost`` out of range.
    """
    if not len(images.labels) or not defenses:
        raise PatchproofError(
            "expected at least one image and one defense, "
            f"got {len(images.labels)} and {len(defenses)}"
        )
    if not 0.0 <= most_lost <= 1.0:
        raise PatchproofError(f"most_lost: expected a share in [0, 1], got {most_lost!r}")
    vanilla = images.right(undefended)
    shared = {"vanilla": vanilla["clean"], "vanilla_attacked": vanilla["attacked"]}
    table = pd.DataFrame(
        defense.settings()
        | {"count": len(images.labels)}
        | accuracies(**images.right(defense), **shared)
        for defense in defenses
    )
    table["best"] = table.index == _best(table, most_lost)
    return table


def _best(table: pd.DataFrame, most_lost: float) -> int | None:
    """Return the row of the best settings; None where all lose more than ``most_lost``."""
    kept = table[table["vanilla"] - table["clean"] <= most_lost + _ROUNDING]
    if kept.empty:
        return None
    return int(kept.sort_values(["attacked", "clean"], ascending=False, kind="stable").index[0])
