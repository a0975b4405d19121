import pytest
import torch

from patchproof.errors import PatchproofError
from patchproof.threat import Box, PixelSets, RectanglePatch, SquarePatch, threat_from_dict


def test_every_placement_is_listed_once_up_to_the_last_row_and_column():
    regions = RectanglePatch(2, 3).regions((4, 5))
    assert [regions.box(i) for i in range(len(regions))] == [
        Box(top, left, 2, 3) for top in range(3) for left in range(3)
    ]


def test_locations_restrict_the_regions():
    corners = SquarePatch(2, locations="corners").regions((5, 6))
    assert corners.parts[:, 0, :2].tolist() == [[0, 0], [0, 4], [3, 0], [3, 4]]
    inside = SquarePatch(2, locations=Box(1, 2, 3, 2)).regions((5, 6))
    assert inside.parts[:, 0, :2].tolist() == [[1, 2], [2, 2]]
    assert len(SquarePatch(4, locations="corners").regions((4, 4))) == 1


@pytest.mark.parametrize(
    ("fraction", "image_size", "side"),
    [(0.02, (224, 224), 32), (0.04, (100, 100), 20), (0.024, (32, 32), 5), (1.0, (3, 3), 3)],
)
def test_covering_rounds_the_side_up(fraction, image_size, side):
    assert SquarePatch.covering(fraction, image_size) == SquarePatch(side)
    height, width = image_size
    assert side**2 >= fraction * height * width > (side - 1) ** 2


def test_published_is_what_the_papers_mean():
    assert SquarePatch.published("0.4%", (32, 32)) == SquarePatch(2)
    assert SquarePatch.published("2.4%", (32, 32)) == SquarePatch(5)
    assert SquarePatch.published("2%", (224, 224)) == SquarePatch(32)
    with pytest.raises(PatchproofError, match=r"0\.4%.*got '7%'"):
        SquarePatch.published("7%", (32, 32))


@pytest.mark.parametrize(
    "threat",
    [SquarePatch(3), RectanglePatch(2, 4, "corners"), SquarePatch(2, Box(0, 1, 4, 4))],
)
def test_a_threat_survives_being_saved(threat):
    assert threat_from_dict(threat.to_dict()) == threat


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SquarePatch(0), "expected pixels >= 1, got 0"),
        (lambda: RectanglePatch(2, 2.5), "got 2.5"),
        (lambda: SquarePatch(2, "middle"), "got 'middle'"),
        (lambda: SquarePatch(5, Box(0, 0, 4, 9)), "holds a 5x5 patch"),
        (lambda: SquarePatch(6).regions((5, 9)), "no larger than the 5x9 image, got 6x6"),
        (lambda: SquarePatch(2, Box(3, 3, 3, 3)).regions((5, 5)), "inside the 5x5 image"),
        (lambda: SquarePatch(2).regions((0, 5)), "got \\(0, 5\\)"),
        (lambda: SquarePatch.covering(0.0, (5, 5)), "got 0.0"),
        (lambda: threat_from_dict({"type": "cloud"}), "cloud"),
    ],
)
def test_bad_threats_say_what_was_expected(make, message):
    with pytest.raises(PatchproofError, match=message):
        make()


def test_a_view_sees_a_region_if_it_shows_one_pixel_of_it():
    regions = SquarePatch(2).regions((4, 5))
    visible = torch.rand(7, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.2
    patterns, pattern = regions.patterns(PixelSets.of(visible))
    seen = patterns[pattern]
    for index in range(len(regions)):
        top, left, height, width = regions.box(index)
        pixels = visible[:, top : top + height, left : left + width]
        assert torch.equal(seen[index], pixels.flatten(1).any(1))


def test_accumulate_adds_each_region_to_its_own_pixels():
    regions = RectanglePatch(1, 2).regions((2, 3))
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert regions.accumulate(values)[0].tolist() == [[1, 3, 2], [4, 12, 8]]
