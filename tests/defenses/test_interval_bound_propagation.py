"""Interval bounds under fire, and what they cost and say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.models import ModelSpec, build_model, load_classifier
from patchproof.results import Case, Verdict

SIZE = (4, 8)
STEPS = 80
SLACK = 2e-3
"""More than the bounds of these networks are widened by for rounding."""


def some_images(count: int, channels: int = 1, seed: int = 0) -> Tensor:
    """Return images whose rows differ more than the pixels of a row do."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(count, channels, SIZE[0], 1, generator=generator)
    noise = torch.rand(count, channels, *SIZE, generator=generator)
    return 0.8 * rows + 0.2 * noise


def trained(seed: int, channels: int, *layers: nn.Module) -> nn.Sequential:
    """Return a network after a few steps to find the brightest row of three.

    Half of the loss is of the bounds over one pixel of each image, which may show more and more.
    """
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    images = some_images(128, channels, seed=1000 + seed)
    labels = images.mean((1, 3))[:, :3].argmax(1)
    own = nn.functional.one_hot(labels, 3) > 0
    for step in range(STEPS):
        place = torch.randint(SIZE[0] * SIZE[1], (len(images), 1), generator=generator)
        reach = torch.zeros(len(images), SIZE[0] * SIZE[1]).scatter_(1, place, step / STEPS)
        reach = reach.view(-1, 1, *SIZE)
        lower, upper = (images - reach).clamp(min=0), (images + reach).clamp(max=1)
        for layer in model:
            lower, upper = bounds_after(layer, lower, upper)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss = loss + nn.functional.cross_entropy(torch.where(own, lower, upper), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def bounds_after(layer: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return the interval of the outputs of a layer (Equations 5 to 8), without slack."""
    half = (upper - lower) / 2
    if isinstance(layer, nn.Linear):
        spread = half @ layer.weight.abs().T
    elif isinstance(layer, nn.Conv2d):
        weight = layer.weight.abs()
        spread = nn.functional.conv2d(half, weight, None, layer.stride, layer.padding)
    else:
        return layer(lower), layer(upper)
    middle = layer(lower + half)
    return middle - spread, middle + spread


@cache
def mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return trained(seed, 1, nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3))


@cache
def convnet(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Flatten()]
    return trained(seed, 2, *layers, nn.Linear(48, 3))


@cache
def linear(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return trained(seed, 2, nn.Flatten(), nn.Linear(64, 3))


NETWORKS: dict[str, tuple[Callable[[int], nn.Sequential], int]] = {
    "perceptron": (mlp, 1),
    "convolutions": (convnet, 2),
}
THREATS: dict[str, pp.Threat] = {
    "square": pp.SquarePatch(2),
    "pixel": pp.SquarePatch(1),
    "one rectangle of two": pp.RectanglePatches([(1, 3), (2, 1)]),
    "two dots, joined at a corner": pp.StencilPatch(["#.", ".#"]),
    "two patches": pp.MultiplePatches(2, pp.SquarePatch(1)),
    "two patches in a box": pp.MultiplePatches(2, pp.RectanglePatch(1, 2, pp.Box(1, 1, 2, 3))),
    "any pixel": pp.SparsePixels(1),
    "any two pixels": pp.SparsePixels(2),
}
UNDER_FIRE = [
    (network, name)
    for network in NETWORKS
    for name in THREATS
    if (network, name) != ("convolutions", "any two pixels")  # of which none is certified
]


def attackable(threat: pp.Threat) -> Tensor:
    """Return the sets of pixels that an attacker may change, (S, H, W) bool, by hand."""
    pixels = torch.eye(SIZE[0] * SIZE[1]).view(-1, *SIZE) > 0
    if isinstance(threat, pp.SparsePixels):
        one, count = pixels, threat.count
    else:
        regions = threat.regions(SIZE)
        one, count = regions.accumulate(torch.eye(len(regions))) > 0, threat.patches
    return torch.stack([torch.stack(some).any(0) for some in combinations(one, count)])


def contents(channels: int, pixels: int) -> Tensor:
    """Return contents of so many pixels, (K, channels, pixels): all corners if few, and others."""
    values = channels * pixels
    generator = torch.Generator().manual_seed(0)
    inside = torch.rand(12, values, generator=generator)
    if values <= 4:
        corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * values).view(-1, values)
    else:
        corners = torch.randint(2, (16, values), generator=generator).float()
    return torch.cat([corners, inside]).view(-1, channels, pixels)


def attacked(image: Tensor, sets: Tensor) -> tuple[Tensor, Tensor]:
    """Return an image (C, H, W) with many contents of sets of pixels (S, H, W), and which they are.

    Returns:
        (K, C, H, W), and (K, 1, H, W) bool.
    """
    tries, where = [], []
    for pixels in sets:
        shown = contents(len(image), int(pixels.sum()))
        changed = image.expand(len(shown), -1, -1, -1).clone()
        changed[:, :, pixels] = shown
        tries.append(changed)
        where.append(pixels.expand(len(shown), 1, -1, -1))
    return torch.cat(tries), torch.cat(where)


def descended(model: nn.Module, tries: Tensor, pixels: Tensor, label: int) -> Tensor:
    """Return the tries after steps of these pixels down the gradient of the label's lead."""
    for step in (0.5, 0.2, 0.1):
        tries = tries.detach().requires_grad_()
        logits = model(tries)
        others = logits.clone()
        others[:, label] = -torch.inf
        (gradient,) = torch.autograd.grad((logits[:, label] - others.amax(1)).sum(), tries)
        moved = (tries - step * gradient.sign()).clamp(0, 1)
        tries = torch.where(pixels, moved, tries)
    return tries.detach()


def is_broken(defense: pp.IntervalBoundPropagation, image: Tensor, label: int) -> bool:
    """Tell whether some content of some pixels changes the label that ``predict`` returns."""
    sets = attackable(defense.threat)
    some = torch.randperm(len(sets), generator=torch.Generator().manual_seed(0))[:40]
    tries, pixels = attacked(image, sets[some])
    tries = torch.cat([tries, descended(defense.model, tries, pixels, label)])
    return not bool((defense.predict(tries) == label).all())


@pytest.mark.parametrize(("network", "name"), UNDER_FIRE)
def test_no_content_changes_what_is_certified(network: str, name: str) -> None:
    make, channels = NETWORKS[network]
    seen = {True: 0, False: 0}
    for seed in range(1, 4):
        model = make(seed)
        defense = pp.IntervalBoundPropagation(model, THREATS[name], image_size=SIZE)
        images = some_images(60, channels, seed)
        labels = defense.predict(images)
        certified = defense.certify(images, labels).certified
        for sure in (True, False):
            for index in (certified == sure).nonzero().flatten().tolist()[:2]:
                found = is_broken(defense, images[index], int(labels[index]))
                assert not (sure and found), f"seed {seed}, image {index}"
                seen[sure] += 1 if sure else found
    assert seen[True], "the test needs certified images"
    assert seen[False], "the attack must be able to win"


@pytest.mark.parametrize("name", [name for name in THREATS if not name.startswith("any")])
def test_without_hidden_layers_the_certificate_is_necessary(name: str) -> None:
    """Of a linear network the bounds are the worst corners, so that nothing certifiable is lost."""
    model = linear(0)
    threat = THREATS[name]
    defense = pp.IntervalBoundPropagation(model, threat, image_size=SIZE)
    images = some_images(80, 2)
    labels = defense.predict(images)
    result = defense.certify(images, labels, stop="never")
    last = model[-1]
    assert isinstance(last, nn.Linear)
    weight, bias = last.weight.detach().double(), last.bias.detach().double()
    lead = weight[labels][:, None] - weight  # (N, classes, values)
    values = images.flatten(1).double()[:, None]
    lost = (lead * values - lead.clamp(max=0)).view(len(images), -1, 2, *SIZE).sum(2)
    clean = (lead * values).sum(2) + bias[labels][:, None] - bias
    sets = attackable(threat).double()
    worst = clean[..., None] - torch.einsum("njhw,shw->njs", lost, sets)
    worst[torch.arange(len(images)), labels] = torch.inf
    lowest = worst.amin(1).amin(1)
    clear = lowest.abs() > SLACK
    assert torch.equal(result.certified[clear], (lowest > 0)[clear])
    assert 0 < result.certified.sum() < len(images)
    margins = worst.amin(1)
    if threat.patches > 1:
        places = len(threat.regions(SIZE))
        members = torch.tensor(list(combinations(range(places), threat.patches)))
        together = [margins[:, (members == place).any(1)].amin(1) for place in range(places)]
        margins = torch.stack(together, 1)
    clear = margins.abs() > SLACK
    holds = result.region_verdicts() == Verdict.HOLDS
    assert torch.equal(holds[clear], (margins > 0)[clear])


def test_margins_are_those_worked_out_by_hand() -> None:
    """Of 0.5 everywhere a pixel of weight 2 loses 1 to black, and one of weight -1 loses 0.5."""
    first, last = nn.Linear(3, 1), nn.Linear(1, 2)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[2.0, -1.0, 0.0]]))
        first.bias.fill_(2.0)
        last.weight.copy_(torch.tensor([[1.0], [0.0]]))
        last.bias.copy_(torch.tensor([-1.75, 0.0]))
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()
    image = torch.full((1, 1, 1, 3), 0.5)  # margin 1 - 0.5 + 2 - 1.75 = 0.75
    defense = pp.IntervalBoundPropagation(model, pp.SquarePatch(1), image_size=(1, 3))
    result = defense.certify(image, torch.tensor([0]), stop="never")
    assert result.smallest_margin.tolist() == pytest.approx([-0.25], abs=1e-4)
    assert not result.certified
    assert result.vulnerability_map().tolist() == [[[1.0, 0.0, 0.0]]]
    sparse = pp.IntervalBoundPropagation(model, pp.SparsePixels(2), image_size=(1, 3))
    result = sparse.certify(image, torch.tensor([0]), stop="never")
    assert result.smallest_margin.tolist() == pytest.approx([-0.75], abs=1e-4)
    assert result.vulnerability_map().tolist() == [[[1.0, 1.0, 1.0]]]


