"""Which network: a name and its options, from which the network is built again."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from patchproof.errors import PatchproofError, RunError
from patchproof.models.ablation import AblationResNet, BandResNet
from patchproof.models.bagnet import BagNet
from patchproof.models.bagnet_resnet import PreprocessedBagNet
from patchproof.models.crops import CropResNet9
from patchproof.models.huggingface import build_transformers
from patchproof.models.interval import IntervalConvNet, IntervalMLP
from patchproof.models.onnx import build_onnx
from patchproof.models.preprocessed import Preprocessed
from patchproof.models.resmlp import PUBLISHED, resized_resmlp
from patchproof.models.small import SmallResNet, TinyResNet
from patchproof.models.token_drop import TokenDropTransformer

_OWN: dict[str, Callable[..., nn.Module]] = {
    "small-resnet": SmallResNet,
    "tiny-resnet": TinyResNet,
    "bagnet": BagNet,
    "bagnet9": partial(PreprocessedBagNet, receptive_field=9),
    "bagnet17": partial(PreprocessedBagNet, receptive_field=17),
    "bagnet33": partial(PreprocessedBagNet, receptive_field=33),
    "band-resnet": BandResNet,
    "ablation-resnet": AblationResNet,
}
_OF_ONE_SIZE: dict[str, Callable[..., nn.Module]] = {
    "crop-resnet9": CropResNet9,
    "ibp-mlp": IntervalMLP,
    "ibp-conv2": partial(
        IntervalConvNet, kernels=(4, 4), strides=(2, 2), widths=(4, 8), hidden=(256,)
    ),
    "ibp-conv4": partial(
        IntervalConvNet,
        kernels=(3, 4, 3, 4),
        strides=(1, 2, 1, 2),
        widths=(4, 4, 8, 8),
        hidden=(256, 256),
    ),
    "ibp-conv5-wide": partial(
        IntervalConvNet,
        kernels=(3, 3, 3, 3, 3),
        strides=(1, 1, 2, 1, 1),
        widths=(64, 64, 128, 128, 128),
        hidden=(512,),
    ),
}
"""Networks that are built for images of one size."""
_READ_FILES = {
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
}
"""Options by which timm would read weights from elsewhere."""
_NAMES = (
    f"{', '.join([*_OWN, *_OF_ONE_SIZE])}, token-drop:NAME, timm:NAME, torchvision:NAME, hf:NAME, "
    "onnx:FILE or python:package.module:factory"
)


@dataclass(frozen=True)
class ModelSpec:
    """What a classifier is built from, apart from its weights.

    Attributes:
        name: ``small-resnet``, ``tiny-resnet``, ``bagnet``, ``bagnet9``, ``bagnet17``,
            ``bagnet33``, ``band-resnet``, ``ablation-resnet``, ``crop-resnet9``, ``ibp-mlp``,
            ``ibp-conv2``, ``ibp-conv4``, ``ibp-conv5-wide``, ``token-drop:NAME`` (a vision
            transformer of timm that drops hidden tokens), ``timm:NAME``, ``torchvision:NAME``,
            ``hf:NAME`` (a repository of the Hugging Face hub, or a folder), ``onnx:FILE`` or
            ``python:package.module:factory``.
        classes: number of classes.
        channels: channels of the images.
        image_size: (H, W) of the images, in pixels; a resize to another size is inside the model.
        options: keyword arguments for the network; of ``python:`` factories, the only ones.
    """

    name: str
    classes: int
    channels: int
    image_size: tuple[int, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.classes < 1 or self.channels < 1 or min(self.image_size) < 1:
            raise PatchproofError(
                "expected positive classes, channels and image size, got "
                f"{self.classes}, {self.channels} and {self.image_size}"
            )
        object.__setattr__(self, "image_size", (int(self.image_size[0]), int(self.image_size[1])))
        object.__setattr__(self, "options", dict(self.options))

    def to_dict(self) -> dict[str, Any]:
        """Return the specification as JSON values."""
        return asdict(self) | {"image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Return the specification that ``to_dict`` wrote."""
        return cls(**{**values, "image_size": tuple(values["image_size"])})


