"""Classifiers in safetensors files, with a card that says what they are and how they were made."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError, RunError
from patchproof.models.preprocessed import Preprocessed
from patchproof.models.spec import ModelSpec, build_model

FORMAT = "patchproof-classifier/1"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place first, then renamed into it.

    Raises:
        RunError: the file cannot be written, for instance because no space is left.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def model_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's names, types, shapes and values, wherever it lies.

    Buffers that are not saved with the weights, such as means of a normalisation, count too.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_buffers()), **model.state_dict()}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def save_classifier(
    path: Path | str, model: nn.Module, spec: ModelSpec, made: Mapping[str, Any]
) -> None:
    """Save a classifier as one safetensors file with its card in the file's metadata.

    Args:
        path: where; an existing file is replaced whole.
        model: a model that ``build_model(spec)`` built.
        spec: what to build it from again. Of ``hf:`` and ``onnx:`` models the file gets all that
            this needs: the configuration of the network, or the ONNX graph.
        made: how it was made, as JSON values.

    Raises:
        RunError: the file cannot be written.
    """
    from safetensors.torch import save

    if isinstance(model, Preprocessed) and not spec.name.startswith("python:"):
        spec = replace(spec, options={**spec.options, **model.embedded_options()})
    card = {
        "format": FORMAT,
        "model": spec.to_dict(),
        "digest": model_digest(model),
        "made": dict(made),
    }
    tensors = {  # cloned: safetensors refuses tensors that share memory
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    write_atomically(Path(path), save(tensors, metadata={"patchproof": json.dumps(card)}))


def read_card(path: Path | str) -> dict[str, Any]:
    """Return the card of a file that ``save_classifier`` saved; nothing is built or run.

    Raises:
        PatchproofError: no such file, or not a classifier of this format.
        RunError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    _require(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise RunError(f"expected a safetensors file, got {path}: {error}") from error
    try:
        card: dict[str, Any] = json.loads(metadata.get("patchproof", "{}"))
    except json.JSONDecodeError as error:
        raise RunError(f"expected a JSON card in {path}, got damaged text: {error}") from error
    if card.get("format") != FORMAT:
        raise PatchproofError(
            f"expected a {FORMAT} file, got {card.get('format', 'no card')!r} in {path}; "
            "use load_weights for weights alone"
        )
    return card


def load_classifier(
    path: Path | str, *, allow_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a classifier that ``save_classifier`` saved, in eval mode, with its card.

    Args:
        path: the file.
        allow_code: let the card name a ``python:`` factory, which is imported and called: only for
            files from somebody you trust.

    Raises:
        PatchproofError: no such file, not a classifier of this format, or a card that names a
            ``python:`` factory without ``allow_code``.
        RunError: the weights are damaged, or do not fit the model that the card names.
    """
    card = read_card(path)
    spec = ModelSpec.from_dict(card["model"])
    if spec.name.startswith("python:") and not allow_code:
        raise PatchproofError(
            f"{path}: expected a model that runs no code of its own, got {spec.name}; "
            "load it with allow_code=True if you trust the file"
        )
    model = build_model(spec)
    load_weights(model, path)
    if (digest := model_digest(model)) != card["digest"]:
        raise RunError(f"expected weights of digest {card['digest']}, got {digest} in {path}")
    return model, card


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load weights into a model, from a safetensors file or a PyTorch state dictionary.

    Files of other suffixes than ``.safetensors`` are read by ``torch.load(weights_only=True)``,
    which runs no code from the file. Weights of the network inside a ``Preprocessed`` model, as
    published, are taken too. The model is unchanged if anything is wrong.

    Raises:
        PatchproofError: no such file.
        RunError: it cannot be read, or is of another architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    _require(path)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise RunError(f"cannot read weights from {path}: {first_line}") from error
    if not isinstance(tensors, dict):
        raise RunError(f"expected a dictionary of tensors in {path}, got {type(tensors).__name__}")
    others = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if others:
        raise RunError(
            f"expected a dictionary of tensors in {path}, got one that holds {others[0]!r} of type "
            f"{type(tensors[others[0]]).__name__}"
        )
    bare = isinstance(model, Preprocessed) and not any(
        name.startswith("model.") for name in tensors
    )
    target = model.get_submodule("model") if bare else model
    _compare(target.state_dict(), tensors, path)
    target.load_state_dict(tensors)


def _compare(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], path: Path) -> None:
    """Raise ``RunError`` naming the first tensors that do not fit the architecture."""
    problems = {
        "missing": sorted(expected.keys() - got.keys()),
        "unexpected": sorted(got.keys() - expected.keys()),
        "of another shape": [
            f"{name} (expected {tuple(expected[name].shape)}, got {tuple(got[name].shape)})"
            for name in sorted(expected.keys() & got.keys())
            if expected[name].shape != got[name].shape
        ],
    }
    found = [
        f"{len(names)} {problem}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise RunError(f"{path} holds another architecture: tensors {'; '.join(found)}")


def _require(path: Path) -> None:
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise PatchproofError(f"expected a file of weights, got {path}, which {what}")
