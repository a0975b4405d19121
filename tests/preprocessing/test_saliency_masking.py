"""Digital watermarking's steps against their definitions written plainly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.preprocessing import SaliencyMasking
from patchproof.preprocessing.saliency_masking import dense_squares, opened, saliency

Pixels = set[tuple[int, int]]


def square(top: int, left: int, side: int) -> Pixels:
    return set(product(range(top, top + side), range(left, left + side)))


def as_set(mask: Tensor) -> Pixels:
    """Return the pixels of a mask (H, W)."""
    return {(row, column) for row, column in mask.nonzero().tolist()}


def squares_of(pixels: Pixels, side: int, height: int, width: int) -> Pixels:
    """Return the pixels that are in some square of pixels."""
    found: Pixels = set()
    for top, left in product(range(height - side + 1), range(width - side + 1)):
        if square(top, left, side) <= pixels:
            found |= square(top, left, side)
    return found


def plainly_dense(
    values: Tensor, window: int, regions: int, threshold: float, opening: int
) -> Pixels:
    """Find the squares in one map (H, W)."""
    height, width = values.shape
    value = {pixel: float(values[pixel]) for pixel in product(range(height), range(width))}
    large = {pixel for pixel in value if value[pixel] > threshold}
    counting = squares_of(large, opening, height, width)
    found: Pixels = set()
    for _ in range(regions):
        places = list(product(range(height - window + 1), range(width - window + 1)))
        rest = {pixel for pixel in counting - found if value[pixel] > 0} or set(value) - found
        best = max(places, key=lambda at: sum(value[p] for p in square(*at, window) & rest))
        found |= square(*best, window)
    return found


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("regions", [1, 3])
@pytest.mark.parametrize(("threshold", "opening"), [(0.0, 1), (0.5, 1), (0.4, 2), (0.9, 3)])
def test_the_densest_squares(window: int, regions: int, threshold: float, opening: int) -> None:
    torch.manual_seed(0)
    maps = torch.rand(8, 1, 7, 6)
    found = dense_squares(maps, window, regions, threshold, opening)
    for values, mask in zip(maps, found, strict=True):
        plain = plainly_dense(values[0], window, regions, threshold, opening)
        assert as_set(mask[0]) == plain


@pytest.mark.parametrize("side", [1, 2, 3])
def test_opening_is_an_erosion_and_a_dilation(side: int) -> None:
    torch.manual_seed(1)
    masks = torch.rand(8, 1, 7, 6) < 0.8
    for before, after in zip(masks, opened(masks, side), strict=True):
        assert as_set(after[0]) == squares_of(as_set(before[0]), side, 7, 6)


def test_something_is_masked_where_nothing_is_salient() -> None:
    found = dense_squares(torch.zeros(2, 1, 6, 6), 2, 1, 0.1, 1)
    assert found.sum((1, 2, 3)).tolist() == [4, 4]


def small_network(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(2)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, classes)]
    return nn.Sequential(*layers).eval()


def test_without_relus_saliency_is_the_gradient_of_the_loss() -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).eval()
    images = torch.rand(5, 2, 6, 6, requires_grad=True)
    logits = network(images)
    loss = functional.cross_entropy(logits, logits.argmax(1), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    expected = gradient.abs().sum(1, keepdim=True)
    expected = expected / expected.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(saliency(network, images.detach()), expected)


class Activated(nn.Module):
    """A small network with a ReLU that is written in one way or another."""

    def __init__(self, activate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, _, _, self.last = small_network()
        self.activate = activate

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.activate(self.first(images)).flatten(1))


@pytest.mark.parametrize(
    "activate",
    [torch.relu, Tensor.relu, functional.relu, nn.ReLU(), nn.ReLU(inplace=True)],
)
def test_relus_pass_on_what_speaks_for_the_answer(activate: Callable[[Tensor], Tensor]) -> None:
    images = torch.rand(5, 2, 6, 6)
    first, _, _, last = small_network()
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        features = first(images)
        logits = last(features.relu().flatten(1))
        own = functional.one_hot(logits.argmax(1), 3)
        others = logits.masked_fill(own > 0, -torch.inf).softmax(1)
        arriving = ((own - others) @ last.weight).view_as(features)
        guided = arriving.clamp(min=0) * (features > 0)
        expected = functional.conv_transpose2d(guided, first.weight).abs().sum(1, keepdim=True)
        expected = expected / expected.amax((1, 2, 3), keepdim=True)
    assert (arriving < 0)[features > 0].any()
    torch.testing.assert_close(saliency(Activated(activate), images), expected)


def test_relus_are_as_before_afterwards() -> None:
    images = torch.rand(2, 2, 6, 6, requires_grad=True)
    network = small_network()
    (before,) = torch.autograd.grad(network(images)[:, 0].sum(), images)
    saliency(network, images.detach())
    (after,) = torch.autograd.grad(network(images)[:, 0].sum(), images)
    assert torch.equal(before, after)


def test_saliency_does_not_vanish_where_the_network_is_certain() -> None:
    network = small_network(2)
    images = torch.rand(5, 2, 6, 6)
    before = saliency(network, images)
    last = network[3]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight *= 1000
        last.bias *= 1000
    assert network(images).softmax(1).amax() == 1.0
    torch.testing.assert_close(saliency(network, images), before)


def test_saliency_in_inference_mode() -> None:
    network = small_network()
    with torch.inference_mode():
        images = torch.rand(2, 2, 6, 6)
        found = saliency(network, images)
    assert torch.equal(found, saliency(network, images))
    assert found.flatten(1).amax(1).tolist() == [1.0, 1.0]


def test_a_network_that_says_nan_has_no_saliency() -> None:
    class Nothing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :2] * torch.nan

    assert not saliency(Nothing(), torch.rand(2, 1, 4, 4)).any()


def test_masked_pixels_are_the_fill_and_others_as_they_were() -> None:
    network = small_network()
    images = torch.rand(5, 2, 6, 6)
    masked = SaliencyMasking(network, 2, 1, 0.1, 1, 0.3)(images)
    found = dense_squares(saliency(network, images), 2, 1, 0.1, 1).expand_as(images)
    assert found.sum() == 5 * 2 * 4
    assert torch.equal(masked[found], torch.full((40,), 0.3))
    assert torch.equal(masked[~found], images[~found])


def test_gradients_pass_the_masking_as_if_it_were_not_there() -> None:
    images = torch.rand(3, 2, 6, 6, requires_grad=True)
    masked = SaliencyMasking(small_network(), 2, 1, 0.1, 1, 0.3)(images)
    weights = torch.rand_like(images)
    (gradient,) = torch.autograd.grad((masked * weights).sum(), images)
    assert torch.equal(gradient, weights)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"window": 0}, "window: expected a number >= 1, got 0"),
        ({"regions": 0}, "regions: expected a number >= 1, got 0"),
        ({"opening": 1.5}, "opening: expected a number >= 1, got 1.5"),
        ({"threshold": 1.0}, r"threshold: expected a share in \[0, 1\), got 1.0"),
        ({"fill": -0.1}, r"fill: expected a value in \[0, 1\], got -0.1"),
    ],
)
def test_masking_out_of_range(changed: dict[str, Any], words: str) -> None:
    settings = {"window": 2, "regions": 1, "threshold": 0.1, "opening": 1, "fill": 0.5} | changed
    with pytest.raises(PatchproofError, match=words):
        SaliencyMasking(small_network(), **settings)


def test_an_image_smaller_than_a_square() -> None:
    with pytest.raises(PatchproofError, match="at most the image's 6x6 pixels, got 7 and 1"):
        SaliencyMasking(small_network(), 7, 1, 0.1, 1, 0.5)(torch.rand(1, 2, 6, 6))
