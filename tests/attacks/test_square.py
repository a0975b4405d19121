"""The search without gradients: what it paints, what it keeps, and how it asks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from victims import CHANNELS, SIZE, convolutional, examples

import patchproof as pp
from patchproof.attacks import PlaceSearch, SquareSearch, Victim
from patchproof.attacks.square import painting


def test_squares_cover_a_pixel_of_the_patch_and_all_pixels_in_time() -> None:
    inside = torch.zeros(4000, 1, *SIZE, dtype=torch.bool)
    inside[:, :, 1:5, 2:8] = True
    inside[:, :, 2, 3] = False
    draw = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    for share, most in ((0.8, 16), (0.2, 4), (0.001, 1)):
        painted = painting(inside, share, draw)
        counts = painted.flatten(1).sum(1)
        assert not (painted & ~inside).any()
        assert counts.min() >= 1
        assert counts.max() == most
        assert painted.any(0).equal(inside[0])
    shares = painting(inside, 0.001, draw)[:, 0].float().mean(0)[inside[0, 0]]
    assert shares.numpy() == pytest.approx(1 / 23, abs=0.015)


def test_draws_at_their_ends_stay_inside() -> None:
    inside = torch.zeros(2, 1, *SIZE, dtype=torch.bool)
    inside[:, :, :2, :2] = True
    draw = torch.tensor([[0.0, 0.0, 0.0], [1 - 2**-24] * 3])
    assert (painting(inside, 0.25, draw).flatten(1).sum(1) == 1).all()
    assert painting(inside, 1.0, draw).flatten(1).any(1).all()


def test_squares_shrink_to_pixels() -> None:
    search = SquareSearch(steps=1000, first_share=0.8)
    shares = [search.share_at(step) for step in range(1000)]
    assert shares[0] == 0.8
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.8 / 2**9)
    assert len(set(shares)) == 10


class Counting(nn.Module):
    """Scores of a model, that refuses gradients and counts what it is asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked += len(images)
        scores: Tensor = self.model(images)
        return scores


@pytest.mark.parametrize("scored", [True, False])
def test_it_asks_once_a_step_and_takes_no_gradient(scored: bool) -> None:
    model = convolutional()
    images, labels = examples(8, model)
    counting = Counting(model)
    plain = Victim.of_model(model)
    victim = Victim(plain.predict, {"scores": counting}) if scored else Victim(plain.predict)
    result = SquareSearch(places=PlaceSearch("random", count=1), steps=20).run(
        victim, images, labels, threat=pp.SquarePatch(4)
    )
    attacked = int((result.tries > 0).sum())
    assert counting.asked == (21 * attacked if scored else 0)
    assert result.broken.any()


def test_scores_help_it() -> None:
    """The same number of steps breaks more images where the scores are known."""
    model = convolutional()
    images, labels = examples(60, model)
    attack = SquareSearch(places=PlaceSearch("random", count=1), steps=60)
    victim = Victim.of_model(model)
    threat = pp.SquarePatch(4)
    scored = attack.run(victim, images, labels, threat=threat)
    blind = attack.run(Victim(victim.predict), images, labels, threat=threat)
    assert scored.broken.sum() > blind.broken.sum() > 0
    assert set(blind.objective[blind.tries > 0].tolist()) == {-1.0, 1.0}


def test_contents_are_corners_of_the_colour_cube() -> None:
    model = convolutional()
    images, labels = examples(8, model)
    result = SquareSearch(places=PlaceSearch("random", count=1), steps=10).run(
        Victim.of_model(model), images, labels, threat=pp.StencilPatch.diamond(3)
    )
    painted = result.images.movedim(1, 3)[result.inside]
    assert painted.shape[1] == CHANNELS
    assert set(painted.flatten().tolist()) == {0.0, 1.0}
