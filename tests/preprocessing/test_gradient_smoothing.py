"""Local gradients smoothing against its definition written plainly, and its derivatives."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from patchproof.errors import PatchproofError
from patchproof.preprocessing import GradientSmoothing
from patchproof.preprocessing.gradient_smoothing import scaled_gradient, steep_pixels


def plainly_smoothed(
    image: Tensor, window: int, overlap: int, threshold: float, smoothing: float
) -> Tensor:
    """Smooth one image (C, H, W), pixel by pixel and window by window."""
    _, height, width = image.shape
    grey = image.mean(0).tolist()
    gradient = {
        (row, column): math.hypot(
            grey[row + 1][column] - grey[row][column] if row + 1 < height else 0.0,
            grey[row][column + 1] - grey[row][column] if column + 1 < width else 0.0,
        )
        for row, column in product(range(height), range(width))
    }
    low, high = min(gradient.values()), max(gradient.values())
    scaled = {pixel: (value - low) / (high - low) for pixel, value in gradient.items()}
    tops = {*range(0, height - window + 1, window - overlap), height - window}
    lefts = {*range(0, width - window + 1, window - overlap), width - window}
    smoothed = set()
    for top, left in product(tops, lefts):
        inside = set(product(range(top, top + window), range(left, left + window)))
        if sum(scaled[pixel] for pixel in inside) / len(inside) > threshold:
            smoothed |= inside
    result = image.clone()
    for row, column in smoothed:
        result[:, row, column] *= 1 - min(1.0, smoothing * scaled[row, column])
    return result


@pytest.mark.parametrize("window", [(1, 0), (3, 1), (3, 2), (4, 0), (5, 2), (6, 5)])
@pytest.mark.parametrize("strength", [(0.2, 0.8), (0.3, 2.3)])
def test_it_is_what_the_definition_says(
    window: tuple[int, int], strength: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    steepness = torch.rand(6, 1, 9, 1) ** 3
    images = 0.5 + (torch.rand(6, 2, 9, 6) - 0.5) * steepness
    smoothed = GradientSmoothing(*window, *strength)(images)
    plain = torch.stack([plainly_smoothed(image, *window, *strength) for image in images])
    torch.testing.assert_close(smoothed, plain)
    assert (plain != images).any()
    assert (plain == images).all(1).any()


def test_only_the_steep_windows_change() -> None:
    image = torch.full((1, 3, 28, 28), 0.75)
    image[:, :, 3:5, 20:22] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    smoothed = GradientSmoothing(5, 2, 0.1, 2.3)(image)
    changed = (smoothed != image).any(1)[0].nonzero()
    # only pixels of the patch and those that differ from the next below or to the right
    assert changed.amin(0).tolist() == [2, 19]
    assert changed.amax(0).tolist() == [4, 21]
    assert smoothed[0, :, 3, 21].max() == 0.0, "the largest gradient, times more than one"


def test_a_flat_image_stays_and_has_gradients() -> None:
    image = torch.full((2, 3, 8, 8), 0.3, requires_grad=True)
    smoothed = GradientSmoothing(4, 1, 0.1, 2.3)(image)
    assert torch.equal(smoothed, image)
    (gradient,) = torch.autograd.grad(smoothed.sum(), image)
    assert torch.equal(gradient, torch.ones_like(image))


def test_gradients_pass_the_smoothing() -> None:
    torch.manual_seed(1)
    image = torch.rand(2, 2, 6, 5, dtype=torch.float64)
    image[:, :, :2, :2] = 0.4  # flat, where a length has no derivative
    step = GradientSmoothing(3, 1, 0.3, 0.9)

    def changing(pixels: Tensor) -> Tensor:
        return step(torch.cat([image[:, :, :2], pixels], 2))

    pixels = image[:, :, 2:].clone().requires_grad_()
    assert torch.autograd.gradcheck(changing, pixels)


def test_windows_end_with_the_image() -> None:
    gradient = torch.zeros(1, 1, 7, 8)
    gradient[0, 0, 6, 7] = 1.0
    steep = steep_pixels(gradient, 3, 0, 0.1)
    assert steep[0, 0].nonzero().tolist() == [list(p) for p in product((4, 5, 6), (5, 6, 7))]


def test_the_gradient_is_scaled_for_each_image_by_itself() -> None:
    torch.manual_seed(2)
    images = torch.rand(3, 1, 6, 6)
    faint = torch.cat([images[:1] / 100, images[1:]])
    torch.testing.assert_close(scaled_gradient(faint), scaled_gradient(images))
    scaled = scaled_gradient(images).flatten(1)
    assert scaled.amin(1).tolist() == [0.0] * 3
    torch.testing.assert_close(scaled.amax(1), torch.ones(3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((0, 0, 0.1, 2.3), "window: expected pixels a side >= 1, got 0"),
        ((5, 5, 0.1, 2.3), "overlap: expected pixels from 0 to less than the window's 5, got 5"),
        ((5, -1, 0.1, 2.3), "overlap"),
        ((5, 2, 1.5, 2.3), r"threshold: expected a gradient in \[0, 1\], got 1.5"),
        ((5, 2, math.nan, 2.3), "threshold"),
        ((5, 2, 0.1, 0.0), "smoothing: expected a number > 0, got 0.0"),
        ((5, 2, 0.1, math.inf), "smoothing"),
    ],
)
def test_settings_out_of_range(settings: tuple[int, int, float, float], words: str) -> None:
    with pytest.raises(PatchproofError, match=words):
        GradientSmoothing(*settings)


def test_an_image_smaller_than_a_window() -> None:
    with pytest.raises(PatchproofError, match="at most the image's 4x9 pixels, got 5"):
        GradientSmoothing(5, 2, 0.1, 2.3)(torch.rand(1, 1, 4, 9))