def test_backward_bounds_certify_what_intervals_do_and_more() -> None:
    gained = 0
    for seed in range(3):
        model = mlp(seed)
        images = some_images(60, seed=seed)
        interval, backward = (
            pp.IntervalBoundPropagation(model, pp.SquarePatch(2), image_size=SIZE, method=method)
            for method in ("interval", "backward")
        )
        labels = interval.predict(images)
        sure = interval.certify(images, labels).certified
        more = backward.certify(images, labels).certified
        assert not (sure & ~more).any()
        for index in (more & ~sure).nonzero().flatten().tolist()[:3]:
            assert not is_broken(backward, images[index], int(labels[index]))
            gained += 1
    assert gained


@pytest.mark.parametrize("stop", ["first_lost_region", "never"])
@pytest.mark.parametrize("name", ["square", "two patches in a box", "any two pixels"])
def test_batches_change_nothing(name: str, stop: Any) -> None:
    images = some_images(30)
    results = []
    for batch_size in (1, 4, 50, None):
        defense = pp.IntervalBoundPropagation(
            mlp(0), THREATS[name], image_size=SIZE, batch_size=batch_size
        )
        labels = defense.predict(images)
        result = defense.certify(images, labels, stop=stop)
        results.append((labels.tolist(), result.certified.tolist()))
        if stop == "never":
            assert torch.equal((result.verdicts == Verdict.HOLDS).all(1), result.certified)
            assert not (result.verdicts == Verdict.UNKNOWN).any()
    assert all(result == results[0] for result in results)
    assert any(results[0][1])
    assert not all(results[0][1])


