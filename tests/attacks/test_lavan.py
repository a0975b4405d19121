"""LaVAN: one class's score against the label's, by the gradient itself."""

from __future__ import annotations

import pytest
import torch
from victims import CHANNELS, SIZE, Linear

import patchproof as pp
from patchproof.attacks import LaVAN, PlaceSearch, Victim
from patchproof.attacks.lavan import by_slope

ONE_PLACE = pp.RectanglePatch(*SIZE)


def two_ways() -> Linear:
    """Return a model in which class 1 leads class 2 at first, and class 2 can rise further.

    The first pixel moves class 1 by at most 1; the second lets class 2 lead by 3.
    """
    weights = torch.zeros(3, CHANNELS, *SIZE)
    weights[1, 0, 0, 0] = 1.0
    weights[2, 0, 0, 1] = 8.0
    return Linear(weights, torch.tensor([0.0, -2.0, -5.0])).eval()


@pytest.mark.parametrize(("target", "objective", "hit"), [(None, -1.0, False), (2, 3.0, True)])
def test_it_keeps_to_the_target_or_to_the_first_rival(
    target: int | None, objective: float, hit: bool
) -> None:
    images, labels = torch.zeros(1, CHANNELS, *SIZE), torch.tensor([0])
    result = LaVAN(places=PlaceSearch("all"), start="image", steps=10, step_size=1.0).run(
        Victim.of_model(two_ways()),
        images,
        labels,
        threat=ONE_PLACE,
        targets=None if target is None else torch.tensor([target]),
    )
    assert result.objective.item() == pytest.approx(objective)
    assert result.hit_target.item() == hit
    assert result.images[0, 0, 0, :2].tolist() == ([1.0, 0.0] if target is None else [0.0, 1.0])


def test_steps_are_as_long_as_the_slope_says() -> None:
    content = torch.full((2, 1, 1, 3), 0.5)
    slope = torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.0, 0.0]]).view(2, 1, 1, 3)
    moved = by_slope(content, slope, 0.2)
    torch.testing.assert_close(moved[0, 0, 0], torch.tensor([0.7, 0.4, 0.5]))
    assert torch.equal(moved[1], content[1])
    assert by_slope(content, slope, 1.0).aminmax() == (0.0, 1.0)
