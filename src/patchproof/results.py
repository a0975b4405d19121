"""What every defense returns: verdicts per patch region, and certificates."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from patchproof.errors import PatchproofError

if TYPE_CHECKING:
    from patchproof.threat import Regions, Threat

ALERT = -1
"""The label that a detector predicts instead of a class when it suspects a patch."""

INVALID_LABEL = -1
"""The label of a view whose scores are not finite: it equals no class and is never returned."""


Kind = Literal["recovery", "detection", "probable"]
"""What a certificate promises: the right label, the right label or an alert, or the right label
with a probability."""

Paper = Literal["sound", "unsound"]
"""Whether the criterion that a defense's paper states is a sound certificate."""

ROUNDING = 1e-5
"""Scores that differ by no more than this share of their magnitude count as equal: about a hundred
roundings of float32, of scores too large for a tolerance in logits."""


_MOST_ENTRIES = 2**31
"""Combinations of patches times views that fit into memory (bytes)."""


class Verdict(IntEnum):
    """Whether the predicted label provably stays at a patch region."""

    UNKNOWN = 0
    HOLDS = 1
    LOST = 2


class Case(IntEnum):
    """Which exit of the inference algorithm returned the label (PatchCleanser, Algorithm 1).

    The challenger game (Appendix C) ends in ``AGREED`` or ``CHALLENGER``. Minority Reports ends in
    ``AGREED``, in ``ALERT``, or in ``OVERRULED``: some mask disagrees, none confidently.
    """

    NONE = 0
    AGREED = 1
    DISAGREER = 2
    MAJORITY = 3
    CHALLENGER = 4
    OVERRULED = 5
    ALERT = 6


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
        patterns: (P, V) bool, sets of corrupted views: of one patch, those of its regions, each
            once; of several, what combinations of one patch's largest sets make.
        region_to_pattern: (R,) int64, the pattern of each region of a patch; of several patches,
            one of the largest sets of one patch that contains the region's own.
        combinations: (P, K) int64, of several patches, which of one patch's largest sets each
            pattern combines; None for one patch.
    """

    patterns: Tensor
    region_to_pattern: Tensor
    combinations: Tensor | None = None

    @classmethod
    def one_by_one(cls, regions: int) -> Corruption:
        """Return a pattern of its own for each region, of the one view that there is."""
        return cls(torch.ones(regions, 1, dtype=torch.bool), torch.arange(regions))

    def combined(self, count: int) -> Corruption:
        """Return what ``count`` patches corrupt, where this is what one of them does.

        Combinations of different largest sets, as many as there are patches, contain all others.

        Raises:
            PatchproofError: more combinations than fit into memory.
        """
        if count == 1:
            return self
        largest, dominated_by = _largest_sets(self.patterns)
        count = min(count, len(largest))
        total = math.comb(len(largest), count)
        if total * largest.shape[1] > _MOST_ENTRIES:
            raise PatchproofError(
                f"patch regions: expected combinations that fit into memory, got {total:,} of "
                f"{count} patches over {largest.shape[1]:,} views: take fewer masks or patches"
            )
        combinations = torch.combinations(torch.arange(len(largest)), count)
        patterns = largest[combinations[:, 0]]
        for column in combinations[:, 1:].T:
            patterns = patterns | largest[column]
        return Corruption(patterns, dominated_by[self.region_to_pattern], combinations)

    def spared(self) -> Tensor:
        """Return how many views each region leaves, (R,) int64: of several patches, at least."""
        return -self.worst(-(~self.patterns).sum(1)[None])[0]

    def worst(self, values: Tensor) -> Tensor:
        """Return the highest value of the patterns that each region is in.

        Args:
            values: (N, P) integers.

        Returns:
            (N, R).
        """
        if self.combinations is None:
            return values[:, self.region_to_pattern]
        worst = values.new_full(
            (len(values), int(self.combinations.max()) + 1), torch.iinfo(values.dtype).min
        )
        for column in self.combinations.T:
            worst.scatter_reduce_(1, column.expand(len(values), -1), values, "amax")
        return worst[:, self.region_to_pattern]


def _largest_sets(sets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of (P, V) bool that no other contains, and one that contains each, (P,)."""
    members = sets.float()
    inside = members @ members.T >= members.sum(1, keepdim=True) - 0.5  # row is part of column
    size = members.sum(1)
    largest = inside.logical_and(size[None, :] > size[:, None]).any(1).logical_not()
    order = largest.nonzero().squeeze(1)
    return sets[order], inside[:, order].int().argmax(1)


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
class Certificates:
    """Certificates of a batch of labelled images against one threat, whatever they promise.

    Attributes:
        prediction: (N,) int64, what ``predict`` returns on the clean image.
        case: (N,) int64 values of ``Case``.
        forwards: (N,) int64, model forward passes spent on each image.
        smallest_margin: (N,) float, the smallest decision margin (in logits) of the views
            evaluated; a view whose margin is within the tolerance counted as corrupted.
        verdicts: (N, P) int8 values of ``Verdict``, one per corruption pattern.
        corruption: the patterns, and which patch region has which.
        regions: the R regions that one patch can take.
        threat: what the attacker may do.
        kind: the kind of promise; kinds never share a column.
    """

    prediction: Tensor
    case: Tensor
    forwards: Tensor
    smallest_margin: Tensor
    verdicts: Tensor
    corruption: Corruption
    regions: Regions
    threat: Threat

    kind: ClassVar[Kind]
    _OF_ALL_IMAGES: ClassVar[frozenset[str]] = frozenset({"corruption", "regions", "threat"})

    @classmethod
    def concatenate(cls, parts: list[Self], order: Tensor) -> Self:
        """Join certificates of the same defense, image ``order[i]`` of the parts coming i-th."""
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts])[order]
            for name in (field.name for field in fields(cls))
            if name not in cls._OF_ALL_IMAGES
        }
        return replace(parts[0], **tensors)

    def __len__(self) -> int:
        return len(self.prediction)

    def region_verdicts(self) -> Tensor:
        """Return the verdict of each region, (N, R) int8, in the order of ``regions``.

        Of several patches, a region holds if it does with the others at every place; it is lost if
        it may be with others somewhere.
        """
        rank = torch.tensor([1, 0, 2])[self.verdicts.long()]  # holds, unknown, lost
        verdict = torch.tensor([Verdict.HOLDS, Verdict.UNKNOWN, Verdict.LOST], dtype=torch.int8)
        return verdict[self.corruption.worst(rank)]

    def vulnerability_map(self) -> Tensor:
        """Return where a patch could still win, (N, H, W) float in [0, 1].

        At a pixel: the share of the patch regions containing it that do not hold; 0 where no region
        contains it. Regions left ``UNKNOWN`` by ``certify(stop="first_lost_region")`` count as not
        holding, so certify with ``stop="never"`` for a map.
        """
        lost = self.region_verdicts() != Verdict.HOLDS
        covered = self.regions.accumulate(torch.ones(1, len(self.regions)))
        return self.regions.accumulate(lost.float()) / covered.clamp(min=1.0)


@dataclass(frozen=True)
class Certification(Certificates):
    """Deterministic certified recovery: whatever the patch shows, the right label.

    Attributes:
        certified: (N,) bool: the label is right and stays right whatever the patch shows, at every
            patch region.
        paper_condition: (N,) bool: the criterion that the defense's paper states.
    """

    certified: Tensor
    paper_condition: Tensor

    kind: ClassVar[Kind] = "recovery"