def test_a_small_memory_budget_changes_nothing() -> None:
    images = some_images(20)
    some = [
        pp.IntervalBoundPropagation(
            mlp(0), pp.SquarePatch(2), image_size=SIZE, memory_budget=budget
        ).certify(images, torch.zeros(20, dtype=torch.int64), stop="never")
        for budget in (2**12, None)
    ]
    assert torch.equal(some[0].verdicts, some[1].verdicts)


@pytest.mark.parametrize(
    "name", ["pixel", "square", "one rectangle of two", "two patches in a box"]
)
def test_screening_changes_no_verdict(name: str) -> None:
    images = some_images(40)
    plain, screened = (
        pp.IntervalBoundPropagation(mlp(0), THREATS[name], image_size=SIZE, screen=screen)
        for screen in (1, 3)
    )
    assert plain.to_dict() == screened.to_dict()
    labels = plain.predict(images)
    first, second = (one.certify(images, labels, stop="never") for one in (plain, screened))
    assert torch.equal(first.verdicts, second.verdicts)
    assert (second.smallest_margin <= first.smallest_margin + SLACK).all()


def test_an_image_is_left_at_its_first_lost_region() -> None:
    images = some_images(40)
    defense = pp.IntervalBoundPropagation(mlp(0), pp.SquarePatch(2), image_size=SIZE)
    labels = defense.predict(images)
    first = defense.certify(images, labels)
    every = defense.certify(images, labels, stop="never")
    assert torch.equal(first.certified, every.certified)
    assert torch.equal(first.paper_condition, every.paper_condition)
    known = first.verdicts != Verdict.UNKNOWN
    assert torch.equal(first.verdicts[known], every.verdicts[known])
    assert (every.smallest_margin <= first.smallest_margin + SLACK).all()
    assert (first.vulnerability_map() >= every.vulnerability_map()).all()


