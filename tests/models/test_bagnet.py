"""BagNets: local logits whose mean is the output, and the layout of the published weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from patchproof.errors import PatchproofError
from patchproof.models import (
    BagNet,
    ModelSpec,
    build_model,
    load_classifier,
    load_weights,
    save_classifier,
)
from patchproof.models.bagnet import kernel_strides
from patchproof.models.bagnet_resnet import BagNetResNet, PreprocessedBagNet
from patchproof.views import receptive_fields
from patchproof.views.receptive import planted

NAMES = {"bagnet9": 9, "bagnet17": 17, "bagnet33": 33}


def narrow(name: str, **options: object) -> PreprocessedBagNet:
    torch.manual_seed(0)
    model = build_model(ModelSpec(name, 5, 3, (224, 224), {"width": 2, **options}))
    assert isinstance(model, PreprocessedBagNet)
    return model


def assert_close(value: Tensor, expected: Tensor) -> None:
    assert torch.allclose(
        value, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max())
    )


@pytest.mark.parametrize("model", [BagNet(5, 3, 9, 2, (8, 8, 8)), BagNet(5, 3, 5, 1, (8, 8, 8), 0)])
def test_the_output_of_a_bagnet_is_the_mean_of_its_local_logits(model: BagNet) -> None:
    images = torch.rand(2, 3, 32, 28)
    local = model.eval().local_logits(images)
    assert local.shape[:2] == (2, 5)
    assert_close(local.mean((2, 3)), model(images))


@pytest.mark.parametrize("name", NAMES)
def test_the_output_of_a_published_bagnet_is_the_mean_of_its_local_logits(name: str) -> None:
    model = narrow(name)
    images = torch.rand(2, 3, 56, 48)
    field = NAMES[name]
    local = model.local_logits(images)
    assert local.shape == (2, 5, (56 - field) // 8 + 1, (48 - field) // 8 + 1)
    assert_close(local.mean((2, 3)), model(images))


@pytest.mark.parametrize("name", NAMES)
def test_a_local_logit_is_that_of_the_part_it_sees(name: str) -> None:
    """Convolutions are unpadded, so the part alone, as an image, has one feature: the same."""
    model = narrow(name)
    images = torch.rand(2, 3, 56, 64)
    local = model.local_logits(images)
    for i in range(local.shape[2]):
        for j in range(local.shape[3]):
            part = images[:, :, 8 * i : 8 * i + NAMES[name], 8 * j : 8 * j + NAMES[name]]
            assert_close(model.local_logits(part)[:, :, 0, 0], local[:, :, i, j])


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("bagnet9", (72, 65), (8, 8)),
        ("bagnet17", (224, 224), (26, 26)),
        ("bagnet33", (89, 72), (8, 5)),
    ],
)
def test_the_receptive_field_is_what_the_name_says(
    name: str, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    """BagNet-17 has 26x26 features of 224x224 pixels, with a stride of 8."""
    fields = receptive_fields(narrow(name), size, 3)
    assert fields.grid == grid
    assert fields.size == (NAMES[name], NAMES[name])
    assert fields.stride == (8, 8)
    assert fields.offset == (0, 0)


@pytest.mark.parametrize("name", ["bagnet9", "bagnet17"])
def test_a_planted_nan_marks_what_sees_the_pixel(name: str) -> None:
    model, size = narrow(name), (18, 25)
    fields = receptive_fields(model, size, 3)
    pixels = torch.eye(size[0] * size[1], dtype=torch.bool).view(-1, *size)
    marks = planted(model, size, 3, pixels).flatten(1).T.reshape(-1, *size)
    assert torch.equal(marks, fields.pixels().pixels())


def test_a_resize_inside_widens_what_a_feature_sees_in_pixels_of_the_threat() -> None:
    """At 96 pixels a side, the 17 pixels of a feature are 6 of 32x32, and bicubic weights more."""
    fields = receptive_fields(narrow("bagnet17", size=96), (32, 32), 3)
    assert fields.grid == (10, 10)
    assert 6 < fields.size[0] <= 10


def test_tensors_are_named_and_shaped_as_published() -> None:
    """As in ResNet-50, with a second convolution before the first normalisation."""
    with torch.device("meta"):
        reference = resnet50().state_dict()
        networks = {name: BagNetResNet(1000, 3, field) for name, field in NAMES.items()}
    kernels = {
        "bagnet9": ["layer1", "layer2"],
        "bagnet17": ["layer1", "layer2", "layer3"],
        "bagnet33": ["layer1", "layer2", "layer3", "layer4"],
    }
    for name, network in networks.items():
        state = network.state_dict()
        assert state.keys() == reference.keys() | {"conv2.weight"}
        assert state["conv1.weight"].shape == (64, 3, 1, 1)
        assert state["conv2.weight"].shape == (64, 64, 3, 3)
        for key in reference.keys() - {"conv1.weight"}:
            shape = reference[key].shape
            if key.endswith(".conv2.weight") and key[:-15] not in kernels[name]:
                shape = (*shape[:2], 1, 1)
            if key.endswith(".conv2.weight") and key[-14] != "0":
                shape = (*shape[:2], 1, 1)
            assert state[key].shape == shape, (name, key)


def test_published_weights_are_taken(tmp_path: Path) -> None:
    torch.manual_seed(1)
    published = BagNetResNet(5, 3, 17, width=2).eval()
    torch.save(published.state_dict(), tmp_path / "bagnet17.pth.tar")
    model = narrow("bagnet17")
    load_weights(model, tmp_path / "bagnet17.pth.tar")
    images = torch.rand(1, 3, 40, 40)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    assert_close(model(images), published(normalised))


@pytest.mark.parametrize(
    ("name", "options"),
    [("bagnet", {"receptive_field": 5, "widths": [4, 4, 4]}), ("bagnet33", {"width": 2})],
)
def test_a_saved_bagnet_is_built_again(
    tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    spec = ModelSpec(name, 5, 3, (40, 40), options)
    model = build_model(spec)
    save_classifier(tmp_path / "model.safetensors", model, spec, {})
    loaded, _ = load_classifier(tmp_path / "model.safetensors")
    images = torch.rand(1, 3, 40, 40)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    ("receptive_field", "stride"),
    [(r, s) for r in range(3, 20, 2) for s in (1, 2, 4) if (r, s) not in {(3, 4), (5, 4)}],
)
def test_kernels_add_up_to_the_receptive_field(receptive_field: int, stride: int) -> None:
    seen, step = 1, 1
    try:
        strides = kernel_strides(receptive_field, stride)
    except PatchproofError:
        assert stride > 1
        return
    for kernel_stride in strides:
        seen, step = seen + 2 * step, step * kernel_stride
    assert (seen, step) == (receptive_field, stride)


def test_impossible_bagnets_are_refused() -> None:
    for receptive_field, stride in ((4, 1), (9, 3), (1, 1), (3, 4)):
        with pytest.raises(PatchproofError, match="expected a receptive field of 3x3"):
            BagNet(2, 3, receptive_field, stride)
    with pytest.raises(PatchproofError, match=r"expected one of \[9, 17, 33\], got 12"):
        BagNetResNet(2, 3, 12)
    with pytest.raises(PatchproofError, match="expected up to 3, got 4"):
        PreprocessedBagNet(2, 4)
    with pytest.raises(PatchproofError, match=r"at least 17 pixels a side, got \(16, 20\)"):
        narrow("bagnet17")(torch.rand(1, 3, 16, 20))


def test_training_reaches_every_weight() -> None:
    # below 8 channels the strided 1x1 convolutions crash oneDNN (PyTorch 2.15, AVX2 alone)
    model = narrow("bagnet9", width=8).train()
    model(torch.rand(4, 3, 24, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layers_of(model))


def layers_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim > 1]
