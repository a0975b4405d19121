"""ONNX models: scores as the graph's, whatever its batch, and files that stand alone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from patchproof import PatchCleanser, SquarePatch, load
from patchproof.errors import PatchproofError, RunError
from patchproof.models import (
    ModelSpec,
    build_model,
    load_classifier,
    model_digest,
    save_classifier,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CLASSES, SIDE = 3, 4
Write = Callable[..., Path]
Size = int | str


def weights() -> np.ndarray[Any, np.dtype[np.float32]]:
    """From a 4x4 image to the scores of 3 classes: the means of bands of rows, 1, 1 and 2 high."""
    bands = np.zeros((CLASSES, SIDE, SIDE), dtype=np.float32)
    bands[0, 0], bands[1, 1], bands[2, 2:] = 2.0, 2.0, 1.0
    return bands.reshape(CLASSES, -1).T.copy()


def scores(images: Tensor) -> Tensor:
    return images.flatten(1) @ torch.from_numpy(weights())


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a linear classifier with other nodes behind it."""

    def write(
        name: str = "model.onnx",
        shape: tuple[Size, ...] = ("n", 1, SIDE, SIDE),
        behind: tuple[Any, ...] = (),
        outputs: tuple[str, ...] = ("scores",),
        external: bool = False,
        extra_input: bool = False,
    ) -> Path:
        helper, single = onnx.helper, onnx.TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info("images", single, shape)]
        if extra_input:
            inputs.append(helper.make_tensor_value_info("more", single, (1,)))
        graph = helper.make_graph(
            [
                helper.make_node("Flatten", ["images"], ["flat"]),
                helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
                *behind,
            ],
            "linear",
            inputs,
            [
                helper.make_tensor_value_info(
                    output, onnx.TensorProto.INT64 if output == "label" else single, None
                )
                for output in outputs
            ],
            [onnx.numpy_helper.from_array(weights(), "weights")],
        )
        model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
        path = tmp_path / name
        onnx.save(
            model,
            path,
            save_as_external_data=external,
            location=f"{name}.data",
            size_threshold=0,
        )
        return path

    return write


def spec_of(path: Path, **options: Any) -> ModelSpec:
    return ModelSpec(f"onnx:{path}", CLASSES, 1, (SIDE, SIDE), options)


def build(path: Path, **options: Any) -> Any:
    return build_model(spec_of(path, **options))


def node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return onnx.helper.make_node(kind, inputs, outputs, **attributes)


@pytest.mark.parametrize("batch", ["n", 1, 3, 8])
def test_any_number_of_images_whatever_the_batch_of_the_graph(write: Write, batch: Size) -> None:
    model = build(write(shape=(batch, 1, SIDE, SIDE)))
    images = torch.rand(7, 1, SIDE, SIDE)
    assert not model.training
    assert torch.allclose(model(images), scores(images), atol=1e-6)
    channels_last = images.to(memory_format=torch.channels_last)
    assert torch.equal(model(channels_last), model(images))


def test_preprocessing_is_what_the_options_say(write: Write) -> None:
    images = torch.rand(2, 1, SIDE, SIDE)
    model = build(write(), mean=0.25, std=[0.5])
    assert torch.allclose(model(images), scores((images - 0.25) / 0.5), atol=1e-5)
    spec = ModelSpec(f"onnx:{write()}", CLASSES, 1, (9, 7), {"size": SIDE})
    resized = build_model(spec)
    large = torch.rand(2, 1, 9, 7)
    assert torch.allclose(resized(large), scores(resized.prepare(large)), atol=1e-5)
    assert resized.prepare(large).shape == (2, 1, SIDE, SIDE)


def test_images_are_resized_to_the_size_in_the_graph(write: Write) -> None:
    model = build_model(ModelSpec(f"onnx:{write()}", CLASSES, 1, (8, 8)))
    assert model.input_size == (SIDE, SIDE)
    free = write("free.onnx", shape=("n", 1, "h", "w"))
    assert build(free).input_size is None


def test_probabilities_become_logits_where_the_options_say(write: Write) -> None:
    path = write(behind=(node("Softmax", ["scores"], ["shares"], axis=1),), outputs=("shares",))
    with pytest.raises(PatchproofError, match=r"expected logits .* got probabilities: export"):
        build(path)
    model = build(path, probabilities=True)
    images = torch.rand(3, 1, SIDE, SIDE)
    assert torch.allclose(model(images), scores(images).log_softmax(1), atol=1e-5)
    certain = model(torch.tensor([200.0, 0, 0, 0]).reshape(1, 1, SIDE, 1).expand(1, 1, SIDE, SIDE))
    assert certain.isfinite().all()
    assert certain.argmax() == 0
    with pytest.raises(PatchproofError, match=r"expected scores .* that sum to 1"):
        build(write("logits.onnx"), probabilities=True)