def test_examples_are_taken_a_batch_at_a_time_and_come_back_in_order() -> None:
    images = some_images(7)
    taken: list[int] = []

    def examples() -> Iterator[tuple[int, Tensor, int]]:
        for index, image in enumerate(images):
            taken.append(index)
            yield 10 * index, image, 0

    defense = pp.IntervalBoundPropagation(mlp(0), pp.SquarePatch(1), image_size=SIZE, batch_size=3)
    seen = []
    for keys, part in defense.certify_stream(examples()):
        seen.append(keys)
        assert len(part) == len(keys)
        assert len(taken) == min(7, 3 * len(seen))
    assert seen == [[0, 10, 20], [30, 40, 50], [60]]


def test_a_wrong_label_is_lost_everywhere() -> None:
    images = some_images(30)
    defense = pp.IntervalBoundPropagation(mlp(0), pp.SquarePatch(1), image_size=SIZE)
    wrong = (defense.predict(images) + 1) % 3
    for stop in ("first_lost_region", "never"):
        result = defense.certify(images, wrong, stop=stop)
        assert not result.certified.any()
        assert not result.paper_condition.any()
        assert (result.verdicts == Verdict.LOST).all()
        assert (result.smallest_margin <= 0).all()


def test_a_tie_goes_to_the_lower_class_and_is_not_certified() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).eval()
    last = model[1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0, 1.0, 1.0]))
    defense = pp.IntervalBoundPropagation(model, pp.SquarePatch(1), image_size=SIZE)
    images = some_images(2)
    assert defense.predict(images).tolist() == [1, 1]
    assert not defense.certify(images, torch.tensor([1, 2])).certified.any()


def test_lower_bounds_must_be_above_the_tolerance() -> None:
    images = some_images(60)
    model = mlp(0)
    defense = pp.IntervalBoundPropagation(model, pp.SquarePatch(1), image_size=SIZE)
    labels = defense.predict(images)
    result = defense.certify(images, labels)
    tolerance = float(result.smallest_margin[result.certified].median())
    strict = pp.IntervalBoundPropagation(
        model, pp.SquarePatch(1), image_size=SIZE, tolerance=tolerance
    ).certify(images, labels)
    assert torch.equal(strict.certified, result.smallest_margin > tolerance)
    assert 0 < strict.certified.sum() < result.certified.sum()
    assert torch.equal(strict.paper_condition, result.paper_condition)


