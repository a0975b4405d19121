"""Image classifiers of Hugging Face transformers, with their image processor's work inside.

A model is a repository of the hub or a folder that ``save_pretrained`` wrote. Of both only JSON and
safetensors files are read; code in them is never run.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError, RunError
from patchproof.models.preprocessed import Interpolation, Preprocessed, Preprocessing

if TYPE_CHECKING:
    from patchproof.models.spec import ModelSpec

_OPTIONS = ("mean", "new_head", "revision", "size", "std")
_SAVED_OPTIONS = ("config", "preprocessing")
"""What saved classifiers carry instead of a repository or folder."""
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")

_NOT_ARCHITECTURE = {
    "_attn_implementation",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
}
"""Entries of a configuration that name code, places, versions or a precision: left out, so that
transformers' own code runs, in float32."""

_INTERPOLATIONS: Mapping[int, Interpolation] = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""From Pillow's numbers, which image processors use."""

_ROUNDING = 2 / 255
"""Image processors resize 8-bit values, in two rounded passes; here they stay fractions."""

_CROPPED_BELOW = 384
"""ConvNeXT's image processor crops up to this size, and stretches from there."""


class TransformersClassifier(Preprocessed):
    """A transformers image classifier, from images in [0, 1] to logits.

    Args:
        network: takes ``pixel_values`` and returns an output with ``logits``.
        config: what the network is built from, as JSON values.
        preprocessing: what its image processor does.
    """

    def __init__(
        self, network: nn.Module, config: Mapping[str, Any], preprocessing: Preprocessing
    ) -> None:
        super().__init__(network, **vars(preprocessing))
        self.config = dict(config)
        self.preprocessing = preprocessing
        # as a buffer it counts in the model's digest
        text = json.dumps(self.embedded_options(), sort_keys=True).encode()
        self.register_buffer(
            "configuration", torch.frombuffer(bytearray(text), dtype=torch.uint8), persistent=False
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, classes)."""
        logits: Tensor = self.model(pixel_values=self.prepare(images)).logits
        return logits

    def embedded_options(self) -> dict[str, Any]:
        """Return the configuration, so that a saved file needs neither the hub nor a folder."""
        return {"config": self.config, "preprocessing": self.preprocessing.to_dict()}


def build_transformers(name: str, spec: ModelSpec, pretrained: bool) -> TransformersClassifier:
    """Build ``hf:NAME``.

    Args:
        name: a repository of the hub, or a folder.
        spec: what the classifier is for. Its options: ``revision`` (branch, tag or commit of the
            repository), ``new_head`` (true: published weights, but a new last layer for other
            classes, to be trained), ``mean``, ``std`` and ``size`` (instead of what the image
            processor says), and ``config`` and ``preprocessing``, which saved classifiers carry.
        pretrained: load the weights that are published there; otherwise they are random.

    Raises:
        PatchproofError: no transformers here, no such folder, not an image classifier, one for
            other classes or channels, or an image processor whose work cannot be expressed.
        RunError: the hub cannot be reached, or its files cannot be read.
    """
    import_transformers()
    if unknown := sorted(spec.options.keys() - {*_OPTIONS, *_SAVED_OPTIONS}):
        raise PatchproofError(
            f"expected options of {', '.join(_OPTIONS)} for {spec.name}, got {', '.join(unknown)}"
        )
    for option, kind in (("new_head", bool), ("revision", str)):
        if not isinstance(value := spec.options.get(option, kind()), kind):
            raise PatchproofError(f"{option}: expected a JSON {kind.__name__}, got {value!r}")
    saved = spec.options.keys() >= set(_SAVED_OPTIONS)
    folder = None if saved and not pretrained else _find(name, spec, pretrained)
    config = _read_config(spec, folder)
    network = _build_network(spec, config, folder if pretrained else None)
    model = TransformersClassifier(network, config, _read_preprocessing(spec, folder)).eval()
    _try_out(model, spec)
    return model


def import_transformers() -> None:
    """Raise ``PatchproofError`` unless transformers is installed."""
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        raise PatchproofError(
            "expected the extra hf for hf: models (pip install 'patchproof[hf]'), got none: "
            f"{error}"
        ) from error


def _find(name: str, spec: ModelSpec, pretrained: bool) -> Path:
    """Return the folder, or download the repository's files of interest and return theirs."""
    from huggingface_hub import snapshot_download

    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if "revision" in spec.options:
            raise PatchproofError(f"expected no revision of the folder {folder}, got one")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise PatchproofError(
            f"expected hf:NAME of the hub or the folder of a model, got {spec.name!r}"
        )
    patterns = ["config.json", *_PROCESSOR_FILES, *(_WEIGHT_FILES if pretrained else ())]
    try:
        return Path(
            snapshot_download(name, revision=spec.options.get("revision"), allow_patterns=patterns)
        )
    except (OSError, ValueError) as error:
        raise RunError(f"cannot get {spec.name} from the hub: {_first_line(error)}") from error


