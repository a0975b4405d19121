"""ONNX models, run by ONNX Runtime: scores, but no gradients."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError, RunError
from patchproof.models.preprocessed import Preprocessed, Preprocessing

if TYPE_CHECKING:
    from patchproof.models.spec import ModelSpec

_OPTIONS = ("mean", "output", "probabilities", "size", "std")
_SAVED_OPTIONS = ("graph_bytes", "preprocessing")
"""What saved classifiers carry instead of a file."""
_LARGEST = 2**31 - 1
"""Bytes of the largest ONNX model that is one message: protobuf has no larger ones."""
_SILENT = 4
_SAME = 1e-4
"""Difference of scores, relative to the largest, that is put down to rounding."""


class OnnxGraph(nn.Module):
    """An ONNX graph as a module without parameters, whose buffer ``graph`` is the whole model.

    So the digest of its weights covers every byte of it, and a saved classifier contains it.

    Args:
        graph: the serialized model, external weights included; zeros where ``load_state_dict`` is
            to bring it.
        output: the name of the output with the scores; None if there is but one.
        probabilities: the output is probabilities; their logarithms are the scores.
    """

    graph: Tensor

    def __init__(self, graph: bytes, output: str | None, probabilities: bool) -> None:
        super().__init__()
        self.register_buffer("graph", torch.frombuffer(bytearray(graph), dtype=torch.uint8))
        self.output = output
        self.probabilities = probabilities
        self._session: tuple[torch.device, Any] | None = None

    def extra_repr(self) -> str:
        """Return what is done with which output."""
        return f"output={self.output}, probabilities={self.probabilities}"

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, C, H, W) to scores (N, classes); without gradients.

        Raises:
            PatchproofError: a gradient is asked for, or ONNX Runtime does not run on this device.
            RunError: ONNX Runtime fails.
        """
        if images.requires_grad and torch.is_grad_enabled():
            raise PatchproofError(
                "expected images without gradients for an ONNX model, which computes scores only"
            )
        session = self.session(images.device)
        entry = session.get_inputs()[0]
        names = [self.output or session.get_outputs()[0].name]
        values = images.detach().float().cpu().contiguous().numpy()
        try:
            parts = [
                session.run(names, {entry.name: batch})[0]
                for batch in _batches(values, entry.shape[0])
            ]
        except Exception as error:  # its exceptions share no class
            if "allocate memory" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise RunError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error
        scores = torch.from_numpy(np.concatenate(parts)[: len(values)]).float()
        if self.probabilities:
            scores = scores.clamp(min=torch.finfo(torch.float32).tiny).log()
        return scores.to(images.device)

    def session(self, device: torch.device) -> Any:
        """Return the ``onnxruntime.InferenceSession`` on a device, made when it is first needed.

        Raises:
            PatchproofError: ONNX Runtime does not run on this device.
            RunError: the graph cannot be read.
        """
        if self._session is None or self._session[0] != device:
            self._session = device, _start(self.graph.cpu().numpy().tobytes(), device)
        return self._session[1]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._session = None  # of the graph before
        super()._load_from_state_dict(*args, **kwargs)


class OnnxClassifier(Preprocessed):
    """An ``OnnxGraph`` with its preprocessing, from images in [0, 1] to scores."""

    def __init__(self, graph: OnnxGraph, preprocessing: Preprocessing) -> None:
        super().__init__(graph, **vars(preprocessing))
        self.preprocessing = preprocessing

    @property
    def graph(self) -> OnnxGraph:
        """The graph, without the preprocessing."""
        assert isinstance(self.model, OnnxGraph)
        return self.model

    def embedded_options(self) -> dict[str, Any]:
        """Return what a saved file needs beside the graph, which it contains."""
        return {
            "graph_bytes": len(self.graph.graph),
            "preprocessing": self.preprocessing.to_dict(),
        }