def test_logits_that_are_not_finite_are_never_certified() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    last = model[1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.copy_(torch.tensor([[0.0] * 4, [1e38] * 4]))
        last.bias.copy_(torch.tensor([1.0, 0.0]))
    defense = pp.IntervalBoundPropagation(model, pp.SquarePatch(1), image_size=(2, 2))
    images = torch.stack([torch.ones(1, 2, 2), torch.full((1, 2, 2), 0.2)])  # 4e38, 8e37
    with pytest.warns(UserWarning, match="not finite"):
        prediction = defense.infer(images)
    assert prediction.label.tolist() == [0, 1]
    assert prediction.case.tolist() == [Case.MAJORITY, Case.AGREED]
    assert prediction.forwards.tolist() == [1, 1]
    for stop in ("first_lost_region", "never"):
        with pytest.warns(UserWarning, match="not finite"):
            result = defense.certify(images[:1], prediction.label[:1], stop=stop)
        assert not result.certified
        assert not result.paper_condition
    with pytest.raises(pp.PatchproofError, match="expected weights for sums below"):
        defense.certify(images[1:], prediction.label[1:])


class Changing(nn.Sequential):
    """Another network every other time, which no tracing can see."""

    odd = False

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images)
        if isinstance(images, torch.fx.Proxy):
            return logits
        return logits * (0.01 if self.odd and len(images) > 4 else 1)


def test_bounds_of_another_network_are_noticed() -> None:
    model = Changing(*deepcopy(mlp(0))).eval()
    defense = pp.IntervalBoundPropagation(model, pp.SquarePatch(1), image_size=SIZE)
    images = some_images(30)
    assert defense.certify(images, defense.predict(images)).certified.any()
    model.odd = True
    with pytest.raises(pp.PatchproofError, match="no more than the margin of the clean image"):
        defense.certify(images, defense.predict(images))


def test_a_forward_an_image_and_no_more_is_counted() -> None:
    images = some_images(5)
    defense = pp.IntervalBoundPropagation(mlp(0), pp.SquarePatch(1), image_size=SIZE)
    result = defense.certify(images, defense.predict(images))
    assert result.forwards.tolist() == [1] * 5
    assert defense.tune_batch_size(images[0]) == defense.batch_size
    assert defense.tune_batch_size(images[0], 20) == defense.batch_size <= 20
    assert defense.tune_batch_size(images[0], 3) == defense.batch_size == 3


@pytest.mark.parametrize("name", [*THREATS, "backward"])
def test_a_saved_defense_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    spec = ModelSpec("ibp-mlp", 3, 1, SIZE, {"hidden": [6]})
    options: dict[str, Any] = {"tolerance": 0.01}
    threat = THREATS.get(name, pp.SquarePatch(2))
    if name == "backward":
        options["method"] = "backward"
    defense = pp.IntervalBoundPropagation(build_model(spec), threat, image_size=SIZE, **options)
    defense.save(tmp_path / "robust.safetensors", spec, made={"by": "hand"})
    again = pp.load(tmp_path / "robust.safetensors")
    assert isinstance(again, pp.IntervalBoundPropagation)
    assert again.to_dict() == defense.to_dict()
    assert "fill" not in defense.to_dict()
    images = some_images(30)
    labels = defense.predict(images)
    assert torch.equal(again.predict(images), labels)
    first, second = (one.certify(images, labels, stop="never") for one in (defense, again))
    assert torch.equal(first.verdicts, second.verdicts)
    _, card = load_classifier(tmp_path / "robust.safetensors")
    assert card["made"]["by"] == "hand"


def test_a_network_without_bounds_is_not_saved(tmp_path: Path) -> None:
    defense = make(model=TwoSteps().eval())
    spec = ModelSpec("python:somewhere:TwoSteps", 2, 1, SIZE)
    with pytest.raises(pp.PatchproofError, match="bounds"):
        defense.save(tmp_path / "robust.safetensors", spec)
    assert not list(tmp_path.iterdir())


