"""Regions of several patches together."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from patchproof.threat import RectanglePatch, SquarePatch, StencilPatch, Threat
from patchproof.threat.shapes import pixels_of

DISC = StencilPatch(["..##.", ".####", "####.", ".##.."])


@pytest.mark.parametrize(
    ("threat", "size", "count"),
    [
        (SquarePatch(2), (4, 5), 2),
        (SquarePatch(1), (3, 3), 3),
        (RectanglePatch(3, 2), (4, 4), 3),
        (StencilPatch(["#.", ".#"]), (4, 4), 3),
        (DISC, (6, 7), 2),
        (SquarePatch(3, "corners"), (5, 5), 4),
    ],
)
def test_unions_are_the_pixels_of_their_members_each_in_one_box(
    threat: Threat, size: tuple[int, int], count: int
) -> None:
    regions = threat.regions(size)
    members = torch.tensor(list(combinations(range(len(regions)), count)))
    unions = regions.unions(members)
    assert len(unions) == len(members)
    one = [pixels_of(boxes.tolist(), size) for boxes in regions.parts]
    for chosen, boxes in zip(members.tolist(), unions.parts.tolist(), strict=True):
        times = torch.zeros(size)
        for top, left, height, width in boxes:
            assert (height > 0) == (width > 0)
            times[top : top + height, left : left + width] += 1
        expected = torch.stack([one[member] for member in chosen]).any(0)
        assert torch.equal(times, expected.float())
    assert (unions.parts[..., 2] > 0).any(0).all(), "no column of boxes is of no use"
