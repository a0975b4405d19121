"""The analyses of the randomized cropping paper (Section 4, Appendices C and D), as tables.

Each is a function from classifiers of crops, of which the votes at all places are recorded, to a
table with a row for each setting. An accuracy ``x`` comes with the ends of its 95% Wilson interval,
``x_low`` and ``x_high``, and is a share of the ``count`` images of its row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from patchproof.aggregation.crop_votes import count_votes, votes_to_turn
from patchproof.defenses.randomized_cropping import CropLabels, Mode, RandomizedCropping
from patchproof.evaluation.feature_analyses import accuracies
from patchproof.evaluation.feature_recording import FeatureRecording
from patchproof.probability import ProbableCertification
from patchproof.results import Certification
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize
from patchproof.views.crops import CropViews


@dataclass(frozen=True, eq=False)
class RecordedCrops:
    """A classifier of crops and what it says about all crops of N images.

    Attributes:
        name: in the tables.
        model: that was recorded.
        views: all crops.
        found: the vote of each crop.
        right: (N,) int64, the right classes.
        image_size: (H, W) in pixels.
        tolerance: a crop whose class leads by no more (logits) counts as corrupted.
    """

    name: str
    model: nn.Module
    views: CropViews
    found: CropLabels
    right: Tensor
    image_size: ImageSize
    tolerance: float

    @classmethod
    def read(
        cls,
        name: str,
        model: nn.Module,
        views: CropViews,
        recording: FeatureRecording,
        image_size: ImageSize,
        tolerance: float,
    ) -> RecordedCrops:
        """Read the votes of a recording."""
        parts = [(part.outputs, part.right) for part in recording.parts()]
        outputs, right = zip(*parts, strict=True)
        labels = torch.cat([one.labels for one in outputs])
        found = CropLabels(
            labels,
            torch.cat([one.margins for one in outputs]),
            torch.full((len(labels),), views.count),
            outputs[0].classes,
        )
        return cls(name, model, views, found, torch.cat(right), image_size, tolerance)

    def defense(self, threat: Threat, **settings: Any) -> RandomizedCropping:
        """Return the defense with these settings."""
        return RandomizedCropping(
            self.model,
            threat,
            image_size=self.image_size,
            crop_size=self.views.places.crop_size,
            tolerance=self.tolerance,
            **settings,
        )

    def certify(self, defense: RandomizedCropping) -> Certification | ProbableCertification:
        """Certify the recorded images; random crops are drawn for each by the defense's seed."""
        if defense.mode == "random-crops":
            return defense.certify_votes(self.found, self.right, self.drawn(defense))
        found = CropLabels(
            self.found.labels[:, defense.fixed],
            self.found.margins[:, defense.fixed],
            self.found.forwards,
            self.found.classes,
        )
        return defense.certify_votes(found, self.right)

    def drawn(
        self, defense: RandomizedCropping, generator: np.random.Generator | None = None
    ) -> Tensor:
        """Draw the places of random crops for each image, (N, n) int64; by the defense's seed."""
        if generator is None:
            generator = np.random.default_rng(defense.seed)
        return defense.places.draw(len(self.right), defense.crops, defense.replacement, generator)

    def turned(self, drawn: Tensor) -> Tensor:
        """Return n_2to1 of the votes of drawn crops (N, n), as (N,) int64."""
        votes = self.found.labels.gather(1, drawn)
        return votes_to_turn(count_votes(votes, self.found.classes)[:, : self.found.classes])


@dataclass(frozen=True)
class Draw:
    """Which crops vote.

    Attributes:
        mode: of ``RandomizedCropping``.
        crops: n; 0 for all of them.
        replacement: whether a draw may hold a place twice.
    """

    mode: Mode
    crops: int = 0
    replacement: bool = True

    def settings(self, seed: int) -> dict[str, Any]:
        """Return the arguments of the defense."""
        if self.mode == "all-crops":
            return {"mode": self.mode}
        return {
            "mode": self.mode,
            "crops": self.crops,
            "replacement": self.replacement,
            "seed": seed,
        }