def test_one_of_several_outputs_is_named(write: Write) -> None:
    behind = (node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),)
    path = write(behind=behind, outputs=("label", "scores"))
    with pytest.raises(PatchproofError, match="got label, scores: say by the option output"):
        build(path)
    with pytest.raises(PatchproofError, match="output: expected label or scores, got 'other'"):
        build(path, output="other")
    with pytest.raises(PatchproofError, match=r"got an output of type tensor\(int64\)"):
        build(path, output="label")
    images = torch.rand(2, 1, SIDE, SIDE)
    assert torch.allclose(build(path, output="scores")(images), scores(images), atol=1e-6)


def test_weights_in_another_file_are_read_and_count(write: Write, tmp_path: Path) -> None:
    path = write(external=True)
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size == weights().nbytes
    images = torch.rand(2, 1, SIDE, SIDE)
    model = build(path)
    assert torch.allclose(model(images), scores(images), atol=1e-6)
    data.write_bytes((2 * weights()).tobytes())
    doubled = build(path)
    assert torch.allclose(doubled(images), 2 * scores(images), atol=1e-5)
    assert model_digest(doubled) != model_digest(model)
    assert model_digest(build(path)) == model_digest(doubled)
    data.unlink()
    with pytest.raises(RunError, match=r"cannot read .*model\.onnx as an ONNX model"):
        build(path)


def test_the_digest_is_of_the_content_and_the_preprocessing(write: Write, tmp_path: Path) -> None:
    path = write()
    digest = model_digest(build(path))
    shutil.copy(path, tmp_path / "copy.onnx")
    assert model_digest(build(tmp_path / "copy.onnx")) == digest
    assert model_digest(build(path, mean=0.5)) != digest
    other = write("other.onnx", behind=(node("Relu", ["scores"], ["relu"]),), outputs=("relu",))
    assert model_digest(build(other)) != digest


def test_a_saved_classifier_contains_the_graph(write: Write, tmp_path: Path) -> None:
    path, saved = write(external=True), tmp_path / "model.safetensors"
    spec = spec_of(path, mean=0.5)
    model = build_model(spec)
    save_classifier(saved, model, spec, {})
    for file in tmp_path.glob("model.onnx*"):
        file.unlink()
    loaded, card = load_classifier(saved)
    images = torch.rand(2, 1, SIDE, SIDE)
    assert torch.equal(loaded(images), model(images))
    assert card["digest"] == model_digest(loaded) == model_digest(model)
    assert card["model"]["name"] == spec.name


def test_other_weights_take_the_place_of_the_graph(write: Write) -> None:
    model = build(write())
    images = torch.rand(2, 1, SIDE, SIDE)
    before = model(images)
    other = build(write("x.onnx", behind=(node("Neg", ["scores"], ["x"]),), outputs=("x",)))
    content = torch.frombuffer(bytearray(other.graph.graph.numpy()), dtype=torch.uint8)
    model.graph.graph = torch.zeros_like(content)
    model.load_state_dict({"model.graph": content})
    assert torch.equal(model(images), -before)