def _read_config(spec: ModelSpec, folder: Path | None) -> dict[str, Any]:
    """Return the configuration of the network, without what would run other code."""
    config = spec.options.get("config")
    if config is None:
        assert folder is not None
        config = _read_json(folder / "config.json", spec)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        hint = ""
        if isinstance(config, dict) and "architecture" in config:
            hint = f"; use timm:{config['architecture']}"
        raise PatchproofError(
            f"expected a configuration of transformers with a model_type in {spec.name}, "
            f"got none{hint}"
        )
    if config["model_type"].startswith("timm"):
        raise PatchproofError(
            f"expected a network of transformers in {spec.name}, got one of timm: use "
            f"timm:{config.get('architecture', 'NAME')}"
        )
    if "quantization_config" in config:
        raise PatchproofError(f"expected weights as numbers in {spec.name}, got quantized ones")
    cleaned: dict[str, Any] = _without(config, _NOT_ARCHITECTURE)
    return cleaned


def _read_json(path: Path, spec: ModelSpec) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PatchproofError(f"expected {path.name} in {spec.name}, got none") from error
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path.name} of {spec.name}: {_first_line(error)}") from error


def _without(value: Any, names: set[str]) -> Any:
    """Return JSON values without the entries of some names, however deep."""
    if isinstance(value, dict):
        return {key: _without(inner, names) for key, inner in value.items() if key not in names}
    if isinstance(value, list):
        return [_without(inner, names) for inner in value]
    return value


