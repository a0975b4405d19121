"""What every attack keeps to, whatever its threat and its victim."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from victims import (
    CHANNELS,
    CLASSES,
    SIZE,
    THREATS,
    Linear,
    alarmed_by_white,
    convolutional,
    examples,
    labels_alone,
    linear,
    region_masks,
)

import patchproof as pp
from patchproof.attacks import (
    AttackResult,
    LaVAN,
    PatchAttack,
    PatchIFGSM,
    PatchPGD,
    PlaceSearch,
    PrintablePatch,
    Problem,
    SquareSearch,
    UniversalAttack,
    Victim,
)
from patchproof.defenses.surrogate import Surrogate
from patchproof.errors import PatchproofError
from patchproof.results import ALERT

TWO = PlaceSearch("random", count=2)
ATTACKS: dict[str, PatchAttack] = {
    "pgd": PatchPGD(places=TWO, steps=6, restarts=2),
    "ifgsm": PatchIFGSM(places=TWO, steps=6),
    "lavan": LaVAN(places=TWO, steps=6, start="black-white"),
    "square": SquareSearch(places=TWO, steps=12, batch_size=7),
}
VICTIMS: dict[str, tuple[nn.Module, Callable[[nn.Module], Victim]]] = {
    "linear": (linear(), Victim.of_model),
    "convolutional": (convolutional(), Victim.of_model),
    "alerts": (convolutional(), alarmed_by_white),
    "labels": (linear(), labels_alone),
}


def universal(threat: pp.Threat, **values: Any) -> UniversalAttack:
    """Return a pasted patch of random pixels, of the shape of the threat."""
    shape = threat.shapes(SIZE)[0].pixels
    content = torch.rand(CHANNELS, *shape.shape, generator=torch.Generator().manual_seed(0))
    return UniversalAttack(patch=PrintablePatch(content, shape), **values)


def check(
    result: AttackResult, victim: Victim, images: Tensor, labels: Tensor, threat: pp.Threat
) -> None:
    """Check all that the contract says about what an attack found."""
    clean = victim.predict(images)
    assert torch.equal(result.clean_prediction, clean)
    assert torch.equal(result.prediction, victim.predict(result.images))
    assert ((result.images >= 0) & (result.images <= 1)).all()
    changed = (result.images != images).any(1)
    assert not (changed & ~result.inside).any()
    held = result.prediction == labels
    alert = result.prediction == ALERT
    assert torch.equal(result.broken, (clean == labels) & ~held & ~alert)
    attacked = clean == labels
    assert torch.equal(result.tries > 0, attacked)
    assert torch.equal(~result.objective.isnan(), attacked)
    assert not result.inside[~attacked].any()
    assert (result.places[~attacked] == -1).all()
    if isinstance(threat, pp.SparsePixels):
        assert (result.inside.flatten(1).sum(1)[attacked] <= threat.count).all()
    else:
        masks = region_masks(threat)
        assert torch.equal(result.inside[attacked], masks[result.places[attacked]].any(1))
        assert result.places.shape[1] == threat.patches


@pytest.mark.parametrize("kind", VICTIMS)
@pytest.mark.parametrize("name", THREATS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_keep_to_the_threat(attack: str, name: str, kind: str) -> None:
    tested, threat = ATTACKS[attack], THREATS[name]
    model, pointed_at = VICTIMS[kind]
    victim = pointed_at(model)
    images, labels = examples(4, model)
    if tested.needs_scores and kind == "labels":
        with pytest.raises(PatchproofError, match="got labels alone"):
            tested.run(victim, images, labels, threat=threat)
        return
    result = tested.run(victim, images, labels, threat=threat)
    check(result, victim, images, labels, threat)
    assert not result.hit_target.any()


@pytest.mark.parametrize("kind", VICTIMS)
@pytest.mark.parametrize("name", ["square", "in a box", "diamond", "two dots", "two squares"])
def test_universal_patches_keep_to_the_threat(name: str, kind: str) -> None:
    threat = THREATS[name]
    model, pointed_at = VICTIMS[kind]
    victim = pointed_at(model)
    images, labels = examples(4, model)
    check(
        universal(threat).run(victim, images, labels, threat=threat), victim, images, labels, threat
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_targets_are_hit_or_not(attack: str) -> None:
    model = convolutional()
    images, labels = examples(20, model)
    targets = (labels + 1) % CLASSES
    victim, threat = Victim.of_model(model), pp.SquarePatch(5)
    result = replace(ATTACKS[attack], places=PlaceSearch("random", count=3)).run(
        victim, images, labels, threat=threat, targets=targets
    )
    check(result, victim, images, labels, threat)
    assert torch.equal(result.hit_target, (result.tries > 0) & (result.prediction == targets))
    assert 0 < result.hit_target.sum() < len(images)


@pytest.mark.parametrize("name", ["square", "two sizes", "ring"])
@pytest.mark.parametrize(
    "attack",
    [
        PatchPGD(steps=20, step_size=0.4, restarts=2),
        PatchIFGSM(loss="margin", steps=20, step_size=0.2, restarts=1),
        LaVAN(steps=20, step_size=1.0, restarts=2),
        SquareSearch(steps=300),
    ],
    ids=lambda attack: attack.name,
)
def test_a_linear_model_is_broken_exactly_where_it_can_be(attack: PatchAttack, name: str) -> None:
    """Two classes: the gradient is the same everywhere, and the best patch is its sign."""
    plain, threat = linear(classes=2).weights.detach(), THREATS[name]
    images = 0.8 * torch.rand(16, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(3))
    labels = torch.zeros(16, dtype=torch.int64)
    slope = plain[1] - plain[0]
    gain = torch.where(slope > 0, slope * (1 - images), -slope * images).sum(1)
    best = (slope * images).flatten(1).sum(1) + torch.einsum(
        "nhw,rhw->nr", gain, region_masks(threat).float()
    ).amax(1)
    # The bias is such that half of the images can be broken.
    bias = best.sort().values[7:9].mean()
    victim = Victim.of_model(Linear(plain, torch.stack([bias, torch.tensor(0.0)])).eval())
    result = replace(attack, places=PlaceSearch("all")).run(victim, images, labels, threat=threat)
    assert torch.equal(result.clean_prediction, labels)
    assert torch.equal(result.broken, best > bias)
    assert result.objective[~result.broken] == pytest.approx(
        (best - bias)[~result.broken].double(), abs=1e-4
    )


@dataclass(frozen=True, kw_only=True)
class Scripted(PatchAttack):
    """Returns what a function makes of the problem, and a lead of 10."""

    attacked: Callable[[Problem], Tensor]
    name: ClassVar[str] = "scripted"

    def optimise(self, problem: Problem) -> tuple[Tensor, Tensor]:
        return self.attacked(problem), torch.full((len(problem.images),), 10.0)


@pytest.mark.parametrize(
    ("cheat", "message"),
    [
        (lambda problem: 1 - problem.images, "outside of the patch"),
        (lambda problem: problem.images.roll(1, 0), "outside of the patch"),
        (lambda problem: problem.images + 1e-7 * ~problem.inside, "outside of the patch"),
        (lambda problem: problem.paste(torch.tensor(1.01)), "outside \\[0, 1\\]"),
        (lambda problem: problem.paste(torch.tensor(-0.01)), "outside \\[0, 1\\]"),
        (lambda problem: problem.paste(torch.tensor(torch.nan)), "outside \\[0, 1\\]"),
        (lambda problem: problem.paste(torch.tensor(0.5)).double(), "another shape or type"),
        (lambda problem: problem.images[:, :1], "another shape or type"),
    ],
)
def test_cheats_are_caught(cheat: Callable[[Problem], Tensor], message: str) -> None:
    model = linear()
    images, labels = examples(6, model)
    with pytest.raises(AssertionError, match=message):
        Scripted(attacked=cheat).run(
            Victim.of_model(model), images, labels, threat=pp.SquarePatch(3)
        )


def test_success_is_what_predict_says() -> None:
    """The attack boasts a lead, and the surrogate is another model: neither counts."""
    model, other = linear(), linear(seed=1)
    images, labels = examples(6, model)
    victim = Victim(Victim.of_model(model).predict, Victim.of_model(other).surrogates)
    still = Scripted(attacked=lambda problem: problem.images)
    result = still.run(victim, images, labels, threat=pp.SquarePatch(3))
    assert not result.broken.any()
    assert (result.objective[1:5] == 10).all()
    moved = PatchPGD(steps=4).run(victim, images, labels, threat=pp.SquarePatch(3))
    check(moved, victim, images, labels, pp.SquarePatch(3))


def test_alerts_are_no_success() -> None:
    model = linear()
    images, labels = examples(12, model)
    threat = pp.SquarePatch(4)
    plain = PatchPGD(steps=20, step_size=0.4).run(
        Victim.of_model(model), images, labels, threat=threat
    )
    alarmed = PatchPGD(steps=20, step_size=0.4).run(
        alarmed_by_white(model), images, labels, threat=threat
    )
    assert plain.broken.any()
    assert ((alarmed.prediction == ALERT) & ~alarmed.broken).any()
    assert alarmed.broken.sum() < plain.broken.sum()


def test_the_worst_try_is_kept_and_the_first_success_ends_the_search() -> None:
    """Contents of one grey, whose lead is that grey; only the brightest of it succeeds."""
    shades = iter([0.3, 0.6, 0.2, 0.9, 0.4, 0.1])

    @dataclass(frozen=True, kw_only=True)
    class Grey(PatchAttack):
        name: ClassVar[str] = "grey"

        def optimise(self, problem: Problem) -> tuple[Tensor, Tensor]:
            shade = next(shades)
            return problem.paste(torch.tensor(shade)), torch.full((len(problem.images),), shade)

    def victim(bright: float) -> Victim:
        def predict(images: Tensor) -> Tensor:
            return (images.flatten(1).amax(1) > bright).long()

        return Victim(predict, Victim.of_model(linear()).surrogates)

    images, labels = torch.zeros(1, CHANNELS, *SIZE), torch.zeros(1, dtype=torch.int64)
    attack = Grey(places=PlaceSearch("random", count=1), restarts=3, batch_size=1)
    held = attack.run(victim(0.8), images, labels, threat=pp.SquarePatch(2))
    assert (held.objective.item(), held.tries.item()) == (pytest.approx(0.6), 3)
    assert held.images.max() == pytest.approx(0.6)
    won = attack.run(victim(0.8), images, labels, threat=pp.SquarePatch(2))
    assert (won.broken.item(), won.tries.item()) == (True, 1)


@pytest.mark.parametrize("attack", [*ATTACKS, "universal"])
@pytest.mark.parametrize("name", ["square", "two squares"])
def test_an_image_is_attacked_the_same_in_any_company(attack: str, name: str) -> None:
    model = linear()
    images, labels = examples(12, model)
    threat, victim = THREATS[name], Victim.of_model(model)
    tested = universal(threat, places=TWO) if attack == "universal" else ATTACKS[attack]

    def run(batch_size: int, rows: list[int]) -> AttackResult:
        return replace(tested, batch_size=batch_size).run(
            victim, images[rows], labels[rows], threat=threat, indices=torch.tensor(rows) + 100
        )

    whole = run(64, list(range(12)))
    assert 0 < whole.broken.sum() < 10
    for batch_size, rows in ((1, [6, 1, 8, 4]), (5, list(range(12))), (64, [7, 2, 9])):
        part = run(batch_size, rows)
        for field in ("prediction", "broken", "places", "inside", "tries"):
            assert torch.equal(getattr(part, field), getattr(whole, field)[rows]), field
        torch.testing.assert_close(part.images, whole.images[rows])
        torch.testing.assert_close(
            part.objective, whole.objective[rows], rtol=1e-5, atol=1e-4, equal_nan=True
        )


class Fickle(Surrogate):
    """The scores of a linear model, mixed anew in each call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.generator = torch.Generator()

    def forward(self, images: Tensor) -> Tensor:
        mixed: Tensor = self.model(images) @ torch.randn(CLASSES, CLASSES, generator=self.generator)
        return mixed

    def redraw(self, seed: int) -> None:
        self.generator.manual_seed(seed)


