"""Where patches are tried, against plain enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from victims import CHANNELS, SIZE, THREATS, Linear, linear, region_masks

import patchproof as pp
from patchproof.attacks import PlaceSearch
from patchproof.attacks.places import Search, place_boxes, place_pixels
from patchproof.errors import PatchproofError
from patchproof.threat import Box

SEARCHES = [
    PlaceSearch(),
    PlaceSearch("gradient", count=7),
    PlaceSearch("trial", stride=3),
    PlaceSearch("open", stride=3),
    PlaceSearch("random", count=2),
    PlaceSearch("strided", stride=3),
    PlaceSearch("corners"),
    PlaceSearch("all"),
]
IMAGES = torch.rand(3, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1])
SEEDS = torch.tensor([11, 12, 13])


def choose(search: PlaceSearch, threat: pp.Threat) -> torch.Tensor:
    return search.choose(threat, linear(), IMAGES, LABELS, SEEDS)


def peaked(at: tuple[int, int]) -> Linear:
    """Return a model with large weights on one pixel."""
    weights = 0.01 * linear().weights.detach()
    weights[1, :, at[0], at[1]] += 5.0
    return Linear(weights, torch.zeros(3))


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: f"{search.search}-{search.count}")
@pytest.mark.parametrize("name", THREATS)
def test_places_are_those_of_the_threat(search: PlaceSearch, name: str) -> None:
    threat = THREATS[name]
    places = choose(search, threat)
    pixels = torch.stack([place_pixels(threat, SIZE, of_image) for of_image in places])
    assert places.shape[0] == len(IMAGES)
    if search.count is not None:
        most = len(threat.regions(SIZE)) if name == "corners" else search.count
        assert places.shape[1] == min(search.count, most)
    if isinstance(threat, pp.SparsePixels):
        assert (pixels.flatten(2).sum(2) == threat.count).all()
        return
    masks = region_masks(threat)
    assert torch.equal(pixels, masks[places].any(2))
    for one in places.flatten(0, 1).tolist():
        assert len(set(one)) == threat.patches
    if threat.patches == 1:
        for of_image in places[..., 0].tolist():
            assert len(set(of_image)) == len(of_image)


@pytest.mark.parametrize("name", THREATS)
def test_boxes_are_the_smallest_around_the_patches(name: str) -> None:
    threat = THREATS[name]
    places = choose(PlaceSearch("random", count=5), threat)[0]
    boxes = place_boxes(threat, SIZE, places)
    assert boxes.shape == (*places.shape, 4)
    for row, column in itertools.product(*map(range, places.shape)):
        if isinstance(threat, pp.SparsePixels):
            expected: tuple[int, ...] = (*divmod(int(places[row, column]), SIZE[1]), 1, 1)
        else:
            expected = threat.regions(SIZE).box(int(places[row, column]))
        assert tuple(boxes[row, column].tolist()) == tuple(expected)


@pytest.mark.parametrize("search", ["strided", "corners", "all"])
@pytest.mark.parametrize(
    "name", ["square", "corners", "in a box", "two sizes", "diamond", "two dots", "any rectangle"]
)
def test_every_shape_reaches_the_first_and_last_rows_and_columns(search: Search, name: str) -> None:
    threat = THREATS[name]
    places = choose(PlaceSearch(search, stride=5), threat)[0, :, 0]
    regions = threat.regions(SIZE)
    tried = {tuple(regions.box(index)) for index in places.tolist()}
    each = [regions.box(index) for index in range(len(regions))]
    for size in {box[2:] for box in each}:
        tops, lefts = ({box[axis] for box in each if box[2:] == size} for axis in (0, 1))
        for top, left in itertools.product((min(tops), max(tops)), (min(lefts), max(lefts))):
            assert (top, left, *size) in tried


def test_strides_leave_out_no_more_than_they_say() -> None:
    threat = pp.SquarePatch(2, Box(1, 1, 6, 8))
    regions = threat.regions(SIZE)
    places = choose(PlaceSearch("strided", stride=3), threat)[0, :, 0]
    corners = {regions.box(index)[:2] for index in places.tolist()}
    assert corners == set(itertools.product((1, 4, 5), (1, 4, 7)))


def test_corners_are_four() -> None:
    places = choose(PlaceSearch("corners"), pp.SquarePatch(3))[0, :, 0]
    boxes = {pp.SquarePatch(3).regions(SIZE).box(index)[:2] for index in places.tolist()}
    assert boxes == {(0, 0), (0, 6), (4, 0), (4, 6)}


@pytest.mark.parametrize("at", [(0, 0), (3, 4), (6, 8)])
@pytest.mark.parametrize("search", [PlaceSearch(), PlaceSearch("trial", stride=1)])
@pytest.mark.parametrize("name", ["square", "two sizes", "two squares", "any four pixels"])
def test_the_first_place_is_where_the_model_looks(
    at: tuple[int, int], search: PlaceSearch, name: str
) -> None:
    threat = THREATS[name]
    labels = torch.zeros(len(IMAGES), dtype=torch.int64)
    places = search.choose(threat, peaked(at), IMAGES, labels, SEEDS)
    hit = torch.stack(
        [place_pixels(threat, SIZE, of_image)[:, at[0], at[1]] for of_image in places]
    )
    assert hit[:, 0].all()


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: f"{search.search}-{search.count}")
@pytest.mark.parametrize("name", ["square", "two squares", "any four pixels"])
def test_places_depend_on_the_image_and_its_seed_alone(search: PlaceSearch, name: str) -> None:
    together = choose(search, THREATS[name])
    for row in range(len(IMAGES)):
        one = slice(row, row + 1)
        alone = search.choose(THREATS[name], linear(), IMAGES[one], LABELS[one], SEEDS[one])
        assert torch.equal(alone, together[one])


def test_places_without_a_certificate_come_first() -> None:
    threat = pp.SquarePatch(2)
    trial = choose(PlaceSearch("trial", count=6, stride=1), threat)
    search = PlaceSearch("open", count=6, stride=1)
    assert torch.equal(choose(search, threat), trial)
    is_open = torch.zeros(len(IMAGES), len(threat.regions(SIZE)), dtype=torch.bool)
    is_open[0, [3, 7, 20]] = True
    is_open[1] = True
    places = search.choose(threat, linear(), IMAGES, LABELS, SEEDS, is_open)[..., 0]
    assert set(places[0, :3].tolist()) == {3, 7, 20}
    rest = [place for place in trial[0, :, 0].tolist() if place not in (3, 7, 20)]
    assert places[0, 3:].tolist() == rest[:3]
    assert torch.equal(places[1:], trial[1:, :, 0])


def test_random_places_are_spread_over_all() -> None:
    count = len(pp.SquarePatch(3).regions(SIZE))
    seeds = torch.arange(400)
    images = torch.zeros(400, CHANNELS, *SIZE)
    labels = torch.zeros(400, dtype=torch.int64)
    places = PlaceSearch("random").choose(pp.SquarePatch(3), None, images, labels, seeds)
    assert torch.bincount(places.flatten(), minlength=count).min() > 400 * 4 / count / 2


def test_without_scores_places_are_random() -> None:
    threat = pp.SquarePatch(3)
    drawn = PlaceSearch("random").choose(threat, None, IMAGES, LABELS, SEEDS)
    for search in (PlaceSearch("gradient"), PlaceSearch("trial", stride=1)):
        assert torch.equal(search.choose(threat, None, IMAGES, LABELS, SEEDS), drawn)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"search": "everywhere"}, "expected gradient or trial"),
        ({"count": 0}, "count of places: expected at least 1, got 0"),
        ({"count": 1.5}, "count of places"),
        ({"stride": 0}, "stride of places"),
    ],
)
def test_bad_searches_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchproofError, match=message):
        PlaceSearch(**values)


def test_too_many_places_are_refused() -> None:
    images = torch.zeros(2000, 1, 28, 28)
    zeros = torch.zeros(2000, dtype=torch.int64)
    with pytest.raises(PatchproofError, match="give a count, or a larger stride"):
        PlaceSearch("all").choose(pp.SquarePatch(2), None, images, zeros, zeros)