def build_model(spec: ModelSpec, *, pretrained: bool = False) -> nn.Module:
    """Build a classifier from images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.

    Args:
        spec: which network.
        pretrained: load the weights published with a ``timm:``, ``token-drop:``, ``torchvision:``
            or ``hf:`` model.

    Raises:
        PatchproofError: no such model (the message names close matches), options that it does not
            take, or published weights of a network that has none.
        RunError: the published weights cannot be fetched, or the files of the model not read.
    """
    source, _, name = spec.name.partition(":")
    try:
        if source == "timm":
            model = _timm(name, spec, pretrained)
        elif source == "token-drop":
            model = _token_drop(name, spec, pretrained)
        elif source == "torchvision":
            model = _torchvision(name, spec, pretrained)
        elif source == "hf":
            model = build_transformers(name, spec, pretrained)
        elif pretrained:
            raise PatchproofError(
                f"expected a timm:, token-drop:, torchvision: or hf: model, got {spec.name!r}"
            )
        elif source == "onnx":
            model = build_onnx(name, spec)
        elif source == "python":
            model = _python(name, spec)
        elif spec.name in _OWN:
            model = _OWN[spec.name](spec.classes, spec.channels, **spec.options)
        elif spec.name in _OF_ONE_SIZE:
            factory = _OF_ONE_SIZE[spec.name]
            model = factory(spec.classes, spec.channels, spec.image_size, **spec.options)
        else:
            raise _unknown(spec.name, [*_OWN, *_OF_ONE_SIZE], _NAMES)
    except TypeError as error:
        raise PatchproofError(
            f"expected options that {spec.name} takes, got {dict(spec.options)}: {error}"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise RunError(f"cannot get the published weights of {spec.name}: {error}") from error
    if source == "python":  # left as the user made it
        return model.eval()
    return model.eval().to(memory_format=torch.channels_last)  # convolutions run fastest so


def _unknown(name: str, known: list[str], expected: str) -> PatchproofError:
    close = difflib.get_close_matches(name, known)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return PatchproofError(f"expected {expected}, got {name!r}{hint}")


def _timm(name: str, spec: ModelSpec, pretrained: bool) -> nn.Module:
    import timm
    from timm.data.config import resolve_model_data_config

    if reading := _READ_FILES & spec.options.keys():
        raise PatchproofError(f"expected options of the network, got {', '.join(sorted(reading))}")
    if not timm.is_model(name):
        raise _unknown(name, timm.list_models(), "a timm model")
    if name in PUBLISHED and spec.options and not pretrained:
        model = resized_resmlp(name, spec.classes, spec.channels, spec.options)
    else:
        model = timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=spec.classes,
            in_chans=spec.channels,
            **spec.options,
        )
    made_for: Callable[[nn.Module], dict[str, Any]] = resolve_model_data_config
    data = made_for(model)
    mean, std = (data[key][: spec.channels] for key in ("mean", "std"))
    size = spec.options.get("img_size", data["input_size"][1:])
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocessed(model, mean, std, (height, width))


def _token_drop(name: str, spec: ModelSpec, pretrained: bool) -> nn.Module:
    ablation = {"ablation": "column", "size": 4, "fill": 0.5}
    made_for: dict[str, Any] = {key: spec.options.get(key, ablation[key]) for key in ablation}
    others = {key: value for key, value in spec.options.items() if key not in ablation}
    model = _timm(name, replace(spec, options={"img_size": spec.image_size, **others}), pretrained)
    mean, std = (getattr(model, key).flatten().tolist() for key in ("mean", "std"))
    return TokenDropTransformer(model.get_submodule("model"), mean=mean, std=std, **made_for)


def _torchvision(name: str, spec: ModelSpec, pretrained: bool) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise _unknown(name, known, "a torchvision classifier")
    if spec.channels != 3:
        raise PatchproofError(f"expected 3 channels for {spec.name}, got {spec.channels}")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    if pretrained:
        if spec.classes != len(weights.meta["categories"]):
            raise PatchproofError(
                f"expected {len(weights.meta['categories'])} classes for the published weights of "
                f"{spec.name}, got {spec.classes}"
            )
        model = torchvision.models.get_model(name, weights=weights, **spec.options)
    else:
        model = torchvision.models.get_model(
            name, weights=None, num_classes=spec.classes, **spec.options
        )
    transform = weights.transforms()
    side = int(transform.crop_size[0])
    return Preprocessed(model, transform.mean, transform.std, (side, side))


def _python(name: str, spec: ModelSpec) -> nn.Module:
    module_name, _, factory_name = name.partition(":")
    if not factory_name:
        raise PatchproofError(f"expected python:package.module:factory, got {spec.name!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise PatchproofError(
            f"expected an importable module, got {module_name!r}: {error}"
        ) from error
    factory = getattr(module, factory_name, None)
    if factory is None:
        raise _unknown(factory_name, dir(module), f"a factory in {module_name}")
    model = factory(**spec.options)
    if not isinstance(model, nn.Module):
        raise PatchproofError(
            f"expected {spec.name} to return a torch.nn.Module, got {type(model)}"
        )
    return model
