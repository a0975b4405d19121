"""Certified training: which regions a step looks at, and what it minimises."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from patchproof.bounds import BoundedNetwork
from patchproof.cli.train import parse_pool, parse_strategy
from patchproof.datasets import load_dataset
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec, build_model
from patchproof.threat import (
    Box,
    MultiplePatches,
    RectanglePatches,
    SparsePixels,
    SquarePatch,
)
from patchproof.training import IntervalBoundsRecipe, train
from patchproof.training.interval_bounds import (
    margins_at,
    of_other_classes,
    tiles,
    worst_groups,
)
from patchproof.training.recipe import Step

SPEC = ModelSpec("ibp-conv2", 3, 1, (10, 9), {"widths": [2, 3], "hidden": [6]})


def recipe(**options):
    return IntervalBoundsRecipe(**{"threat": SquarePatch(2)} | options)


def batch(count=6):
    torch.manual_seed(1)
    return torch.rand(count, 1, 10, 9), torch.randint(0, 3, (count,))


def network():
    torch.manual_seed(0)
    return build_model(SPEC)


def test_all_regions_give_the_loss_and_gradient_of_the_worst_of_all():
    images, labels = batch()
    model = network()
    loss = recipe(strategy="all").step_loss(Step(model, None, images, labels, None, 1.0))
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    bounded = BoundedNetwork(model, (1, 10, 9))
    boxes = recipe().boxes((1, 10, 9))
    margins = bounded.margins(bounded.prepare(images, labels, slack=False), boxes).amin(0)
    expected = functional.cross_entropy(-margins, labels)
    expected.backward()
    assert len(boxes.starts) == 72
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_guide_that_knows_the_margins_finds_the_worst_regions():
    images, labels = batch()
    model = network()
    settings = recipe(strategy="guided", regions=3)
    boxes = settings.boxes((1, 10, 9))
    bounded = BoundedNetwork(model, (1, 10, 9))
    with torch.no_grad():
        margins = bounded.margins(bounded.prepare(images, labels, slack=False), boxes)
    rows, columns = (boxes.starts.amax(0) + 1).tolist()
    true = margins.permute(1, 2, 0).reshape(6, 3, rows, columns)
    drawn = settings._guided(1e6 * true.flatten(2))
    worst = worst_groups(bounded, images, labels, boxes, torch.arange(72)[:, None])
    others = torch.arange(3) != labels[:, None]  # the margin of the label itself is 0 everywhere
    assert torch.equal(drawn[others], worst[others])


def test_a_group_that_is_worst_for_several_classes_is_bounded_once():
    worst = torch.tensor([[7, 2, 7, 9], [3, 3, 3, 3], [1, 5, 8, 5]])
    chosen = of_other_classes(worst, torch.tensor([3, 0, 0]))
    assert [set(row) for row in chosen.tolist()] == [{2, 7}, {3}, {5, 8}]
    assert chosen.shape == (3, 2)


def test_the_error_of_the_guide_is_that_of_the_regions_drawn():
    images, labels = batch()
    model = network()
    settings = recipe(strategy="guided", regions=6)
    guide = settings.companion(SPEC)
    boxes = settings.boxes((1, 10, 9))
    assert guide(images).shape == (6, 3, 9, 8)
    torch.manual_seed(5)
    loss = settings.step_loss(Step(model, guide, images, labels, None, 1.0))
    loss.backward()
    torch.manual_seed(5)
    predicted = guide(images).flatten(2)
    drawn = settings._guided(predicted.detach())
    assert drawn.shape == (6, 6)
    bounded = BoundedNetwork(model, (1, 10, 9))
    margins = margins_at(bounded, images, labels, boxes, drawn[..., None])
    total = 0.0
    for image in range(6):
        for column, place in enumerate(drawn[image].tolist()):
            top, left = boxes.starts[place].tolist()
            of_place = guide(images)[image, :, top, left]
            total = total + (of_place - margins[image, column].detach()).square().mean() / 36
    # the guide learns by its error, and what is told is the cross-entropy alone
    torch.testing.assert_close(loss, functional.cross_entropy(-margins.amin(1), labels))
    learned = [parameter.grad.clone() for parameter in guide.parameters()]
    guide.zero_grad()
    total.backward()
    assert any(gradient.abs().sum() > 0 for gradient in learned)
    for parameter, gradient in zip(guide.parameters(), learned, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("pool", "expected"), [((2,), 20), ((4,), 6), ((2, 2), 6), ((3,), 9)])
def test_tiles_hold_every_place_and_join_neighbours_first(pool, expected):
    boxes = recipe().boxes((1, 10, 9))  # 9x8 places
    groups = tiles(boxes, pool)
    side = int(torch.tensor(pool).prod())
    assert groups.shape == (expected, side**2)
    assert set(groups.flatten().tolist()) == set(range(72))
    starts = boxes.starts[groups]
    assert ((starts.amax(1) - starts.amin(1)) < side).all()
    first = starts[:, : pool[0] ** 2]
    assert ((first.amax(1) - first.amin(1)) < pool[0]).all()


@pytest.mark.parametrize("pool", [(2,), (4,), (2, 2)])
def test_pooled_training_never_sees_less_than_all_regions(pool):
    images, labels = batch()
    model = network()
    losses = [
        recipe(strategy="all", pool=some).step_loss(Step(model, None, images, labels, None, 1.0))
        for some in ((), pool)
    ]
    assert losses[1] >= losses[0] - 1e-6


def test_at_the_start_the_loss_is_that_of_the_clean_image():
    images, labels = batch()
    model = network()
    clean = functional.cross_entropy(model(images), labels)
    for settings in (
        recipe(strategy="all"),
        recipe(strategy="random"),
        recipe(strategy="guided", regions=3),  # its U-Net is not asked, and there is none
        IntervalBoundsRecipe(threat=SparsePixels(2)),
    ):
        settings = replace(settings, clean_start=0.2)
        for done in (0.0, 0.1, 0.2):
            loss = settings.step_loss(Step(model, None, images, labels, None, done))
            assert loss == clean


def test_the_interval_grows_from_the_clean_start_on():
    images, labels = batch()
    model = network()
    settings = recipe(strategy="all", clean_start=0.2, growth=0.6)

    def loss(done):
        return settings.step_loss(Step(model, None, images, labels, None, done)).item()

    bounded = BoundedNetwork(model, (1, 10, 9))
    half = replace(settings.boxes((1, 10, 9)), epsilon=0.5)
    margins = bounded.margins(bounded.prepare(images, labels, slack=False), half).amin(0)
    assert loss(0.4) == pytest.approx(functional.cross_entropy(-margins, labels).item(), rel=1e-5)
    assert loss(0.2 + 1e-7) == pytest.approx(loss(0.2), rel=1e-4)
    assert loss(0.2) < loss(0.3) < loss(0.5) < loss(0.6) == loss(1.0)


def test_the_learning_rate_halves_a_while_after_the_interval_is_whole():
    settings = recipe(growth=0.6, halving=0.1)
    assert [settings.rate(done) for done in (0.0, 0.3, 0.59)] == [1.0, 1.0, 1.0]
    assert [settings.rate(done) for done in (0.65, 0.75, 0.85, 0.99)] == [1.0, 0.5, 0.25, 0.125]
    settings = replace(settings, full_rate=0.3)
    assert [settings.rate(done) for done in (0.2, 0.35, 0.45, 0.55)] == [1.0, 0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "some"}, "expected a strategy"),
        ({"regions": 0}, "expected regions from 1"),
        ({"growth": 0.0}, "expected growth above 0"),
        ({"full_rate": 1.5}, "expected full_rate above 0 and up to 1, got 1.5"),
        (
            {"clean_start": 0.7},
            "expected clean_start from 0 and below growth, got 0.7 and growth 0.61",
        ),
        ({"clean_start": -0.1}, "expected clean_start from 0"),
        ({"pool": (2,)}, "expected pool with strategy all, got it with random"),
        ({"pool": (2, 1), "strategy": "all"}, "expected pool of numbers from 2, got 1"),
        ({"threat": MultiplePatches(2, SquarePatch(1))}, "expected one patch to train on"),
        ({"threat": SparsePixels(2), "strategy": "guided"}, "expected no strategy for sparse"),
        ({"threat": SparsePixels(2), "strategy": "all", "pool": (2,)}, "expected no strategy"),
        ({"precision": "bf16-mixed"}, "expected precision 32-true"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(PatchproofError, match=message):
        recipe(**options)


def test_networks_and_patches_that_do_not_fit_are_refused():
    with pytest.raises(
        PatchproofError, match="guided regions that are a multiple of the 3 classes, got 10"
    ):
        recipe(strategy="guided", regions=10).check(network(), SPEC)
    for strategy, pool, verb in (("guided", (), "guide"), ("all", (2,), "pool")):
        for locations in ("corners", Box(1, 1, 5, 5)):
            threat = SquarePatch(2, locations)
            cornered = recipe(threat=threat, strategy=strategy, pool=pool, regions=3)
            with pytest.raises(PatchproofError, match=f"patch at any place to {verb}"):
                cornered.check(network(), SPEC)
    with pytest.raises(PatchproofError, match="expected at most 72 regions"):
        recipe(regions=73).check(network(), SPEC)
    with pytest.raises(PatchproofError, match="patch of one shape"):
        recipe(threat=RectanglePatches([(1, 2), (2, 1)])).check(network(), SPEC)
    for layer in (nn.BatchNorm2d(1), nn.Dropout()):
        with pytest.raises(PatchproofError, match="without batch normalisation and dropout"):
            recipe().check(nn.Sequential(layer, network()).eval(), SPEC)
    perceptron = ModelSpec("ibp-mlp", 3, 1, (10, 9))
    with pytest.raises(PatchproofError, match="more than 2 fully connected layers"):
        recipe(strategy="all", pool=(2, 2)).check(build_model(perceptron), perceptron)


@pytest.mark.parametrize("strategy", ["random", "guided"])
def test_a_training_that_was_stopped_goes_on_to_the_same_network(tmp_path, strategy):
    data = [load_dataset("digits", split).sample(120, 0) for split in ("train", "validation")]
    spec = ModelSpec("ibp-mlp", 10, 1, (8, 8), {"hidden": [12]})
    settings = recipe(strategy=strategy, epochs=3, batch_size=40, certified_images=20)
    train(settings, spec, *data, tmp_path / "whole", device="cpu")

    class Stopped(Exception):
        pass

    class StopsAfterOneEpoch(IntervalBoundsRecipe):
        def step_loss(self, step):
            if step.done > 0.34:
                raise Stopped
            return super().step_loss(step)

    stopping = StopsAfterOneEpoch(
        threat=SquarePatch(2), strategy=strategy, epochs=3, batch_size=40, certified_images=20
    )
    with pytest.raises(Stopped):
        train(stopping, spec, *data, tmp_path / "parts", device="cpu")
    assert len((tmp_path / "parts" / "log.jsonl").read_text().splitlines()) == 1
    train(settings, spec, *data, tmp_path / "parts", device="cpu")
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_trained_bounds_certify_more_than_plain_ones(tmp_path):
    data = [load_dataset("digits", split) for split in ("train", "validation")]
    spec = ModelSpec("ibp-mlp", 10, 1, (8, 8), {"hidden": [40]})
    settings = IntervalBoundsRecipe(
        threat=SquarePatch(1), strategy="random", epochs=10, batch_size=50, learning_rate=3e-3
    )
    best = train(settings, spec, *data, tmp_path, device="cpu")
    assert best["certified_accuracy"] > 0.4
    assert best["clean_accuracy"] > 0.8


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", ("all", 1)), ("random:5", ("random", 5)), ("guided:20", ("guided", 20))],
)
def test_strategies_are_read(text, expected):
    assert parse_strategy(text) == expected


@pytest.mark.parametrize(
    "text", ["", "all:3", "random", "random:0", "random:x", "guided:", "some:3"]
)
def test_other_strategies_are_refused(text):
    with pytest.raises(PatchproofError, match="--strategy: expected all, random:N or guided:N"):
        parse_strategy(text)


def test_pools_are_read_or_refused():
    assert [parse_pool(text) for text in (None, "4", "2-2")] == [(), (4,), (2, 2)]
    for text in ("", "1", "2-2-2", "2x2", "-2"):
        with pytest.raises(PatchproofError, match="--pool: expected one or two numbers"):
            parse_pool(text)
