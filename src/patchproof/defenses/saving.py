"""Saving a defense with its model, and loading it: one file, which is also a classifier file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchproof.defenses.patchcleanser import PatchCleanser
from patchproof.models import ModelSpec, load_classifier, save_classifier
from patchproof.results import PatchproofError


def save(
    defense: PatchCleanser, path: Path | str, spec: ModelSpec, made: Mapping[str, Any] | None = None
) -> None:
    """Write a defense and the weights of its model to one safetensors file.

    The card in the file's metadata holds the defense, the model's specification, the digest of its
    weights and how it was made.

    Args:
        defense: what to save.
        path: where; an existing file is replaced whole.
        spec: what the model is built from (``python:package.module:factory`` for your own).
        made: how the model was made, as JSON values.

    Raises:
        RunError: the file cannot be written.
    """
    save_classifier(path, defense.model, spec, {**(made or {}), "defense": defense.to_dict()})


def load(path: Path | str, *, device: str = "cpu") -> PatchCleanser:
    """Load a defense that ``save`` wrote, with its model in eval mode on ``device``.

    Raises:
        PatchproofError: no such file, or a file without a defense.
        RunError: weights that are damaged or do not fit the model that the card names.
    """
    model, card = load_classifier(path)
    values = card["made"].get("defense")
    if values is None:
        raise PatchproofError(f"expected a file with a defense, got a classifier alone: {path}")
    return PatchCleanser.from_dict(model.to(device), values)