def certified_accuracies(
    recorded: Sequence[RecordedCrops],
    threats: Sequence[Threat],
    draws: Sequence[Draw],
    probabilities: Sequence[float],
    seed: int = 0,
) -> pd.DataFrame:
    """Return what each certificate gives (Tables 2, 3 and 5, Figures 2 and 3).

    Rows of ``random-crops`` have a column for what is certified with a probability, those of the
    deterministic modes for what is certified. ``paper`` is the paper's condition, with p_c of at
    least the row's probability; of 0.95 for fixed crops.

    Args:
        recorded: the classifiers.
        threats: what the attacker may do.
        draws: which crops vote.
        probabilities: with which a prediction from random crops is to be right, and p_c.
        seed: of the draws.
    """
    rows: list[dict[str, Any]] = []
    for one in recorded:
        for threat in threats:
            for draw in draws:
                defense = one.defense(threat, **draw.settings(seed))
                result = one.certify(defense)
                what = _described(one, threat, defense)
                rows += [what | row for row in _rows(one, defense, result, probabilities)]
    table = pd.DataFrame(rows)
    measures = ("clean", "certified", "certified_with_probability", "paper")
    ends = [f"{measure}{end}" for measure in measures for end in ("", "_low", "_high")]
    described = [name for name in table.columns if name not in (*ends, "probability")]
    return table.reindex(columns=[*described, "probability", *ends])


def _described(one: RecordedCrops, threat: Threat, defense: RandomizedCropping) -> dict[str, Any]:
    height, width = one.views.places.crop_size
    return {
        "model": one.name,
        "crop": f"{height}x{width}",
        "positions": _told_where(one.model),
        "threat": threat.label(),
        "mode": defense.mode,
        "crops": defense.crops,
        "replacement": defense.replacement,
    }


def _rows(
    one: RecordedCrops,
    defense: RandomizedCropping,
    result: Certification | ProbableCertification,
    probabilities: Sequence[float],
) -> Iterable[dict[str, Any]]:
    """Yield the accuracies of a result, for each probability of a random draw."""
    right = result.prediction == one.right
    count = {"count": len(right)}
    if isinstance(result, Certification):
        yield count | accuracies(
            clean=right, certified=result.certified, paper=result.paper_condition
        )
        return
    chance = defense.paper_chances[one.turned(one.drawn(defense)) - 1]
    for probability in probabilities:
        yield (
            count
            | {"probability": probability}
            | accuracies(
                clean=right,
                certified_with_probability=result.success_probability >= probability,
                paper=right & (chance >= probability),
            )
        )


def repeated_draws(
    recorded: Sequence[RecordedCrops],
    threat: Threat,
    draws: Sequence[Draw],
    times: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how much the statistics of the paper vary from draw to draw (Table 6).

    The interval of an image is its highest value less its lowest. Both it and the variance are
    means over all images.

    Args:
        recorded: the classifiers.
        threat: what the attacker may do.
        draws: of random crops.
        times: draws of each image.
        seed: of the draws.
    """
    rows = []
    for one in recorded:
        for draw in draws:
            defense = one.defense(threat, **draw.settings(seed))
            generator = np.random.default_rng(seed)
            turn = torch.stack([one.turned(one.drawn(defense, generator)) for _ in range(times)])
            chance = defense.paper_chances[turn - 1]
            rows.append(
                _described(one, threat, defense)
                | {
                    "count": len(one.right),
                    "times": times,
                    "turn_interval": _interval(turn.double()),
                    "turn_variance": _variance(turn.double()),
                    "chance_interval": _interval(chance),
                    "chance_variance": _variance(chance),
                }
            )
    return pd.DataFrame(rows)


def _interval(values: Tensor) -> float:
    return float((values.amax(0) - values.amin(0)).mean())


def _variance(values: Tensor) -> float:
    return float(values.var(0).mean())


def crops_needed(
    recorded: Sequence[RecordedCrops],
    threats: Sequence[Threat],
    numbers: Sequence[int],
    probabilities: Sequence[float],
) -> pd.DataFrame:
    """Return for how many images so many random crops are enough.

    Args:
        recorded: the classifiers.
        threats: what the attacker may do.
        numbers: of crops, in ascending order.
        probabilities: with which a prediction is to be right.
    """
    rows: list[dict[str, Any]] = []
    for one in recorded:
        for threat in threats:
            defense = one.defense(threat, mode="random-crops", crops=numbers[0])
            success = defense.success_by_number(one.found, one.right, numbers)
            what = _described(one, threat, defense) | {"count": len(one.right)}
            del what["mode"], what["replacement"]
            rows += [
                what
                | {"probability": probability, "crops": number}
                | accuracies(certified_with_probability=enough)
                for probability in probabilities
                for number, enough in zip(numbers, success >= probability, strict=True)
            ]
    return pd.DataFrame(rows)


def _told_where(model: nn.Module) -> bool:
    """Return whether a classifier of crops is told where they are."""
    positions = getattr(model, "positions", None)
    return positions is not None and not isinstance(positions, nn.Identity)
