"""The protocol of an aggregation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from patchproof.detection import Thresholds
from patchproof.results import Outputs, Paper

Stop = Literal["first_lost_region", "never"]

CERTAIN = 1e6
"""The least priority of a view that is needed whatever the other views say."""


@dataclass(frozen=True, eq=False)
class Goal:
    """What a certification wants to know.

    Attributes:
        labels: (N,) int64, the right labels.
        patterns: (P, V) bool, the views that each kind of patch region corrupts.
        stop: ``"first_lost_region"`` leaves an image as soon as one region is lost, ``"never"``
            settles every region.
    """

    labels: Tensor
    patterns: Tensor
    stop: Stop

    def select(self, images: Tensor) -> Goal:
        """Return the goal for some of the images, by (n,) indices or (N,) bool."""
        return Goal(self.labels[images], self.patterns, self.stop)


class Aggregation(Protocol):
    """Pure functions from the outputs of the views to labels and verdicts.

    The views that are still needed come with priorities rather than as a yes or no, so that the
    evaluation loop can fill its batches across images with those that settle most first. Views of
    priority ``CERTAIN`` are needed in any case; of the others the loop tries a few at a time.
    """

    needs_scores: bool
    """Whether ``Outputs.scores`` is read, or labels and margins alone."""

    paper: Paper | None
    """Whether the criterion that the defense's paper states is sound; None: it states none."""

    def next_views(self, outputs: Outputs, goal: Goal | None = None) -> Tensor:
        """Return the priority of each view, (N, V) float32; all 0 means that the image is decided.

        Without a goal an image is decided when its label is; with one when, in addition, its
        certificate and paper condition are.
        """
        ...

    def predict(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the labels and the cases, (N,) int64 each, of decided images."""
        ...

    def certify(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return each pattern's verdict, (N, P) int8, sound whatever part of the views is known."""
        ...

    def paper_condition(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Return whether the paper's criterion holds, (N,) bool; unknown views fail it."""
        ...


class DetectingAggregation(Aggregation, Protocol):
    """An aggregation that may alert, if a suspicion is at least as confident as ``tau``."""

    tau: float
    """In [0, 1]."""

    def thresholds(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Thresholds:
        """Return for which tau each image is alerted and certified; every view is known.

        At ``tau`` they say what ``predict`` and ``certify`` do.
        """
        ...