def build_onnx(name: str, spec: ModelSpec) -> OnnxClassifier:
    """Build ``onnx:FILE``.

    Args:
        name: the file.
        spec: what the classifier is for. Its options: ``mean``, ``std`` (of each channel, or one
            number) and ``size`` (pixels, or [height, width]), which the graph wants of its images;
            ``output``, the name of the output with the scores, where there are several;
            ``probabilities`` (true: the output is probabilities, and their logarithms are the
            scores); and ``graph_bytes`` and ``preprocessing``, which saved classifiers carry.

    Raises:
        PatchproofError: no ONNX Runtime here, no such file, or a graph of other images, classes or
            outputs.
        RunError: the file is not an ONNX model, or fails.
    """
    import_onnxruntime()
    if unknown := sorted(spec.options.keys() - {*_OPTIONS, *_SAVED_OPTIONS}):
        raise PatchproofError(
            f"expected options of {', '.join(_OPTIONS)} for {spec.name}, got {', '.join(unknown)}"
        )
    output, probabilities = spec.options.get("output"), spec.options.get("probabilities", False)
    if not isinstance(output, str | None):
        raise PatchproofError(f"output: expected the name of an output, got {output!r}")
    if not isinstance(probabilities, bool):
        raise PatchproofError(f"probabilities: expected true or false, got {probabilities!r}")
    if "graph_bytes" in spec.options:
        size = spec.options["graph_bytes"]
        if not isinstance(size, int) or not 0 < size <= _LARGEST:
            raise RunError(f"expected a graph of at most {_LARGEST:,} bytes, got {size!r}")
        preprocessing = Preprocessing.from_dict(spec.options["preprocessing"])
        return OnnxClassifier(OnnxGraph(bytes(size), output, probabilities), preprocessing)
    graph = OnnxGraph(_read(Path(name).expanduser()), output, probabilities)
    size = _check_signature(graph, spec)
    model = OnnxClassifier(graph, Preprocessing.from_options(spec.options, spec.channels, size))
    _try_out(model.eval(), spec)
    return model


def import_onnxruntime() -> None:
    """Raise ``PatchproofError`` unless ONNX and ONNX Runtime are installed."""
    try:
        for module in ("onnx", "onnxruntime"):
            importlib.import_module(module)
    except ImportError as error:
        raise PatchproofError(
            "expected the extra onnx for onnx: models (pip install 'patchproof[onnx]'), got none: "
            f"{error}"
        ) from error


def _read(path: Path) -> bytes:
    """Return a model in one piece: its file, with the weights that lie in files beside it."""
    import onnx
    from onnx.external_data_helper import load_external_data_for_model, uses_external_data

    if not path.is_file():
        raise PatchproofError(f"expected an ONNX file, got {path}, which is not a file")
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
        if any(uses_external_data(tensor) for tensor in model.graph.initializer):
            load_external_data_for_model(model, str(path.parent))
            content = model.SerializeToString(deterministic=True)
    except Exception as error:  # protobuf, onnx and the file system raise their own
        raise RunError(f"cannot read {path} as an ONNX model: {_first_line(error)}") from error
    if not model.graph.node:
        raise RunError(f"expected an ONNX model in {path}, got no graph")
    return content