def test_what_a_surrogate_drew_before_changes_nothing() -> None:
    """Or a run that was stopped would go on to other patches."""
    model = linear()
    images, labels = examples(6, model)
    victim = Victim(Victim.of_model(model).predict, {"fickle": Fickle(model)})
    attack = PatchPGD(places=PlaceSearch("gradient", count=2), steps=3)
    first, again = (attack.run(victim, images, labels, threat=pp.SquarePatch(3)) for _ in range(2))
    assert torch.equal(first.places, again.places)
    assert torch.equal(first.images, again.images)


def test_a_pasted_patch_has_no_restarts() -> None:
    model, threat = linear(), pp.SquarePatch(2)
    images, labels = examples(6, model)
    result = universal(threat, places=TWO, restarts=5).run(
        Victim.of_model(model), images, labels, threat=threat
    )
    assert result.tries.max() == 2


def test_no_more_images_go_through_a_surrogate_than_it_has_forwards_for() -> None:
    model, seen = linear(), []
    images, labels = examples(20, model)
    scores = Victim.of_model(model).surrogates["logits"]
    scores.forwards = 50  # of 256, so that five images go together
    scores.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    victim = Victim(Victim.of_model(model).predict, {"logits": scores})
    for search in ("gradient", "trial"):
        PatchPGD(places=PlaceSearch(search, count=2), steps=2).run(
            victim, images, labels, threat=pp.SquarePatch(3)
        )
    assert max(seen) == 5


