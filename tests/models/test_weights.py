"""Classifier files: what is saved comes back, and what is damaged is refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from patchproof.errors import PatchproofError, RunError
from patchproof.models import (
    ModelSpec,
    Preprocessed,
    build_model,
    load_classifier,
    load_weights,
    model_digest,
    read_card,
    save_classifier,
    write_atomically,
)

SPEC = ModelSpec("tiny-resnet", 4, 1, (8, 8))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_classifier(path, build_model(SPEC), SPEC, {"recipe": "none", "fill": 0.5})
    return path


def rewrite(path: Path, card: dict[str, object] | str | None) -> None:
    text = card if isinstance(card, str) else json.dumps(card)
    save_file(load_file(path), path, metadata=None if card is None else {"patchproof": text})


def test_a_saved_classifier_comes_back_with_its_card(tmp_path: Path) -> None:
    model = build_model(SPEC)
    save_classifier(tmp_path / "a" / "model.safetensors", model, SPEC, {"fill": 0.5})
    loaded, card = load_classifier(tmp_path / "a" / "model.safetensors")
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert card["format"] == "patchproof-classifier/1"
    assert card["digest"] == model_digest(model) == model_digest(loaded)
    assert card["made"] == {"fill": 0.5}
    assert ModelSpec.from_dict(card["model"]) == SPEC
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["model.safetensors"]


def test_the_digest_sees_one_changed_value_and_one_changed_name() -> None:
    class Renamed(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.other = layer

    layer = nn.Linear(2, 2)
    before = model_digest(layer)
    assert model_digest(Renamed(layer)) != before
    with torch.no_grad():
        layer.bias[1] += 1e-6
    assert model_digest(layer) != before


def test_shared_weights_can_be_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    save_classifier(tmp_path / "m.safetensors", model, SPEC, {})
    load_weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), tmp_path / "m.safetensors")


def test_a_missing_file_is_misuse(tmp_path: Path) -> None:
    for load in (load_classifier, lambda path: load_weights(build_model(SPEC), path)):
        with pytest.raises(PatchproofError, match="does not exist") as caught:
            load(tmp_path / "none.safetensors")
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_damaged_file_is_a_failure(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"neither of the two formats")
    with pytest.raises(RunError, match="cannot read weights"):
        load_weights(build_model(SPEC), path)
    with pytest.raises(RunError, match="expected a safetensors file"):
        load_classifier(path)


def test_truncated_weights_are_a_failure(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(RunError, match="expected a safetensors file"):
        load_classifier(saved)


def test_weights_without_a_card_are_no_classifier(saved: Path) -> None:
    rewrite(saved, None)
    with pytest.raises(PatchproofError, match="use load_weights"):
        load_classifier(saved)
    rewrite(saved, "{damaged")
    with pytest.raises(RunError, match="JSON card"):
        load_classifier(saved)


def test_changed_weights_do_not_match_the_digest(saved: Path) -> None:
    _, card = load_classifier(saved)
    tensors = load_file(saved)
    tensors["head.weight"][0, 0] += 1.0
    save_file(tensors, saved, metadata={"patchproof": json.dumps(card)})
    with pytest.raises(RunError, match="expected weights of digest"):
        load_classifier(saved)


def test_another_architecture_is_refused_by_the_names_that_differ(saved: Path) -> None:
    tensors = load_file(saved)
    del tensors["stem.0.weight"]
    tensors["extra"] = torch.zeros(1)
    tensors["head.weight"] = torch.zeros(5, 64)
    save_file(tensors, saved)
    model = build_model(SPEC)
    before = model_digest(model)
    with pytest.raises(RunError) as caught:
        load_weights(model, saved)
    assert "1 missing: stem.0.weight" in str(caught.value)
    assert "1 unexpected: extra" in str(caught.value)
    assert "head.weight (expected (4, 64), got (5, 64))" in str(caught.value)
    assert model_digest(model) == before


def test_pytorch_files_are_loaded_without_running_code(tmp_path: Path) -> None:
    model, other = build_model(SPEC), build_model(SPEC)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert model_digest(other) == model_digest(model)
    torch.save(model, tmp_path / "whole.pt")  # a pickled object, not a state dictionary
    with pytest.raises(RunError, match="cannot read weights"):
        load_weights(other, tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(RunError, match="expected a dictionary of tensors"):
        load_weights(other, tmp_path / "list.pt")


def test_weights_of_the_network_inside_the_preprocessing(tmp_path: Path) -> None:
    inner = nn.Linear(2, 2)
    save_file(inner.state_dict(), tmp_path / "published.safetensors")
    wrapped = Preprocessed(nn.Linear(2, 2), (0.5,), (0.5,))
    load_weights(wrapped, tmp_path / "published.safetensors")
    assert model_digest(wrapped.model) == model_digest(inner)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*file: No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_names_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    spec = ModelSpec("python:torch.nn:Linear", 2, 1, (2, 2), {"in_features": 4, "out_features": 2})
    path = tmp_path / "model.safetensors"
    save_classifier(path, build_model(spec), spec, {})
    with pytest.raises(PatchproofError, match="runs no code of its own"):
        load_classifier(path)
    assert read_card(path)["model"]["name"] == spec.name
    assert load_classifier(path, allow_code=True)[0].out_features == 2


def test_a_card_cannot_make_timm_read_another_file(tmp_path: Path) -> None:
    spec = ModelSpec("timm:resnet18", 2, 3, (32, 32), {"checkpoint_path": "elsewhere.pth"})
    with pytest.raises(PatchproofError, match="options of the network, got checkpoint_path"):
        build_model(spec)