def _build_network(
    spec: ModelSpec, values: Mapping[str, Any], weights_folder: Path | None
) -> nn.Module:
    """Build the network, with the weights in a folder or with random ones."""
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        AutoConfig,
        AutoModelForImageClassification,
    )

    try:
        with _quiet():
            config = AutoConfig.for_model(**values)
    except Exception as error:  # each configuration checks its values in its own way
        raise PatchproofError(
            f"expected a configuration that transformers knows in {spec.name}, got model type "
            f"{values['model_type']!r}: {_first_line(error)}"
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise PatchproofError(
            f"expected an image classifier in {spec.name}, got model type {values['model_type']!r}"
        )
    channels = getattr(config, "num_channels", spec.channels)
    if channels != spec.channels:
        raise PatchproofError(
            f"expected images of {channels} channels for {spec.name}, got {spec.channels}"
        )
    new_head = spec.options.get("new_head", False)
    if weights_folder is not None and not new_head and config.num_labels != spec.classes:
        raise PatchproofError(
            f"expected {config.num_labels} classes for the weights of {spec.name}, got "
            f"{spec.classes}; the option new_head=true starts with a new last layer, to be trained"
        )
    if config.num_labels != spec.classes:
        config.num_labels = spec.classes
    with _quiet():
        if weights_folder is None:
            network = AutoModelForImageClassification.from_config(config)
        else:
            network = _load(config, weights_folder, spec, new_head)
    if network.main_input_name != "pixel_values":
        raise PatchproofError(
            f"expected a network of pixel_values in {spec.name}, got {network.main_input_name}"
        )
    checked: nn.Module = network.float()
    return checked


def _load(config: Any, folder: Path, spec: ModelSpec, new_head: bool) -> Any:
    """Load the safetensors of a folder; every tensor, but for those of a new last layer."""
    from safetensors import SafetensorError
    from transformers import AutoModelForImageClassification

    try:
        network, report = AutoModelForImageClassification.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=new_head,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise RunError(f"cannot read the weights of {spec.name}: {_first_line(error)}") from error
    lacking = sorted(str(key) for key in report["missing_keys"])
    if lacking and not new_head:
        raise RunError(
            f"expected all weights in {spec.name}, got none for {', '.join(lacking[:3])}; the "
            "option new_head=true starts with new ones, to be trained"
        )
    return network


def _read_preprocessing(spec: ModelSpec, folder: Path | None) -> Preprocessing:
    """Return what the images go through before the network."""
    if "preprocessing" in spec.options:
        return Preprocessing.from_dict(spec.options["preprocessing"])
    if {"mean", "std", "size"} & spec.options.keys():
        return Preprocessing.from_options(spec.options, spec.channels)
    from transformers import AutoImageProcessor

    assert folder is not None
    if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
        raise PatchproofError(
            f"expected an image processor ({' or '.join(_PROCESSOR_FILES)}) in {spec.name}, or the "
            "options mean, std and size instead, got none"
        )
    try:
        with _quiet():
            processor = AutoImageProcessor.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        preprocessing = _express(processor.to_dict(), spec)
    except PatchproofError:
        raise
    except Exception as error:  # each image processor checks its values in its own way
        raise PatchproofError(
            f"expected an image processor that can be used in {spec.name}, or the options mean, "
            f"std and size instead, got one that fails: {_first_line(error)}"
        ) from error
    _compare(processor, preprocessing, spec)
    return preprocessing


def _express(values: Mapping[str, Any], spec: ModelSpec) -> Preprocessing:
    """Return what an image processor with these values does to images of ``spec.image_size``."""
    kind = values.get("image_processor_type", "image processor")
    input_size = crop_size = None
    interpolation = _INTERPOLATIONS.get(int(values.get("resample", 2)))
    if values.get("do_resize"):
        if interpolation is None:
            raise PatchproofError(
                f"expected nearest, bilinear or bicubic resizing in the {kind} of {spec.name}, "
                f"got resample={values['resample']}"
            )
        input_size, crop_size = _resize(dict(values.get("size") or {}), values, spec)
    if values.get("do_center_crop"):
        crop = dict(values.get("crop_size") or {})
        crop_size = (int(crop["height"]), int(crop["width"]))
    factor = 255 * (values.get("rescale_factor", 1 / 255) if values.get("do_rescale") else 1.0)
    mean: Any = values.get("image_mean") if values.get("do_normalize") else 0.0
    std: Any = values.get("image_std") if values.get("do_normalize") else 1.0
    options = {
        name: [number / factor for number in value]
        if isinstance(value, (list, tuple))
        else value / factor
        for name, value in (("mean", mean), ("std", std))
    }
    scaled = Preprocessing.from_options(options, spec.channels)
    return Preprocessing(scaled.mean, scaled.std, input_size, crop_size, interpolation or "bicubic")


def _resize(
    size: Mapping[str, Any], values: Mapping[str, Any], spec: ModelSpec
) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Return the (H, W) that images are resized to, and are then cropped to, if they are."""
    if size.keys() == {"height", "width"}:
        return (int(size["height"]), int(size["width"])), None
    if size.keys() != {"shortest_edge"}:
        raise PatchproofError(
            "expected a size of height and width or of the shortest edge in the image processor of "
            f"{spec.name}, got {dict(size)}"
        )
    edge, crop = int(size["shortest_edge"]), None
    if values.get("crop_pct"):
        if edge >= _CROPPED_BELOW:
            return (edge, edge), None
        crop = (edge, edge)
        edge = int(edge / values["crop_pct"])
    shorter = min(spec.image_size)
    height, width = (edge * side // shorter for side in spec.image_size)
    return (height, width), crop


def _compare(processor: Any, preprocessing: Preprocessing, spec: ModelSpec) -> None:
    """Raise unless the image processor itself does the same to an image of random pixels."""
    generator = torch.Generator().manual_seed(0)
    shape = (spec.channels, *spec.image_size)
    # mid greys, so that no cubic overshoots: 8-bit values are cut off after each pass
    image = torch.randint(64, 192, shape, dtype=torch.uint8, generator=generator)
    ours = Preprocessed(nn.Identity(), **vars(preprocessing))
    try:
        theirs = processor(
            images=image.numpy(), input_data_format="channels_first", return_tensors="pt"
        )["pixel_values"]
        got = ours.prepare(image[None] / 255)
        same = theirs.shape == got.shape and bool(
            ((theirs - got).abs() * ours.std <= _ROUNDING).all()
        )
    except Exception as error:  # each image processor fails in its own way
        raise PatchproofError(
            f"expected an image processor that takes images of {shape} in {spec.name}, got "
            f"{type(processor).__name__}: {_first_line(error)}"
        ) from error
    if not same:
        raise PatchproofError(
            "expected an image processor that resizes, crops and normalises and does no more in "
            f"{spec.name}, got {type(processor).__name__}, which does something else; give the "
            "options mean, std and size instead"
        )


def _try_out(model: TransformersClassifier, spec: ModelSpec) -> None:
    """Raise unless the network takes the images, as they come out of the preprocessing."""
    try:
        with torch.no_grad():
            shape = tuple(model(torch.zeros(1, spec.channels, *spec.image_size)).shape)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, PatchproofError):
            raise
        raise PatchproofError(
            f"expected a network for images of {spec.image_size} pixels and {spec.channels} "
            f"channels, got {spec.name}, which fails: {_first_line(error)}"
        ) from error
    if shape != (1, spec.classes):
        raise PatchproofError(
            f"expected logits of {spec.classes} classes from {spec.name}, got shape {shape}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' log and progress bars off the terminal; errors are raised anyway."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
