"""Networks: shapes, sizes, and preprocessing inside the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError, RunError
from patchproof.models import ModelSpec, Preprocessed, SmallResNet, TinyResNet, build_model


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (SmallResNet(7, 3), (3, 32, 32)),
        (SmallResNet(7, 1, widths=(16, 32, 64), stem_stride=2), (1, 28, 28)),
        (TinyResNet(7, 1), (1, 8, 8)),
    ],
)
def test_logits_of_each_image_do_not_depend_on_the_others(
    network: nn.Module, shape: tuple[int, ...]
) -> None:
    images = torch.rand(5, *shape)
    logits = network.eval()(images)
    assert logits.shape == (5, 7)
    assert torch.allclose(network(images[2:3]), logits[2:3], atol=1e-5)


def test_the_default_network_has_the_stated_cost() -> None:
    multiply_adds = 0

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal multiply_adds
        assert isinstance(layer, nn.Conv2d)
        multiply_adds += layer.weight[0].numel() * output[0].numel()

    network = SmallResNet(10, 3).eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    network(torch.rand(1, 3, 32, 32))
    assert round(multiply_adds / 1e6) == 97


def test_preprocessing_normalises_each_channel() -> None:
    model = Preprocessed(nn.Identity(), mean=(0.5, 0.25), std=(0.5, 0.125))
    assert model(torch.full((1, 2, 3, 3), 0.5))[0, :, 0, 0].tolist() == [0.0, 2.0]


def test_preprocessing_resizes_only_where_the_sizes_differ() -> None:
    model = Preprocessed(nn.Identity(), mean=(0.0,), std=(1.0,), input_size=(8, 8))
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(images), images)
    assert model(torch.rand(2, 1, 3, 5)).shape == (2, 1, 8, 8)
    sharp = torch.zeros(1, 1, 4, 4)
    sharp[..., 2:] = 1.0
    resized = model(sharp)  # bicubic overshoots at edges: still a picture
    assert resized.min() == 0.0
    assert resized.max() == 1.0


def test_preprocessing_crops_the_centre_after_the_resize() -> None:
    columns = torch.arange(6.0).expand(1, 1, 4, 6) / 10
    model = Preprocessed(nn.Identity(), (0.0,), (1.0,), crop_size=(2, 3))
    assert torch.equal(model(columns), columns[:, :, 1:3, 1:4])
    doubled = Preprocessed(nn.Identity(), (0.0,), (1.0,), (8, 12), (4, 4), "nearest-exact")
    assert torch.allclose(doubled(columns)[0, 0, 0], torch.tensor([0.2, 0.2, 0.3, 0.3]))
    with pytest.raises(PatchproofError, match=r"at least \(2, 3\) pixels to crop, got \(1, 6\)"):
        model(columns[:, :, :1])


def test_preprocessing_resizes_in_half_precision_too() -> None:
    model = Preprocessed(nn.Identity(), (0.0,), (1.0,), (8, 8))
    images = torch.rand(1, 1, 4, 4)
    assert torch.allclose(model(images.bfloat16()), model(images.bfloat16().float()), atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": ()},
        {"mean": (0.0, 0.0)},
        {"std": (0.0,)},
        {"mean": (float("nan"),)},
        {"input_size": (0, 8)},
        {"crop_size": (8,)},
        {"interpolation": "lanczos"},
    ],
)
def test_impossible_preprocessing_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PatchproofError, match="expected"):
        Preprocessed(nn.Identity(), **({"mean": (0.0,), "std": (1.0,)} | changes))


def test_specifications_survive_json() -> None:
    spec = ModelSpec("small-resnet", 10, 1, (28, 28), {"widths": [16, 32], "stem_stride": 2})
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    assert build_model(ModelSpec.from_dict(spec.to_dict()))(torch.rand(2, 1, 28, 28)).shape == (
        2,
        10,
    )


@pytest.mark.parametrize(("name", "side"), [("timm:resnet18", 224), ("torchvision:resnet18", 224)])
def test_libraries_models_take_any_image_size(name: str, side: int) -> None:
    model = build_model(ModelSpec(name, 5, 3, (32, 32)))
    assert not model.training
    assert isinstance(model, Preprocessed)
    assert model.input_size == (side, side)
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    model.input_size = (32, 32)  # the same network, quicker
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def constant_classifier(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))


def test_a_factory_of_the_user() -> None:
    name = f"python:{__name__}:constant_classifier"
    model = build_model(ModelSpec(name, 4, 1, (2, 2), {"classes": 4}))
    assert model(torch.rand(3, 1, 2, 2)).shape == (3, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smal-resnet", "did you mean small-resnet"),
        ("vgg", "expected small-resnet, tiny-resnet, .*, timm:NAME"),
        ("timm:resnet18x", "did you mean .*resnet18"),
        ("torchvision:resnet_18", "did you mean resnet18"),
        ("python:module_alone", "expected python:package.module:factory"),
        ("python:no.such.module:f", "expected an importable module"),
        ("python:math:squrt", "did you mean sqrt"),
        ("python:builtins:dict", "to return a torch.nn.Module"),
    ],
)
def test_unknown_models_are_refused_with_a_hint(name: str, message: str) -> None:
    with pytest.raises(PatchproofError, match=message):
        build_model(ModelSpec(name, 10, 3, (32, 32)))


def test_options_that_a_network_does_not_take_are_refused() -> None:
    with pytest.raises(PatchproofError, match=r"options that small-resnet takes, .*depth"):
        build_model(ModelSpec("small-resnet", 10, 3, (32, 32), {"depth": 5}))


def test_published_weights_exist_for_library_models_only() -> None:
    with pytest.raises(PatchproofError, match="expected a timm:, token-drop:, torchvision: or hf:"):
        build_model(ModelSpec("small-resnet", 10, 3, (32, 32)), pretrained=True)
    with pytest.raises(PatchproofError, match="expected 1000 classes for the published weights"):
        build_model(ModelSpec("torchvision:resnet18", 10, 3, (32, 32)), pretrained=True)


@pytest.mark.parametrize("options", [{"widths": [8]}, {"widths": [8, 0]}, {"stem_stride": 3}])
def test_impossible_small_networks_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(PatchproofError, match="expected two or more positive widths"):
        build_model(ModelSpec("small-resnet", 10, 3, (32, 32), options))


def test_weights_that_cannot_be_fetched_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(RunError, match="cannot get the published weights of timm:resnet18"):
        build_model(ModelSpec("timm:resnet18", 10, 3, (32, 32)), pretrained=True)


@pytest.mark.parametrize("changes", [{"classes": 0}, {"channels": 0}, {"image_size": (0, 8)}])
def test_impossible_specifications_are_refused(changes: dict[str, Any]) -> None:
    values: dict[str, Any] = {
        "name": "tiny-resnet",
        "classes": 2,
        "channels": 1,
        "image_size": (8, 8),
    }
    with pytest.raises(PatchproofError, match="expected positive"):
        ModelSpec(**(values | {"image_size": (8, 8)} | changes))
