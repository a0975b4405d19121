"""What the evaluation asks of a defense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from patchproof.aggregation.base import Stop
from patchproof.detection import DetectionCertification
from patchproof.probability import ProbableCertification
from patchproof.results import Certification, Kind, Paper
from patchproof.threat import Threat

AnyCertification = Certification | DetectionCertification | ProbableCertification


class Described(Protocol):
    """A defense that says what it is."""

    @property
    def model(self) -> nn.Module:
        """From images (N, C, H, W) in [0, 1] to logits (N, classes)."""

    @property
    def threat(self) -> Threat:
        """What the attacker may do."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""

    @property
    def batch_size(self) -> int | None:
        """Views in one forward pass; None where none is chosen yet."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything that decides the verdicts, apart from the model, as JSON values."""

    def describe(self) -> str:
        """Say in a few words what the defense looks at."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""


class Certifier(Described, Protocol):
    """A defense that certifies labelled images against its threat."""

    @property
    def kind(self) -> Kind:
        """What its certificates promise."""

    @property
    def paper(self) -> Paper | None:
        """Whether the criterion of its paper is sound; None where there is none."""

    def tune_batch_size(self, image: Tensor, images: int | None = None) -> int:
        """Measure which batch size is fastest for ``images`` like this (C, H, W), and keep it."""

    def certify(self, images: Tensor, labels: Tensor, stop: Stop = ...) -> AnyCertification:
        """Certify N images."""

    def certify_stream(
        self, examples: Iterable[tuple[int, Tensor, int]], stop: Stop = ...
    ) -> Iterator[tuple[list[int], AnyCertification]]:
        """Certify (key, image, label) and yield the keys of finished images with their results."""
