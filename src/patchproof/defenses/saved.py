"""Saving a defense with its model, for ``patchproof.load``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from patchproof.defenses.surrogate import Surrogate
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec, save_classifier
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize

DEFAULT_FILL = 0.5
DEFAULT_TOLERANCE = 1e-3


class SavedDefense(ABC):
    """A named defense: it says what it is, and is saved with its model.

    Attributes:
        tolerance: margins within it (logits) count as lost.
    """

    model: nn.Module
    threat: Threat
    image_size: ImageSize
    tolerance: float

    _OWN: ClassVar[tuple[str, ...]]
    """The arguments that the defense takes beyond those of its kind."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return all that decides the labels and certificates, but the model, as JSON values."""

    @classmethod
    @abstractmethod
    def from_dict(cls, model: nn.Module, values: dict[str, Any]) -> Self:
        """Return the defense of ``model`` that ``to_dict`` described."""

    @abstractmethod
    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words what it looks at, such as ``"36 masks"``."""

    def save(
        self, path: Path | str, spec: ModelSpec, made: Mapping[str, Any] | None = None
    ) -> None:
        """Write the defense and the weights of its model to one safetensors file.

        The card in the file's metadata holds the defense, the model's specification, the digest of
        its weights and how it was made. ``patchproof.load`` reads it, and ``load_classifier`` the
        model alone.

        Args:
            path: where; an existing file is replaced whole.
            spec: what the model is built from (``python:package.module:factory`` for your own).
            made: how the model was made, as JSON values.

        Raises:
            RunError: the file cannot be written.
        """
        save_classifier(path, self.model, spec, {**(made or {}), "defense": self.to_dict()})

    def _take_tolerance(self, tolerance: float) -> None:
        """Keep what every defense takes."""
        if not 0 <= tolerance < math.inf:
            raise PatchproofError(f"tolerance: expected a number >= 0, got {tolerance!r}")
        self.tolerance = tolerance


class HidingDefense(SavedDefense):
    """A named defense that hides pixels of the image from its model.

    Attributes:
        fill: the value that hidden pixels take in every channel.
    """

    fill: float

    def _take(self, fill: float, tolerance: float) -> None:
        """Keep what every such defense takes."""
        self._take_tolerance(tolerance)
        self.fill = fill
