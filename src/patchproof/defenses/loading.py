"""Loading a defense that was saved with its model."""

from __future__ import annotations

from pathlib import Path

from patchproof.defenses.patchcleanser import PatchCleanser
from patchproof.models import load_classifier
from patchproof.results import PatchproofError


def load(path: Path | str, *, device: str = "cpu", allow_code: bool = False) -> PatchCleanser:
    """Load a defense that its ``save`` wrote, with its model in eval mode on ``device``.

    Args:
        path: the file.
        device: where the model goes.
        allow_code: let the file name a ``python:`` factory, which is imported and called: only for
            files from somebody you trust.

    Raises:
        PatchproofError: no such file, or a file without a defense.
        RunError: weights that are damaged or do not fit the model that the card names.
    """
    model, card = load_classifier(path, allow_code=allow_code)
    values = card["made"].get("defense")
    if values is None:
        raise PatchproofError(f"expected a file with a defense, got a classifier alone: {path}")
    return PatchCleanser.from_dict(model.to(device), values)
