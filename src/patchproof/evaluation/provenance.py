"""What a run is about and how it is made, for its manifest."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from patchproof.datasets import ImageDataset
from patchproof.defenses.checks import check_model
from patchproof.errors import PatchproofError
from patchproof.evaluation.certifier import Described
from patchproof.models import ModelSpec, model_digest
from patchproof.precision import exact_inference


def check_fit(defense: Described, dataset: ImageDataset) -> None:
    """Raise ``PatchproofError`` unless the defense's model can classify the data set."""
    if len(dataset) == 0:
        raise PatchproofError(f"expected images in {dataset.name} {dataset.split}, got none")
    if dataset.image_size != defense.image_size:
        raise PatchproofError(
            f"expected images of {_by(defense.image_size)} pixels for this defense, "
            f"got {_by(dataset.image_size)} in {dataset.name}"
        )
    if len(set(dataset.indices.tolist())) != len(dataset):
        raise PatchproofError("expected each image once, got an index more than once")
    check_model(defense.model)
    shape = (dataset.channels, *dataset.image_size)
    try:
        classes = logits(defense, torch.zeros(1, *shape)).shape[1]
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        raise PatchproofError(
            f"expected a model for {_by(shape)} images, got one that fails: {first_line}"
        ) from error
    lowest, highest = int(dataset.labels.min()), int(dataset.labels.max())
    if lowest < 0 or highest >= classes:
        raise PatchproofError(
            f"expected labels from 0 to {classes - 1}, the classes of the model, "
            f"got {lowest} to {highest} in {dataset.name}"
        )


def logits(defense: Described, images: Tensor) -> Tensor:
    """Return what the undefended model says, (N, classes)."""
    with exact_inference(defense.device):
        logits: Tensor = defense.model(images.to(defense.device))
    return logits


def identity(defense: Described, dataset: ImageDataset, spec: ModelSpec | None) -> dict[str, Any]:
    """Return what a run is about, defense, threat, model and images, as JSON values."""
    kind = type(defense.model)
    model = (
        {
            "source": f"{kind.__module__}.{kind.__qualname__}",
            "architecture": hashlib.sha256(repr(defense.model).encode()).hexdigest(),
        }
        if spec is None
        else {"spec": spec.to_dict()}
    )
    return {
        "defense": defense.to_dict(),
        "threat": defense.threat.to_dict(),
        "image_size": list(defense.image_size),
        "model": model | {"digest": model_digest(defense.model)},
        "dataset": {
            "name": dataset.name,
            "split": dataset.split,
            "digest": dataset.digest(),
            "count": len(dataset),
            "indices_digest": hashlib.sha256(dataset.indices.numpy().tobytes()).hexdigest(),
        },
        "precision": "float32",
        "patchproof": version("patchproof"),
    }


def how_made(defense: Described, dataset: ImageDataset) -> dict[str, Any]:
    """Return how the run is made, as JSON values."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchvision", "timm", "numpy")},
        "device": describe_device(defense.device),
        "threads": torch.get_num_threads(),
        "threat_words": defense.threat.describe(),
        "defense_words": defense.describe(),
        "class_names": list(dataset.class_names),
        "batch_size": defense.batch_size,
    }


def describe_device(device: torch.device) -> str:
    """Return a device in words, such as the name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"


def _by(lengths: Iterable[int]) -> str:
    return "x".join(str(length) for length in lengths)
