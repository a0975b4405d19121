"""What a split of images promises: values, sizes, samples, digests, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from patchproof.datasets.images import ArrayPictures, ImageDataset
from patchproof.errors import PatchproofError


def dataset(pixels: np.ndarray, **changes: Any) -> ImageDataset:
    count, height, width = pixels.shape[:3]
    values: dict[str, Any] = {
        "name": "tiny",
        "split": "test",
        "class_names": ("a", "b"),
        "image_size": (height, width),
        "channels": 1 if pixels.ndim == 3 else 3,
        "labels": torch.arange(count) % 2,
        "indices": torch.arange(count),
        "pictures": ArrayPictures(pixels, "tiny"),
    }
    return ImageDataset(**(values | changes))


@pytest.fixture
def grey() -> ImageDataset:
    return dataset(np.arange(10 * 4 * 6, dtype=np.uint8).reshape(10, 4, 6))


def test_image_holds_the_stored_values_over_255(grey: ImageDataset) -> None:
    image = grey.image(3)
    assert image.shape == (1, 4, 6)
    assert image.dtype == torch.float32
    assert torch.equal(image * 255, torch.arange(72, 96).reshape(1, 4, 6).float())


def test_colour_channels_come_first_in_rgb_order() -> None:
    pixels = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    pixels[0, 0, 1] = (255, 0, 51)
    assert dataset(pixels).image(0)[:, 0, 1].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_tensors_agree_with_single_images(grey: ImageDataset) -> None:
    images, labels = grey.tensors()
    assert images.dtype == torch.uint8
    assert torch.equal(images[7] / 255, grey.image(7))
    assert torch.equal(labels, grey.labels)


def test_subset_keeps_the_order_asked_for_and_the_original_indices(grey: ImageDataset) -> None:
    part = grey.subset([7, 2, 5]).subset([2, 0])
    assert part.indices.tolist() == [5, 7]
    assert part.labels.tolist() == [1, 1]
    assert torch.equal(part.image(1), grey.image(7))


@pytest.mark.parametrize("positions", [[], [10], [-1, 2]])
def test_subset_refuses_positions_that_do_not_exist(
    grey: ImageDataset, positions: list[int]
) -> None:
    with pytest.raises(PatchproofError, match="expected positions from 0 to 9"):
        grey.subset(positions)


def test_subset_refuses_what_are_not_whole_numbers(grey: ImageDataset) -> None:
    for positions in (grey.labels == 1, torch.tensor([0.5, 1.5])):
        with pytest.raises(PatchproofError, match="positions as whole numbers, got torch"):
            grey.subset(positions)


def test_sample_is_seeded_sorted_and_without_replacement(grey: ImageDataset) -> None:
    first, again, other = grey.sample(6, 1), grey.sample(6, 1), grey.sample(6, 2)
    assert first.indices.tolist() == again.indices.tolist() == sorted(set(first.indices.tolist()))
    assert first.indices.tolist() != other.indices.tolist()
    assert grey.sample(10, 0).indices.tolist() == list(range(10))


@pytest.mark.parametrize("count", [0, 11])
def test_sample_refuses_an_impossible_count(grey: ImageDataset, count: int) -> None:
    with pytest.raises(PatchproofError, match="sample of 1 to 10 images"):
        grey.sample(count, 0)


def test_digest_depends_on_pixels_labels_selection_and_size(grey: ImageDataset) -> None:
    pixels = np.arange(10 * 4 * 6, dtype=np.uint8).reshape(10, 4, 6)
    assert dataset(pixels).digest() == grey.digest()
    changed = pixels.copy()
    changed[9, 3, 5] += 1
    others = [
        dataset(changed),
        dataset(pixels, labels=torch.zeros(10, dtype=torch.int64)),
        dataset(pixels, image_size=(2, 3), resized=True),
        grey.subset(range(9)),
        grey.subset([1, 0, *range(2, 10)]),
    ]
    assert len({grey.digest(), *(other.digest() for other in others)}) == 6


def test_resize_scales_the_shorter_side_then_crops_the_centre() -> None:
    wide = np.zeros((1, 8, 24), dtype=np.uint8)
    wide[0, :, 8:16] = 200
    image = dataset(wide, image_size=(4, 4), resized=True).image(0)
    assert image.shape == (1, 4, 4)
    assert image[0, 1, 1:3].tolist() == pytest.approx([200 / 255] * 2, abs=0.05)
    exact = dataset(wide, image_size=(8, 8), resized=True).image(0)
    assert torch.equal(exact, torch.full((1, 8, 8), 200 / 255))


def test_colours_in_a_grey_data_set_are_refused() -> None:
    with pytest.raises(PatchproofError, match="expected a grey image"):
        dataset(np.zeros((1, 2, 2, 3), dtype=np.uint8), channels=1).image(0)