def test_other_seeds_and_indices_give_other_patches() -> None:
    model = linear()
    images, labels = examples(3, model)
    attack = SquareSearch(places=TWO, steps=5)
    threat, victim = pp.SquarePatch(3), Victim.of_model(model)
    first = attack.run(victim, images, labels, threat=threat)
    for other in (
        replace(attack, seed=1).run(victim, images, labels, threat=threat),
        attack.run(victim, images, labels, threat=threat, indices=torch.tensor([3, 4, 5])),
    ):
        assert not torch.equal(first.images, other.images)
    same = attack.run(victim, images, labels, threat=threat)
    assert torch.equal(first.images, same.images)


def test_all_aims_are_taken_in_turn() -> None:
    """The first surrogate shows nothing; the second is the model."""
    model = linear()
    images, labels = examples(12, model)
    exact = Victim.of_model(model)
    blind = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * SIZE[0] * SIZE[1], CLASSES)).eval()
    nn.init.zeros_(blind[1].weight)
    victim = Victim(exact.predict, {"blind": blind, "model": exact.surrogates["logits"]})
    attack = PatchPGD(places=PlaceSearch("random", count=2), steps=10, step_size=0.4)
    threat = pp.SquarePatch(4)
    both = attack.run(victim, images, labels, threat=threat)
    one = replace(attack, aims=("blind",)).run(victim, images, labels, threat=threat)
    assert both.broken.sum() > one.broken.sum()
    assert both.tries.max() > 2 >= one.tries.max()
    with pytest.raises(PatchproofError, match="aim: expected blind or model, got 'nose'"):
        replace(attack, aims=("nose",)).run(victim, images, labels, threat=threat)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchPGD(restarts=0), "restarts: expected a number from 1, got 0"),
        (lambda: PatchPGD(batch_size=0), "batch_size: expected a number from 1"),
        (lambda: PatchPGD(seed=-1), "seed: expected a number from 0"),
        (lambda: PatchPGD(steps=0), "steps: expected at least 1, got 0"),
        (lambda: PatchPGD(step_size=1.5), "step_size: expected in"),
        (lambda: PatchIFGSM(momentum=-0.1), "momentum: expected a number >= 0"),
        (lambda: PatchIFGSM(restarts=2), "restarts: expected 1 where all start from the same"),
        (lambda: LaVAN(loss="hinge"), "loss: expected margin or cross-entropy, got 'hinge'"),
        (lambda: LaVAN(start="red"), "start: expected random or"),
        (lambda: PatchPGD(schedule="steep"), "schedule: expected constant or"),
        (lambda: SquareSearch(steps=2.5), "steps: expected at least 1, got 2.5"),
        (lambda: SquareSearch(first_share=0.0), "first_share: expected in"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PatchproofError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.full((3, CHANNELS, *SIZE), 2.0)}, "expected pixels in"),
        ({"images": torch.zeros(3, *SIZE)}, "images: expected shape"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels: expected shape"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets: expected wrong classes"),
        ({"indices": torch.zeros(3)}, "expected an integer tensor"),
    ],
)
def test_bad_examples_are_refused(change: dict[str, Tensor], message: str) -> None:
    given = {
        "images": torch.zeros(3, CHANNELS, *SIZE),
        "labels": torch.zeros(3, dtype=torch.int64),
    } | change
    with pytest.raises(PatchproofError, match=message):
        PatchPGD().run(Victim.of_model(linear()), **given, threat=pp.SquarePatch(2))


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(PatchproofError, match="eval"):
        Victim.of_model(linear().train())


@pytest.mark.parametrize("attack", ATTACKS)
def test_settings_are_json(attack: str) -> None:
    values = json.loads(json.dumps(ATTACKS[attack].to_dict()))
    assert values["name"] == attack
    assert values["places"] == {"search": "random", "count": 2, "stride": 2}
    assert values["steps"] in (6, 12)
