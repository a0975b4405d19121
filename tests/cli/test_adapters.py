"""Models and data sets of other libraries, as a user of the commands brings them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchproof.evaluation import read_result

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Patchproof = Callable[[str], tuple[int, str, str]]

ONNX = "--model onnx:halves.onnx --device cpu"
PYTHON = "--model python:halves_model:BrighterHalf --device cpu"
CERTIFY = "certify --data images --split all --patch 2 --masks 3 --gallery 0 --out"


@pytest.fixture(autouse=True)
def halves(workplace: Path) -> None:
    """Write ``halves.onnx``, which scores images as the ``BrighterHalf`` of ``halves_model``."""
    helper, single = onnx.helper, onnx.TensorProto.FLOAT
    halves = np.zeros((8, 8, 2), dtype=np.float32)
    halves[:, :4, 0] = halves[:, 4:, 1] = 20 / 32
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "halves"], ["scores"]),
        ],
        "halves",
        [helper.make_tensor_value_info("images", single, ("n", 1, 8, 8))],
        [helper.make_tensor_value_info("scores", single, ("n", 2))],
        [onnx.numpy_helper.from_array(halves.reshape(64, 2), "halves")],
    )
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, workplace / "halves.onnx")


def test_an_onnx_model_is_certified_as_the_same_model_in_pytorch(
    patchproof: Patchproof, workplace: Path
) -> None:
    assert patchproof(f"{CERTIFY} onnx {ONNX}")[0] == 0
    assert patchproof(f"{CERTIFY} torch {PYTHON}")[0] == 0
    ours, theirs = read_result(workplace / "onnx"), read_result(workplace / "torch")
    assert ours.examples.equals(theirs.examples)
    assert 0 < ours.summary.certified_accuracy.value < 1
    code, _, errors = patchproof(f"{CERTIFY} onnx {ONNX} --model-option mean=0.5")
    assert code == 2
    assert "holds the results of another run" in errors


def test_an_onnx_model_predicts(patchproof: Patchproof) -> None:
    code, output, _ = patchproof(
        f"predict images/left/7.png {ONNX} --classes 2 --patch 2 --masks 3 --json"
    )
    assert code == 0
    assert json.loads(output)["label"] == 0


def test_data_of_the_hugging_face_library(patchproof: Patchproof, workplace: Path) -> None:
    hugging_face = pytest.importorskip("datasets")
    files = sorted((workplace / "images").rglob("*.png"))
    columns: dict[str, Any] = {
        "photo": [str(file) for file in files],
        "side": [file.parent.name == "right" for file in files],
    }
    side = hugging_face.ClassLabel(names=["left", "right"])
    kinds = hugging_face.Features({"photo": hugging_face.Image(), "side": side})
    data = hugging_face.Dataset.from_dict(columns, features=kinds)
    (workplace / "hub").mkdir()
    data.to_parquet(workplace / "hub" / "test.parquet")
    line = f"certify --data hf:hub --root copies --patch 2 --masks 3 --gallery 0 {PYTHON} --out"
    assert patchproof(f"{line} hub-run")[0] == 0
    assert patchproof(f"{CERTIFY} folder-run {PYTHON}")[0] == 0
    ours, theirs = read_result(workplace / "hub-run"), read_result(workplace / "folder-run")
    assert ours.examples.equals(theirs.examples)
    assert ours.manifest["about"]["class_names"] == ["left", "right"]


MISTAKES = {
    "no such file": (f"{CERTIFY} run --model onnx:no.onnx", "no.onnx, which is not a file"),
    "weights too": (f"{CERTIFY} run {ONNX} --weights w.safetensors", "which holds its own"),
    "published weights": (f"{CERTIFY} run {ONNX} --pretrained", "torchvision: or hf: model"),
    "an option of nothing": (f"{CERTIFY} run --model-option size=8", "--model-option with --model"),
    "an option without a value": (f"{CERTIFY} run {ONNX} --model-option size", "NAME=JSON"),
    "training": (
        "train --data digits --model onnx:digits.onnx --out run",
        "expected a model with weights to train, got onnx:digits.onnx",
    ),
    "no such folder of a model": (
        f"{CERTIFY} run --model hf:./nowhere --pretrained",
        "got 'hf:./nowhere'",
    ),
    "no such folder of data": (f"certify --data hf:./no --out run {ONNX} --patch 2", "got './no'"),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(
    patchproof: Patchproof, workplace: Path, line: str, message: str
) -> None:
    digits = onnx.load(workplace / "halves.onnx")
    wide = np.zeros((64, 10), dtype=np.float32)
    digits.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(wide, "halves"))
    digits.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 10
    onnx.save(digits, workplace / "digits.onnx")
    code, _, errors = patchproof(line)
    assert code == 2
    assert errors.splitlines()[-1].startswith("patchproof: error: ")
    assert "Traceback" not in errors
    assert message in errors
    assert not (workplace / "run" / "model.safetensors").exists()


def test_a_file_that_is_no_onnx_model_is_a_failure(patchproof: Patchproof) -> None:
    code, _, errors = patchproof(f"{CERTIFY} run --model onnx:halves_model.py")
    assert code == 1
    assert "cannot read halves_model.py as an ONNX model" in errors
    assert errors.count("\n") == 1
