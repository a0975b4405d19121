"""Sparse input sets: the bounds of the first layer are those that brute force finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from patchproof.bounds.operators import Convolution, Linear
from patchproof.bounds.sparse import sparse_bounds
from patchproof.errors import PatchproofError

UNIT = (0.0, 1.0)


def linear(inputs: int, outputs: int, bias: bool = True) -> tuple[nn.Module, Linear]:
    layer = nn.Linear(inputs, outputs, bias).double()
    return nn.Sequential(nn.Flatten(), layer), Linear(lambda: layer.weight, lambda: layer.bias)


def convolution(*arguments: int, **options: object) -> tuple[nn.Module, Convolution]:
    layer = nn.Conv2d(*arguments, **options).double()
    return layer, Convolution(
        lambda: layer.weight,
        lambda: layer.bias,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
    )


LAYERS: list[tuple[Callable[[], tuple[nn.Module, Linear | Convolution]], tuple[int, int, int]]] = [
    (lambda: linear(6, 3), (1, 2, 3)),
    (lambda: linear(12, 3, bias=False), (2, 3, 2)),
    (lambda: convolution(1, 2, 2), (1, 3, 3)),
    (lambda: convolution(2, 3, 2, padding=1, bias=False), (2, 2, 3)),
    (lambda: convolution(2, 2, (3, 2), stride=(2, 1), padding=(2, 1)), (2, 3, 2)),
    (lambda: convolution(1, 2, 2, dilation=2, padding=1), (1, 3, 3)),
    (lambda: convolution(2, 4, 2, groups=2, padding=1), (2, 2, 3)),
]


def every_attack(image: Tensor, pixels: int, low: Tensor, high: Tensor) -> Tensor:
    """Return all images (A, C, H, W) with up to ``pixels`` pixels at corners of their ranges."""
    channels, height, width = image.shape
    corners = [
        torch.where(torch.tensor(choice), high, low)
        for choice in itertools.product((False, True), repeat=channels)
    ]
    attacked = []
    for places in itertools.combinations(range(height * width), pixels):
        for contents in itertools.product(corners, repeat=pixels):
            changed = image.clone()
            for place, content in zip(places, contents, strict=True):
                changed[:, place // width, place % width] = content
            attacked.append(changed)
    return torch.stack([image, *attacked])


@pytest.mark.parametrize("make", range(len(LAYERS)))
@pytest.mark.parametrize("pixels", [1, 2, 3])
@pytest.mark.parametrize("span", [UNIT, (-0.5, 2.0)])
def test_bounds_are_what_brute_force_finds(
    make: int, pixels: int, span: tuple[float, float]
) -> None:
    torch.manual_seed(make)
    build, (channels, height, width) = LAYERS[make]
    network, layer = build()
    low = torch.full((channels,), span[0]).double()
    high = span[1] + torch.arange(channels).double() * (span != UNIT)
    images = (
        low[:, None, None]
        + torch.rand(2, channels, height, width).double() * (high - low)[:, None, None]
    )
    ranges = None if span == UNIT else (low, high)
    with torch.no_grad():
        lower, upper = sparse_bounds(layer, images, pixels, ranges=ranges)
        for image, least, most in zip(images, lower, upper, strict=True):
            outputs = network(every_attack(image, pixels, low, high))
            torch.testing.assert_close(least, outputs.amin(0))
            torch.testing.assert_close(most, outputs.amax(0))


@pytest.mark.parametrize("make", range(len(LAYERS)))
def test_a_budget_changes_nothing(make: int) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[make]
    _, layer = build()
    images = torch.rand(5, *shape).double()
    whole = sparse_bounds(layer, images, 2)
    for memory_budget in (1, 400):
        torch.testing.assert_close(
            sparse_bounds(layer, images, 2, memory_budget=memory_budget), whole
        )


@pytest.mark.parametrize("make", range(len(LAYERS)))
def test_equation_19_is_wider_and_reached_by_images_that_are_farthest(make: int) -> None:
    torch.manual_seed(1)
    build, shape = LAYERS[make]
    _, layer = build()
    images = torch.rand(4, *shape).double()
    exact = sparse_bounds(layer, images, 2)
    wider = sparse_bounds(layer, images, 2, by_weights_alone=True)
    assert (wider[0] < exact[0]).all()
    assert (wider[1] > exact[1]).all()
    radius = (wider[1] - wider[0]) / 2
    torch.testing.assert_close(radius, radius[:1].expand_as(radius))


def test_equation_19_sums_up_the_largest_weights() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 0.5], [0.0, 0.0, 0.0, -1.0]])
    layer = Linear(lambda: weight, lambda: None)
    images = torch.full((1, 1, 2, 2), 0.5)
    lower, upper = sparse_bounds(layer, images, 2, by_weights_alone=True)
    clean = images.flatten(1) @ weight.T
    assert (upper - clean).tolist() == [[6.0, 1.0]]
    assert (clean - lower).tolist() == [[6.0, 1.0]]
    lower, upper = sparse_bounds(layer, images.reshape(1, 2, 1, 2), 1, by_weights_alone=True)
    assert (upper - clean).tolist() == [[4.5, 1.0]]  # both channels of one pixel


def test_more_pixels_than_there_are_change_all() -> None:
    _, layer = linear(8, 3)
    images = torch.rand(2, 2, 2, 2).double()
    assert torch.equal(sparse_bounds(layer, images, 4)[1], sparse_bounds(layer, images, 99)[1])
    weight = layer.weight
    assert layer.bias is not None
    torch.testing.assert_close(
        sparse_bounds(layer, images, 4)[1], (weight.clamp(min=0).sum(1) + layer.bias).expand(2, 3)
    )


@pytest.mark.parametrize("make", range(len(LAYERS)))
@pytest.mark.parametrize("by_weights_alone", [False, True])
def test_gradients_are_those_of_the_bounds(make: int, by_weights_alone: bool) -> None:
    torch.manual_seed(2)
    build, shape = LAYERS[make]
    network, layer = build()
    images = torch.rand(2, *shape).double().requires_grad_()
    parameters = tuple(network.parameters())

    def bounds(*_: Tensor) -> tuple[Tensor, Tensor]:
        return sparse_bounds(
            layer, images, 2, by_weights_alone=by_weights_alone, memory_budget=2**10
        )

    assert torch.autograd.gradcheck(bounds, (images, *parameters))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_slack_holds_what_rounding_does(kind: str) -> None:
    """Of the worst images in float32, and of those in exact arithmetic; and it is small."""
    torch.manual_seed(3)
    network, layer = (
        linear(3 * 400, 12) if kind == "linear" else convolution(3, 4, 7, stride=3, padding=3)
    )
    images = torch.rand(3, 3, 20, 20)
    network.float()
    with torch.no_grad():
        for pixels in (1, 20):
            lower, upper = sparse_bounds(layer, images, pixels, slack=True)
            plain = sparse_bounds(layer, images, pixels)
            network.double()
            exact = sparse_bounds(layer, images.double(), pixels)
            network.float()
            assert (lower.double() < exact[0]).all()
            assert (upper.double() > exact[1]).all()
            assert (plain[0] - lower).max() < 2e-3
            assert (upper - plain[1]).max() < 2e-3


def test_the_worst_image_of_a_neuron_reaches_its_bound() -> None:
    torch.manual_seed(4)
    network, layer = linear(3 * 30, 5)
    network.float()
    images = torch.rand(1, 3, 5, 6)
    _, upper = sparse_bounds(layer, images, 4, slack=True)
    for neuron in range(5):
        weight = layer.weight[neuron].detach().reshape(3, 5, 6)
        content = (weight > 0).float()
        gains = (weight * (content - images[0])).sum(0).flatten()
        chosen = torch.zeros(30, dtype=torch.bool)
        chosen[gains.topk(4).indices] = True
        attacked = torch.where(chosen.reshape(5, 6), content, images)
        with torch.no_grad():
            reached = network(attacked)[0, neuron]
        assert upper[0, neuron] - 1e-4 < reached <= upper[0, neuron]


def test_what_does_not_fit_is_refused() -> None:
    _, flat = linear(8, 3)
    _, grouped = convolution(4, 4, 2, groups=2)
    with pytest.raises(PatchproofError, match="one or more pixels, got 0"):
        sparse_bounds(flat, torch.rand(1, 2, 2, 2).double(), 0)
    with pytest.raises(PatchproofError, match=r"weight of \(3, 8\), got \(1, 1, 3, 3\)"):
        sparse_bounds(flat, torch.rand(1, 1, 3, 3).double(), 1)
    with pytest.raises(PatchproofError, match="expected images for a weight"):
        sparse_bounds(grouped, torch.rand(1, 2, 3, 3).double(), 1)