def test_a_defense_certifies_predicts_and_is_saved(write: Write, tmp_path: Path) -> None:
    class Linear(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return scores(images)

    spec = spec_of(write(shape=(1, 1, SIDE, SIDE)))
    images = torch.rand(20, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    images[:10, :, 2:] = 1.0
    labels = scores(images).argmax(1)
    defenses = [
        PatchCleanser(
            model,
            SquarePatch(1),
            image_size=(SIDE, SIDE),
            masks_per_side=2,
            memory_budget=2**20,
        )
        for model in (build_model(spec), Linear().eval())
    ]
    for defense in defenses:
        defense.tune_batch_size(images[0])
    ours, theirs = (defense.certify(images, labels, stop="never") for defense in defenses)
    assert torch.equal(ours.certified, theirs.certified)
    assert torch.equal(ours.verdicts, theirs.verdicts)
    assert 0 < int(ours.certified.sum()) < 20
    defenses[0].save(tmp_path / "defense.safetensors", spec)
    Path(spec.name.removeprefix("onnx:")).unlink()
    assert torch.equal(load(tmp_path / "defense.safetensors").predict(images), ours.prediction)


def test_there_are_no_gradients(write: Write) -> None:
    model = build(write())
    with pytest.raises(PatchproofError, match="images without gradients"):
        model(torch.rand(1, 1, SIDE, SIDE, requires_grad=True))
    with torch.no_grad():
        model(torch.rand(1, 1, SIDE, SIDE, requires_grad=True))


def test_it_runs_on_as_many_threads_as_pytorch(write: Write) -> None:
    session = build(write()).graph.session(torch.device("cpu"))
    assert session.get_session_options().intra_op_num_threads == torch.get_num_threads()
    assert session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_the_runtime_cannot_use_is_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    model = build(write())
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(PatchproofError, match=rf"got {device}: use device cpu, or install"):
        model.graph.session(torch.device(device))


def test_the_graph_goes_to_cuda_in_full_precision(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = build(write()).graph
    asked: list[Any] = []

    class Session:
        def __init__(self, content: bytes, options: Any, providers: list[Any]) -> None:
            asked.extend(providers)

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]  # as where CUDA's libraries are missing

    cuda = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: cuda)
    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    with pytest.raises(RunError, match="cannot use CUDA here"):
        graph.session(torch.device("cuda", 1))
    assert asked[0][0] == "CUDAExecutionProvider"
    assert asked[0][1]["device_id"] == 1
    assert asked[0][1]["use_tf32"] == "0"


@pytest.mark.parametrize(
    ("message", "error"),
    [("Failed to allocate memory for", torch.OutOfMemoryError), ("a kernel failed", RunError)],
)
def test_failures_of_the_runtime(
    write: Write, monkeypatch: pytest.MonkeyPatch, message: str, error: type[Exception]
) -> None:
    model = build(write())
    whole = model.graph.session(torch.device("cpu"))

    class Failing:
        get_inputs, get_outputs = whole.get_inputs, whole.get_outputs

        def run(self, *_: object) -> None:
            raise OSError(message)  # what it raises has no base class but Exception

    monkeypatch.setattr(model.graph, "session", lambda _: Failing())
    with pytest.raises(error, match=message):
        model(torch.rand(1, 1, SIDE, SIDE))


def test_scores_that_depend_on_the_batch_are_refused(write: Write) -> None:
    mean = node("ReduceMean", ["scores"], ["mean"], axes=[0], keepdims=1)
    path = write(behind=(mean, node("Sub", ["scores", "mean"], ["out"])), outputs=("out",))
    with pytest.raises(PatchproofError, match="depend on the rest of the batch or on chance"):
        build(path)


def test_scores_that_depend_on_chance_are_refused(write: Write) -> None:
    noise = node("RandomUniformLike", ["scores"], ["noise"])
    path = write(behind=(noise, node("Add", ["scores", "noise"], ["out"])), outputs=("out",))
    with pytest.raises(PatchproofError, match="depend on the rest of the batch or on chance"):
        build(path)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"shape": ("n", 8, 2, 1)}, {}, "expected images of 8 channels .* got 1"),
        ({"shape": ("n", SIDE, SIDE, 1)}, {}, "got 1; its channels may be last"),
        ({"shape": ("n", 16)}, {}, r"expected one input of float images .* \['n', 16\]"),
        ({"extra_input": True}, {}, r"expected one input .* more tensor\(float\)"),
        ({}, {"size": 5}, "size: expected the 4x4 pixels"),
        ({}, {"size": "large"}, "size: expected pixels or"),
        ({}, {"mean": [1, 2]}, "mean: expected a number, or one for each of 1"),
        ({}, {"std": 0}, "positive deviations"),
        ({}, {"probabilities": 1}, "probabilities: expected true or false"),
        ({}, {"output": 1}, "output: expected the name"),
        ({}, {"depth": 5}, "expected options of mean, output, .* got depth"),
    ],
)
def test_graphs_and_options_that_do_not_fit_are_refused(
    write: Write, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PatchproofError, match=message) as caught:
        build(write(**changes), **options)
    assert caught.value.exit_code == 2


def test_other_classes_are_refused(write: Write) -> None:
    spec = ModelSpec(f"onnx:{write()}", 5, 1, (SIDE, SIDE))
    with pytest.raises(
        PatchproofError, match=r"expected scores of 5 classes .* got shape \(2, 3\)"
    ):
        build_model(spec)


def test_files_that_are_missing_or_something_else(write: Write, tmp_path: Path) -> None:
    with pytest.raises(PatchproofError, match="which is not a file"):
        build(tmp_path / "nowhere.onnx")
    for content in (b"", b"not ONNX", write().read_bytes()[:-60]):
        (tmp_path / "other.onnx").write_bytes(content)
        with pytest.raises(RunError, match="ONNX"):
            build(tmp_path / "other.onnx")


def test_published_weights_are_of_other_models(write: Write) -> None:
    with pytest.raises(PatchproofError, match="expected a timm:, token-drop:, torchvision: or hf:"):
        build_model(spec_of(write()), pretrained=True)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_the_extra_is_named_where_it_is_not_installed(
    write: Write, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PatchproofError, match=r"pip install 'patchproof\[onnx\]'"):
        build(path)