def _start(content: bytes, device: torch.device) -> Any:
    """Return a session of ONNX Runtime, without TF32 and timed choices, as certificates need it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = _SILENT
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        exact = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0, **exact}))
    available = onnxruntime.get_available_providers()
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and "CUDAExecutionProvider" not in available
    ):
        raise PatchproofError(
            f"expected a device of ONNX Runtime ({', '.join(available)}), got {device}: use device "
            "cpu, or install onnxruntime-gpu for cuda"
        )
    try:
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except Exception as error:  # its exceptions share no class
        raise RunError(f"ONNX Runtime cannot read the model: {_first_line(error)}") from error
    if device.type == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise RunError("ONNX Runtime cannot use CUDA here: see its warning, or use device cpu")
    return session


def _check_signature(graph: OnnxGraph, spec: ModelSpec) -> tuple[int, int] | None:
    """Return the (H, W) that the graph is made for, if it says; raise if it takes other images."""
    session = graph.session(torch.device("cpu"))
    inputs, outputs = session.get_inputs(), session.get_outputs()
    signature = ", ".join(f"{entry.name} {entry.type} {entry.shape}" for entry in inputs)
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        raise PatchproofError(
            "expected one input of float images (N, channels, height, width) of "
            f"{spec.name}, got {signature}"
        )
    _, channels, height, width = inputs[0].shape
    if isinstance(channels, int) and channels != spec.channels:
        hint = (
            "; its channels may be last: export it with channels first" if width in (1, 3) else ""
        )
        raise PatchproofError(
            f"expected images of {channels} channels for {spec.name}, whose input is {signature}, "
            f"got {spec.channels}{hint}"
        )
    names = [entry.name for entry in outputs]
    if graph.output is None and len(names) > 1:
        raise PatchproofError(
            f"expected one output of {spec.name}, got {', '.join(names)}: say by the option output "
            "which holds the scores of the classes"
        )
    if graph.output is not None and graph.output not in names:
        raise PatchproofError(f"output: expected {' or '.join(names)}, got {graph.output!r}")
    kind = next(o.type for o in outputs if graph.output in (None, o.name))
    if kind not in ("tensor(float)", "tensor(double)", "tensor(float16)"):
        raise PatchproofError(f"expected scores of {spec.name}, got an output of type {kind}")
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    asked = Preprocessing.from_options(spec.options, spec.channels).input_size
    if asked not in (None, (height, width)):
        raise PatchproofError(
            f"size: expected the {height}x{width} pixels of {spec.name}, got {asked}"
        )
    return height, width


def _try_out(model: OnnxClassifier, spec: ModelSpec) -> None:
    """Raise unless the graph scores each image by itself, always alike, with finite logits."""
    generator = torch.Generator().manual_seed(0)
    first, second, third = torch.rand(
        3, 1, spec.channels, *spec.image_size, generator=generator
    ).unbind()
    with torch.no_grad():
        scores = model(torch.cat([first, second]))
        beside_another = model(torch.cat([first, third]))
    if tuple(scores.shape) != (2, spec.classes):
        raise PatchproofError(
            f"expected scores of {spec.classes} classes from {spec.name}, got shape "
            f"{tuple(scores.shape)} for two images"
        )
    rounding = _SAME * max(1.0, float(scores.abs().max()))
    if not torch.allclose(scores[0], beside_another[0], rtol=0, atol=rounding, equal_nan=True):
        raise PatchproofError(
            f"expected a model that scores each image by itself, got {spec.name}, whose scores "
            "of an image depend on the rest of the batch or on chance: export it in eval mode"
        )
    shares = scores.exp() if model.graph.probabilities else scores
    sum_to_one = bool((shares >= 0).all() and ((shares.sum(1) - 1).abs() <= _SAME).all())
    if sum_to_one and not model.graph.probabilities:
        raise PatchproofError(
            f"expected logits of {spec.name}, got probabilities: export it without its softmax, or "
            "say by the option probabilities=true that their logarithms are to be taken"
        )
    if model.graph.probabilities and not sum_to_one:
        raise PatchproofError(
            f"probabilities: expected scores of {spec.name} that sum to 1, got other ones: leave "
            "the option out"
        )


def _batches(values: np.ndarray[Any, Any], size: int | str | None) -> Iterator[Any]:
    """Yield the images (N, C, H, W) in batches of a fixed size, the last one filled up; or all."""
    if not isinstance(size, int):
        yield values
        return
    for start in range(0, len(values), size):
        batch = values[start : start + size]
        missing = size - len(batch)
        yield np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
