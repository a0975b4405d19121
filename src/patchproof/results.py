"""What every defense returns: verdicts per patch region, certificates, and errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from patchproof.threat import Regions, Threat

ALERT = -1
"""The label that a detector predicts instead of a class when it suspects a patch."""

INVALID_LABEL = -1
"""The label of a view whose scores are not finite: it equals no class and is never returned."""


ROUNDING = 1e-5
"""Scores that differ by no more than this share of their magnitude count as equal: about a hundred
roundings of float32, of scores too large for a tolerance in logits."""


class PatchproofError(ValueError):
    """Bad input: the message says what was expected and what came (exit code 2)."""

    exit_code = 2


class RunError(PatchproofError):
    """A run that cannot go on though it was asked for correctly (exit code 1)."""

    exit_code = 1


class Verdict(IntEnum):
    """Whether the predicted label provably stays at a patch region."""

    UNKNOWN = 0
    HOLDS = 1
    LOST = 2


class Case(IntEnum):
    """Which exit of the inference algorithm returned the label (PatchCleanser, Algorithm 1).

    The challenger game (Appendix C) ends in ``AGREED`` or ``CHALLENGER``.
    """

    NONE = 0
    AGREED = 1
    DISAGREER = 2
    MAJORITY = 3
    CHALLENGER = 4


@dataclass(eq=False)
class Outputs:
    """What the model said about the views of a batch of images, as far as it was asked.

    Attributes:
        labels: (N, V) int64, the class of the highest score (the lowest class of equal ones);
            ``INVALID_LABEL`` where a score is not finite.
        margins: (N, V) float32, the highest score minus the second highest (logits); 0 where a
            score is not finite, or where the difference is no larger than rounding of scores of
            that magnitude (``ROUNDING``).
        known: (N, V) bool, the views that were evaluated; other entries mean nothing.
        classes: number of classes.
        scores: (N, V, C) float32, or None if the aggregation reads labels and margins alone.
    """

    labels: Tensor
    margins: Tensor
    known: Tensor
    classes: int
    scores: Tensor | None = None

    @classmethod
    def empty(cls, images: int, views: int, classes: int, keep_scores: bool = False) -> Outputs:
        """Return outputs of which none is known yet."""
        return cls(
            torch.full((images, views), INVALID_LABEL),
            torch.zeros(images, views),
            torch.zeros(images, views, dtype=torch.bool),
            classes,
            torch.zeros(images, views, classes) if keep_scores else None,
        )

    def record(self, image: Tensor, view: Tensor, scores: Tensor) -> None:
        """Enter the scores, (..., C), of the pairs of ``image`` and ``view``, (...) int64 each."""
        scores = scores.float()
        highest, second = scores.topk(2, dim=-1).values.unbind(-1)
        margin = (highest - second).clamp(max=torch.finfo(torch.float32).max)
        finite = scores.isfinite().all(-1)
        clear = finite & (margin > ROUNDING * torch.maximum(highest.abs(), second.abs()))
        self.labels[image, view] = torch.where(finite, scores.argmax(-1), INVALID_LABEL)
        self.margins[image, view] = torch.where(clear, margin, 0.0)
        self.known[image, view] = True
        if self.scores is not None:
            self.scores[image, view] = scores

    def select(self, images: Tensor) -> Outputs:
        """Return the outputs of some images, by (n,) indices or (N,) bool."""
        return Outputs(
            self.labels[images],
            self.margins[images],
            self.known[images],
            self.classes,
            None if self.scores is None else self.scores[images],
        )

    @classmethod
    def concatenate(cls, parts: list[Outputs]) -> Outputs:
        """Join the outputs of several batches of images."""
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(
            torch.cat([part.labels for part in parts]),
            torch.cat([part.margins for part in parts]),
            torch.cat([part.known for part in parts]),
            parts[0].classes,
            torch.cat(scores) if scores else None,
        )


@dataclass(frozen=True, eq=False)
class Corruption:
    """Which views which patch regions corrupt.

    Attributes:
        patterns: (P, V) bool, the distinct sets of views that see a pixel of a region.
        region_to_pattern: (R,) int64, the pattern of each region.
    """

    patterns: Tensor
    region_to_pattern: Tensor

    @classmethod
    def of(cls, seen: Tensor) -> Corruption:
        """Group the regions of (R, V) bool ``seen`` by the views that see them."""
        return cls(*distinct_rows(seen))


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct rows of an (R, V) bool tensor, (P, V), and which is each row's, (R,)."""
    packed = np.ascontiguousarray(np.packbits(rows.numpy(), axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return rows[torch.from_numpy(first)], torch.from_numpy(inverse.ravel())


@dataclass(frozen=True)
class Prediction:
    """Robust labels of a batch of images and how they came about.

    Attributes:
        label: (N,) int64, the class; ``ALERT`` only from detectors.
        case: (N,) int64 values of ``Case``.
        forwards: (N,) int64, model forward passes spent on each image.
    """

    label: Tensor
    case: Tensor
    forwards: Tensor


@dataclass(frozen=True)
class Certification:
    """Certificates of a batch of labelled images against one threat.

    Attributes:
        prediction: (N,) int64, what ``predict`` returns on the clean image.
        certified: (N,) bool: the label is right and stays right whatever the patch shows, at every
            patch region (deterministic certified recovery).
        paper_condition: (N,) bool: the criterion that the defense's paper states.
        case: (N,) int64 values of ``Case``.
        forwards: (N,) int64, model forward passes spent on each image.
        smallest_margin: (N,) float, the smallest decision margin (in logits) of the views
            evaluated; a view whose margin is within the tolerance counted as corrupted.
        verdicts: (N, P) int8 values of ``Verdict``, one per corruption pattern.
        region_to_pattern: (R,) int64, the pattern of each patch region.
        regions: the R patch regions.
        threat: what the attacker may do.
        kind: the kind of promise; kinds never share a column.
    """

    prediction: Tensor
    certified: Tensor
    paper_condition: Tensor
    case: Tensor
    forwards: Tensor
    smallest_margin: Tensor
    verdicts: Tensor
    region_to_pattern: Tensor
    regions: Regions
    threat: Threat
    kind: Literal["recovery"] = "recovery"

    _PER_IMAGE: ClassVar[tuple[str, ...]] = (
        "prediction",
        "certified",
        "paper_condition",
        "case",
        "forwards",
        "smallest_margin",
        "verdicts",
    )

    @classmethod
    def concatenate(cls, parts: list[Certification], order: Tensor) -> Certification:
        """Join certificates of the same defense, image ``order[i]`` of the parts coming i-th."""
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts])[order]
            for name in cls._PER_IMAGE
        }
        return replace(parts[0], **tensors)

    def __len__(self) -> int:
        return len(self.prediction)

    def region_verdicts(self) -> Tensor:
        """Return the verdict of each region, (N, R) int8, in the order of ``regions``."""
        return self.verdicts[:, self.region_to_pattern]

    def vulnerability_map(self) -> Tensor:
        """Return where a patch could still win, (N, H, W) float in [0, 1].

        At a pixel: the share of the patch regions containing it that do not hold; 0 where no region
        contains it. Regions left ``UNKNOWN`` by ``certify(stop="first_lost_region")`` count as not
        holding, so certify with ``stop="never"`` for a map.
        """
        lost = self.region_verdicts() != Verdict.HOLDS
        covered = self.regions.accumulate(torch.ones(1, len(self.regions)))
        return self.regions.accumulate(lost.float()) / covered.clamp(min=1.0)
