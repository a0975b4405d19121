"""What defenses hand to attackers: it follows ``predict``, with gradients inside a patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from feature_models import SIZE, Hostile, HostileBands, mild_images
from torch import Tensor, nn

import patchproof as pp
from patchproof.defenses.saved import SavedDefense
from patchproof.defenses.surrogate import NetworkScores, Surrogate
from patchproof.defenses.view_scores import TwoMaskScores, ViewScores, drawn_from
from patchproof.results import ALERT
from patchproof.views import MaskPairViews
from patchproof.views.crops import CropViews

THREAT = pp.SquarePatch(2)
INSIDE = torch.zeros(1, 1, *SIZE, dtype=torch.bool)
INSIDE[..., 2:6, 2:6] = True
"""A larger patch than the threat, so that no certificate is in the way."""


def linear() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    return layers.eval()


COLUMNS = pp.Ablation("column", 2)
CASES: dict[str, tuple[Callable[..., Any], Callable[[], nn.Module], dict[str, Any]]] = {
    "double": (pp.PatchCleanser, Hostile, {"masks_per_side": 3}),
    "challenger": (pp.PatchCleanser, Hostile, {"masks_per_side": 3, "inference": "challenger"}),
    "minority reports": (pp.MinorityReports, Hostile, {"masks_per_side": 3}),
    "many masks": (pp.MinorityReports, Hostile, {"masks_per_side": 8}),
    "window detection": (pp.PatchGuardPlusPlus, Hostile, {"tau": 0.9}),
    "masked logits": (pp.PatchGuard, Hostile, {}),
    "threshold": (pp.PatchGuard, Hostile, {"threshold": 0.6}),
    "masked votes": (pp.PatchGuard, Hostile, {"feature": "prediction"}),
    "masked bands": (pp.PatchGuard, lambda: HostileBands(COLUMNS), {}),
    "clipped": (pp.ClippedBagNet, Hostile, {}),
    "votes": (pp.BagCert, Hostile, {}),
    "confidence": (pp.BagCert, Hostile, {"feature": "confidence"}),
    "bands": (pp.DerandomizedSmoothing, lambda: HostileBands(COLUMNS), {}),
    "pairs of bands": (
        pp.DerandomizedSmoothing,
        lambda: HostileBands(COLUMNS),
        {"bands": 2, "vote_threshold": None},
    ),
    "median": (pp.RobustStatistics, Hostile, {"statistic": "median", "feature": "confidence"}),
    "top masking": (pp.RobustStatistics, Hostile, {"statistic": "top-masking"}),
    "all crops": (pp.RandomizedCropping, Hostile, {"crop_size": 4}),
    "fixed crops": (
        pp.RandomizedCropping,
        Hostile,
        {"crop_size": 4, "mode": "fixed-crops", "crops": 9},
    ),
    "random crops": (
        pp.RandomizedCropping,
        Hostile,
        {"crop_size": 3, "mode": "random-crops", "crops": 200},
    ),
    "interval bounds": (pp.IntervalBoundPropagation, linear, {}),
}


def defense_of(name: str, *, tame: bool = False) -> Any:
    make, model, options = CASES[name]
    network = model().eval()
    for part in network.modules():
        if isinstance(part, Hostile) and tame:
            part.strength = 0.0
    return make(network, THREAT, image_size=SIZE, **options)


def lead(scores: Tensor, labels: Tensor) -> Tensor:
    own = scores.gather(1, labels[:, None])
    others = scores.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - own.squeeze(1)


def test_every_defense_is_here() -> None:
    abstract = {"HidingDefense", "OverMasks", "OverFeatures", "BatchedDefense"}
    of_library = {make.__name__ for make, _, _ in CASES.values()}
    elsewhere = {"Undefended", "LocalGradientSmoothing", "DigitalWatermarking"}
    known: set[str] = set()
    waiting: list[type] = [SavedDefense]
    while waiting:
        derived = waiting.pop().__subclasses__()
        waiting += derived
        known |= {kind.__name__ for kind in derived if kind.__module__.startswith("patchproof.")}
    assert of_library <= known - abstract
    assert {name for name in known - of_library - elsewhere if hasattr(pp, name)} == set()


@pytest.mark.parametrize("name", CASES)
def test_it_goes_the_way_of_predict(name: str) -> None:
    defense = defense_of(name)
    images = mild_images(60, seed=1)
    prediction = defense.predict(images)
    labelled = prediction != ALERT
    assert labelled.sum() > 20
    surrogates: dict[str, Surrogate] = defense.surrogates()
    for surrogate in surrogates.values():
        attacked = images.clone().requires_grad_()
        scores = surrogate(attacked)
        assert scores.shape == (60, 3)
        assert scores.dtype == torch.float32
        (gradient,) = torch.autograd.grad(lead(scores, prediction.clamp(min=0)).sum(), attacked)
        assert gradient.isfinite().all()
        moves = gradient.masked_fill(~INSIDE, 0.0).abs().amax((1, 2, 3)) > 0
        assert moves.float().mean() > 0.9
        same = scores.argmax(1) == prediction
        clear = scores.topk(2).values.diff().squeeze(1) < -1e-5
        if surrogate.exact:
            assert same[clear].all()
        assert same[labelled].float().mean() > 0.7


@pytest.mark.parametrize("name", CASES)
def test_whoever_ascends_it_breaks_the_defense(name: str) -> None:
    defense = defense_of(name, tame=True)
    images = mild_images(40, seed=2)
    labels = defense.predict(images)
    images, labels = images[labels != ALERT], labels[labels != ALERT]

    def broken(content: Tensor) -> float:
        prediction = defense.predict(torch.where(INSIDE, content, images))
        return float(((prediction != labels) & (prediction != ALERT)).float().mean())

    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    for surrogate in defense.surrogates().values():
        surrogate.redraw(0)
        attacked = images
        for _ in range(12):
            attacked = attacked.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(lead(surrogate(attacked), labels).sum(), attacked)
            stepped = (attacked + 0.15 * gradient.sign()).clamp(0, 1)
            attacked = torch.where(INSIDE, stepped, images)
        assert broken(attacked.detach()) > broken(noise) + 0.2


@pytest.mark.parametrize("name", ["double", "many masks", "pairs of bands", "random crops"])
def test_calls_draw_views_and_repeat_from_a_seed(name: str) -> None:
    defense, images = defense_of(name), mild_images(4)
    surrogate = list(defense.surrogates().values())[-1]
    if isinstance(surrogate, TwoMaskScores):
        surrogate = TwoMaskScores(defense.model, defense.views, forwards=8)
    elif isinstance(surrogate, ViewScores):
        surrogate = ViewScores(
            surrogate.model, surrogate.views, surrogate.combine, always=1, forwards=6
        )
    assert not surrogate.exact
    surrogate.redraw(5)
    calls = [surrogate(images) for _ in range(8)]
    assert any(not torch.equal(call, calls[0]) for call in calls)
    surrogate.redraw(5)
    for call in calls:
        assert torch.equal(surrogate(images), call)


def test_a_call_costs_what_it_says() -> None:
    passes: list[int] = []
    for name in CASES:
        defense = defense_of(name)
        defense.model.register_forward_hook(lambda _, images, __: passes.append(len(images[0])))
        for surrogate in defense.surrogates().values():
            passes.clear()
            surrogate(mild_images(3))
            views = getattr(surrogate, "views", None)
            if isinstance(views, (MaskPairViews, CropViews)):
                assert sum(passes) == 3 * surrogate.forwards
            if name != "interval bounds":
                assert surrogate.forwards <= 64


def test_fixed_crops_are_drawn_from_those_that_vote() -> None:
    defense = defense_of("fixed crops")
    surrogate = defense.surrogates()["expected-votes"]
    assert torch.equal(surrogate.among, defense.fixed)


def test_draws_keep_the_first_views() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([drawn_from(9, 4, 1, generator) for _ in range(100)])
    assert (draws[:, 0] == 0).all()
    assert (draws.diff() > 0).all()
    assert set(draws.flatten().tolist()) == set(range(9))
    assert drawn_from(3, 7, 1, generator).tolist() == [0, 1, 2]


def test_the_network_of_interval_bounds_is_its_own_surrogate() -> None:
    defense = defense_of("interval bounds")
    surrogate = defense.surrogates()["logits"]
    assert isinstance(surrogate, NetworkScores)
    images = mild_images(5)
    assert torch.equal(surrogate(images), defense.model(images))
