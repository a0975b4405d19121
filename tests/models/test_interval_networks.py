"""The networks of the interval bounds, and the U-Net that guides their training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from patchproof.errors import PatchproofError
from patchproof.models import (
    GuideUNet,
    IntervalConvNet,
    IntervalMLP,
    ModelSpec,
    build_model,
    load_classifier,
    save_classifier,
)

NAMES = ("ibp-mlp", "ibp-conv2", "ibp-conv4", "ibp-conv5-wide")


@pytest.mark.parametrize(
    ("name", "options", "side", "parameters"),
    [
        ("ibp-mlp", {}, 28, 784 * 255 + 255 + 255 * 10 + 10),
        ("ibp-mlp", {"hidden": [20, 30]}, 28, 784 * 20 + 20 + 20 * 30 + 30 + 30 * 10 + 10),
        ("ibp-conv2", {}, 28, (16 + 1) * 4 + (64 + 1) * 8 + 393 * 256 + 257 * 10),
        ("ibp-conv2", {"first_kernel": 11}, 28, (121 + 1) * 4 + 65 * 8 + 393 * 256 + 257 * 10),
        ("ibp-conv4", {}, 28, 40 + 65 * 4 + 37 * 8 + 129 * 8 + 393 * 256 + 257 * 256 + 257 * 10),
    ],
)
def test_the_networks_have_the_papers_layers(
    name: str, options: Mapping[str, Any], side: int, parameters: int
) -> None:
    model = build_model(ModelSpec(name, 10, 1, (side, side), options))
    assert sum(tensor.numel() for tensor in model.parameters()) == parameters
    layers = {type(layer) for layer in model.children()}
    assert layers <= {nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear}


def test_the_wide_network_has_17_million_parameters() -> None:
    with torch.device("meta"):
        model = build_model(ModelSpec("ibp-conv5-wide", 10, 3, (32, 32)))
    assert round(sum(tensor.numel() for tensor in model.parameters()) / 1e6) == 17


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (3, (9, 14))])
def test_networks_fit_images_of_any_size(name: str, channels: int, size: tuple[int, int]) -> None:
    model = build_model(ModelSpec(name, 7, channels, size))
    images = torch.rand(3, channels, *size)
    logits = model(images)
    assert logits.shape == (3, 7)
    assert torch.allclose(model(images[1:2]), logits[1:2], atol=1e-6)


def test_a_normalisation_is_affine_in_each_channel() -> None:
    spec = ModelSpec("ibp-mlp", 4, 2, (3, 3), {"mean": [0.5, 0.25], "std": [0.5, 0.125]})
    normalize, *rest = build_model(spec).children()
    images = torch.tensor([0.5, 0.5]).reshape(1, 2, 1, 1).expand(1, 2, 3, 3)
    assert normalize(images)[0, :, 0, 0].tolist() == [0.0, 2.0]
    assert not any(isinstance(layer, type(normalize)) for layer in rest)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ibp-mlp", {"hidden": [12], "mean": [0.1], "std": [0.3]}),
        ("ibp-conv2", {"first_kernel": 7}),
        ("ibp-conv4", {"widths": [2, 2, 2, 2], "hidden": [5]}),
    ],
)
def test_saved_networks_come_back(name: str, options: Mapping[str, Any], tmp_path: Path) -> None:
    spec = ModelSpec(name, 3, 1, (8, 10), options)
    model = build_model(spec)
    save_classifier(tmp_path / "net.safetensors", model, spec, {})
    again, card = load_classifier(tmp_path / "net.safetensors")
    images = torch.rand(2, 1, 8, 10)
    assert torch.equal(again(images), model(images))
    assert ModelSpec.from_dict(card["model"]) == spec


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ibp-mlp", {"hidden": []}, "hidden widths"),
        ("ibp-mlp", {"mean": [0.5]}, "mean and std of 1 channels"),
        ("ibp-mlp", {"mean": [0.5, 0.5], "std": [1, 1]}, "mean and std of 1 channels"),
        ("ibp-mlp", {"mean": [0.5], "std": [0]}, "positive deviations"),
        ("ibp-mlp", {"kernels": [3]}, "options that ibp-mlp takes"),
        ("ibp-conv2", {"strides": [2]}, "as many positive kernels"),
        ("ibp-conv2", {"widths": [2, 0]}, "as many positive kernels"),
        ("ibp-conv2", {"kernels": [4, 8]}, "leave pixels"),
        ("ibp-conv", {}, "did you mean ibp-conv"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    name: str, options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(PatchproofError, match=message):
        build_model(ModelSpec(name, 3, 1, (2, 2), options))


def test_networks_can_be_built_by_hand() -> None:
    assert IntervalMLP(2, 1, (4, 4))(torch.rand(1, 1, 4, 4)).shape == (1, 2)
    model = IntervalConvNet(2, 1, (5, 4), (3,), (1,), (6,), (7,))
    assert model.get_submodule("hidden1").weight.shape == (7, 6 * 5 * 4)


def test_networks_can_be_sliced() -> None:
    model = IntervalConvNet(2, 1, (5, 4), (3,), (1,), (6,), (7,))
    images = torch.rand(3, 1, 5, 4)
    assert model[:2](images).shape == (3, 6, 5, 4)
    assert torch.equal(model[2:](model[:2](images)), model(images))
    assert model[-1] is model.get_submodule("head")


@pytest.mark.parametrize(
    ("channels", "size", "places"),
    [
        (1, (28, 28), (24, 24)),
        (3, (8, 8), (7, 8)),
        (1, (9, 7), (6, 2)),
        (1, (9, 7), (9, 7)),
        (1, (9, 7), (1, 1)),
        (1, (3, 1), (2, 1)),
    ],
)
def test_the_guide_gives_each_class_a_map_of_all_places(
    channels: int, size: tuple[int, int], places: tuple[int, int]
) -> None:
    guide = GuideUNet(10, channels, size, places, width=2)
    assert guide(torch.rand(2, channels, *size)).shape == (2, 10, *places)


@pytest.mark.parametrize(
    ("size", "places"), [((13, 18), (9, 16)), ((18, 13), (16, 9)), ((16, 16), (13, 11))]
)
def test_the_guide_learns_rows_as_rows_and_columns_as_columns(
    size: tuple[int, int], places: tuple[int, int]
) -> None:
    """A pixel at the centre of a place is to light that place, (row, column), alone."""
    torch.manual_seed(0)
    rows, columns = (
        side.flatten()
        for side in torch.meshgrid(*(torch.arange(length) for length in places), indexing="ij")
    )
    centres = [(side - place) // 2 for side, place in zip(size, places, strict=True)]
    images = torch.zeros(len(rows), 1, *size)
    every = torch.arange(len(rows))
    images[every, 0, rows + centres[0], columns + centres[1]] = 1.0
    guide = GuideUNet(1, 1, size, places, width=4)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(guide(images).flatten(1), every)
        loss.backward()
        optimizer.step()
    lit = guide(images).flatten(1).argmax(1)
    assert torch.equal(lit, every)


@pytest.mark.parametrize(("size", "places"), [((9, 7), (6, 2)), ((7, 9), (7, 9)), ((8, 8), (7, 5))])
def test_the_guide_gives_some_places_what_it_gives_them_among_all(
    size: tuple[int, int], places: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    guide = GuideUNet(3, 2, size, places, width=4)
    images = torch.rand(5, 2, *size)
    chosen = torch.randint(0, places[0] * places[1], (5, 6))
    chosen[0, :2] = torch.tensor([0, places[0] * places[1] - 1])
    everywhere = guide(images).flatten(2).gather(2, chosen[:, None].expand(-1, 3, -1))
    some = guide.at(guide.features(images), chosen)
    torch.testing.assert_close(some, everywhere)
    for found, expected in zip(
        torch.autograd.grad(some.square().sum(), list(guide.parameters())),
        torch.autograd.grad(everywhere.square().sum(), list(guide.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_untrained_guide_sees_a_pixel_where_it_is() -> None:
    """Of a random network, the change that a pixel makes is centred at its place."""
    torch.manual_seed(0)
    size, places = (40, 56), (36, 54)
    guide = GuideUNet(8, 1, size, places, width=4)
    image = torch.zeros(1, 1, *size)
    for row, column in ((12, 38), (25, 18)):
        pixel = image.clone()
        pixel[0, 0, row, column] = 1.0
        change = (guide(pixel) - guide(image)).detach().abs().amax((0, 1))
        centre = [
            float((change.sum(1 - axis) * torch.arange(places[axis])).sum() / change.sum())
            for axis in (0, 1)
        ]
        assert abs(centre[0] + (size[0] - places[0]) // 2 - row) < 2
        assert abs(centre[1] + (size[1] - places[1]) // 2 - column) < 2


def test_the_guide_refuses_what_does_not_fit() -> None:
    with pytest.raises(PatchproofError, match=r"expected places .* got \(9, 3\)"):
        GuideUNet(2, 1, (8, 8), (9, 3))
    with pytest.raises(PatchproofError, match="positive width"):
        GuideUNet(2, 1, (8, 8), (4, 4), width=0)
    with pytest.raises(PatchproofError, match=r"images of \(8, 6\) pixels, got \(6, 8\)"):
        GuideUNet(2, 1, (8, 6), (4, 4))(torch.rand(1, 1, 6, 8))


def test_a_narrow_guide_is_cheap() -> None:
    guide = GuideUNet(10, 1, (28, 28), (24, 24), width=4)
    multiply_adds = 0

    def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal multiply_adds
        assert isinstance(layer, nn.Conv2d)
        multiply_adds += layer.weight[0].numel() * output[0].numel()

    for layer in guide.children():
        layer.register_forward_hook(count)
    guide(torch.rand(1, 1, 28, 28))
    assert 0.4e6 < multiply_adds < 0.6e6