def test_it_says_what_it_bounds() -> None:
    def words(threat: pp.Threat, **options: Any) -> str:
        return pp.IntervalBoundPropagation(mlp(0), threat, image_size=SIZE, **options).describe()

    assert words(pp.SquarePatch(2)) == "interval bounds of the patch at 21 places"
    assert words(THREATS["two patches"]) == "interval bounds of the patches at 496 places"
    assert words(pp.SparsePixels(2)) == "interval bounds of 2 pixels anywhere"
    assert "backward bounds" in words(pp.SquarePatch(2), method="backward")


def make(**options: Any) -> pp.IntervalBoundPropagation:
    model = options.pop("model", None) or mlp(0)
    threat = options.pop("threat", pp.SquarePatch(1))
    return pp.IntervalBoundPropagation(model, threat, **{"image_size": SIZE, **options})


class TwoSteps(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([images.mean((1, 2, 3)), images.var((1, 2, 3))], 1)


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "method": (lambda: make(method="magic"), "method: expected 'interval' or 'backward', got"),
    "method of sparse pixels": (
        lambda: make(method="backward", threat=pp.SparsePixels(1)),
        "expected 'interval' for sparse pixels",
    ),
    "tolerance": (lambda: make(tolerance=-1.0), "tolerance: expected a number >= 0, got -1.0"),
    "screen": (lambda: make(screen=0), "screen: expected places a side >= 1, got 0"),
    "screen with a tolerance": (
        lambda: make(screen=2, tolerance=0.1),
        "screen: expected 1 with a tolerance, got 2",
    ),
    "tolerance that is no number": (lambda: make(tolerance=float("nan")), "tolerance"),
    "batch size": (lambda: make(batch_size=0), "batch_size: expected images >= 1"),
    "memory": (lambda: make(memory_budget=0), "memory_budget: expected bytes >= 1"),
    "image size": (lambda: make(image_size=(0, 5)), "image_size"),
    "training mode": (lambda: make(model=deepcopy(mlp(0)).train()), "model in eval mode"),
    "no module": (lambda: make(model=len), "expected a torch.nn.Module"),
    "a network without bounds": (lambda: make(model=TwoSteps().eval(), channels=1), "bounds"),
    "several patches": (
        lambda: make(threat=pp.MultiplePatches(4, pp.SquarePatch(1))),
        "at most 20,000 places of several patches together, got 35,960 of 4 patches",
    ),
    "a patch too large": (lambda: make(threat=pp.SquarePatch(6)), "no larger than the 4x8 image"),
    "pixels": (lambda: make().predict(2 * torch.ones(1, 1, *SIZE)), "pixels in \\[0, 1\\]"),
    "shape": (lambda: make().predict(torch.ones(1, 1, 8, 4)), "expected shape"),
    "labels": (
        lambda: make().certify(torch.ones(1, 1, *SIZE), torch.tensor([3])),
        "labels: expected 0 to 2, got 3",
    ),
    "no images": (
        lambda: make().certify(torch.ones(0, 1, *SIZE), torch.ones(0, dtype=torch.int64)),
        "expected at least one, got none",
    ),
    "stop": (
        lambda: list(make().certify_stream([], stop="soon")),
        "stop: expected 'first_lost_region' or 'never', got 'soon'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_say_what_was_expected(name: str) -> None:
    mistake, message = MISTAKES[name]
    with pytest.raises(pp.PatchproofError, match=message):
        mistake()


def test_a_model_that_goes_back_to_training_is_refused() -> None:
    defense = make(model=deepcopy(mlp(0)))
    defense.model.train()
    images = some_images(2)
    with pytest.raises(pp.PatchproofError, match="eval mode"):
        defense.predict(images)
    with pytest.raises(pp.PatchproofError, match="eval mode"):
        defense.certify(images, torch.zeros(2, dtype=torch.int64))


def test_nothing_is_predicted_of_no_images() -> None:
    assert make().predict(torch.ones(0, 1, *SIZE)).shape == (0,)
