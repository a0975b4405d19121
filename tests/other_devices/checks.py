"""What the library does on another device than the CPU; run by ``test_other_devices``."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from feature_models import mild_images
from pretended import DEVICE
from test_attack_contract import ATTACKS, universal
from test_surrogates import CASES, defense_of, lead
from torch import Tensor, nn
from victims import THREATS, convolutional, examples

import patchproof as pp
from patchproof.attacks import Victim
from patchproof.bounds import BoundedNetwork
from patchproof.models import ModelSpec, build_model
from patchproof.training import (
    AblationRecipe,
    BagCertRecipe,
    ClippedRecipe,
    CropRecipe,
    CutoutRecipe,
    IntervalBoundsRecipe,
    MaskedEvidenceRecipe,
    RankRecipe,
    Recipe,
)
from patchproof.training.recipe import Step

SPEC = {name: ModelSpec(name, 10, 1, (12, 12)) for name in ("ibp-mlp", "ibp-conv2", "ibp-conv4")}

RECIPES: dict[str, tuple[Recipe, str, dict[str, Any]]] = {
    "cutout": (CutoutRecipe(square_sizes=(2, 5)), "tiny-resnet", {}),
    "ablation": (AblationRecipe(ablation=pp.Ablation("column", 4)), "band-resnet", {}),
    "crops": (CropRecipe(crop_size=(5, 5)), "crop-resnet9", {"crop": [5, 5]}),
    "masked evidence": (MaskedEvidenceRecipe(window=(3, 3), masks=2), "bagnet", {}),
    "clipped": (ClippedRecipe(), "bagnet", {}),
    "bagcert": (BagCertRecipe(margin=0.2), "bagnet", {}),
    "trimmed mean": (RankRecipe(statistic="trimmed-mean", trim=3), "bagnet", {}),
}


def test_tensors_of_two_devices_do_not_mix() -> None:
    here, there = torch.zeros(2, 3), torch.zeros(2, 3).to(DEVICE)
    with pytest.raises(RuntimeError, match="is on the CPU"):
        there + here
    with pytest.raises(RuntimeError, match="is indexed from the device"):
        here[there[:, 0] > 0]
    assert (there + 1)[:, torch.tensor([0])].sum().device == DEVICE


@pytest.mark.parametrize("name", CASES)
def test_a_defense_says_what_it_does_on_the_cpu(name: str) -> None:
    here, there = defense_of(name), defense_of(name)
    there.model.load_state_dict(here.model.state_dict())
    there.model.to(DEVICE)
    images = mild_images(3)
    labels = here.predict(images).clamp(min=0)
    expected = vars(here.certify(images, labels))
    for given in (images, images.to(DEVICE)):
        if name != "random crops":  # drawn anew for each prediction
            assert torch.equal(there.predict(given).cpu(), here.predict(images))
        found = vars(there.certify(given, labels.to(given.device)))
        for field, value in expected.items():
            if isinstance(value, Tensor):
                assert torch.equal(found[field].cpu(), value), field
    for aim, surrogate in here.surrogates().items():
        slopes = []
        for scores, device in ((surrogate, "cpu"), (there.surrogates()[aim], DEVICE)):
            scores.redraw(0)
            attacked = images.to(device).requires_grad_()
            (slope,) = torch.autograd.grad(lead(scores(attacked).cpu(), labels).sum(), attacked)
            slopes.append(slope.cpu())
        torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("attack", "threat"),
    [("universal", "square"), *product(ATTACKS, ["square", "two squares", "any four pixels"])],
)
def test_an_attack_finds_what_it_does_on_the_cpu(attack: str, threat: str) -> None:
    tested = ATTACKS[attack] if attack in ATTACKS else universal(THREATS[threat])
    model = convolutional()
    images, labels = examples(4, model)
    victims = Victim.of_model(model), Victim.of_model(copy.deepcopy(model).to(DEVICE))
    here, there = (tested.run(victim, images, labels, threat=THREATS[threat]) for victim in victims)
    assert torch.equal(here.images, there.images.cpu())
    assert torch.equal(here.broken, there.broken.cpu())


@pytest.mark.parametrize("name", RECIPES)
def test_training_steps_are_those_of_the_cpu(name: str) -> None:
    recipe, architecture, options = RECIPES[name]
    spec = ModelSpec(architecture, 3, 1, (12, 12), options)
    torch.manual_seed(0)
    model = build_model(spec).eval()
    images, labels = torch.rand(4, 1, 12, 12), torch.tensor([0, 1, 2, 0])
    drawn = recipe.draw(spec, len(images))
    losses = []
    for net, device in ((model, "cpu"), (copy.deepcopy(model).to(DEVICE), DEVICE)):
        listed = None if drawn is None else drawn.to(device)
        torch.manual_seed(1)
        step = Step(net, None, images.to(device), labels.to(device), listed, 0.5)
        losses.append(recipe.step_loss(step))
        losses[-1].backward()
        right = recipe.validate(net, step.views, step.labels, listed, slice(0, 4))
        assert all(correct.device == step.views.device for correct in right.values())
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)


def networks(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Return a network on the CPU and on the device, images and labels."""
    torch.manual_seed(0)
    model = build_model(SPEC[name]).eval()
    return model, copy.deepcopy(model).to(DEVICE), torch.rand(4, 1, 12, 12), torch.arange(4)


@pytest.mark.parametrize("options", [{}, {"stop": True, "screen": 2}, {"method": "backward"}])
@pytest.mark.parametrize("name", SPEC)
def test_bounds_are_those_of_the_cpu(name: str, options: dict[str, Any]) -> None:
    model, moved, images, labels = networks(name)
    labels = model(images).argmax(1)  # some places hold at least
    regions = pp.SquarePatch(1).regions((12, 12))
    expected, found = (
        BoundedNetwork(net, (1, 12, 12)).lowest_margins(
            images.to(device), labels.to(device), regions, **options
        )
        for net, device in ((model, "cpu"), (moved, DEVICE))
    )
    assert found.device == DEVICE
    assert torch.equal(found.cpu().nan_to_num(), expected.nan_to_num())


POOLED = {"strategy": "all", "pool": (2,)}
STEPS: tuple[dict[str, Any], ...] = (
    {"strategy": "all"},
    {"strategy": "random"},
    {"strategy": "guided"},
    {"threat": pp.SparsePixels(2)},
)


@pytest.mark.parametrize(
    ("name", "options"),
    [*product(SPEC, STEPS), ("ibp-conv2", POOLED), ("ibp-conv4", POOLED)],
)
def test_interval_training_steps_are_those_of_the_cpu(name: str, options: dict[str, Any]) -> None:
    model, moved, images, labels = networks(name)
    recipe = IntervalBoundsRecipe(**{"epochs": 1, "threat": pp.SquarePatch(3), **options})
    guide = recipe.companion(SPEC[name])
    losses = []
    for net, device in ((model, "cpu"), (moved, DEVICE)):
        torch.manual_seed(1)
        companion = None if guide is None else copy.deepcopy(guide).to(device)
        step = Step(net, companion, images.to(device), labels.to(device), None, 0.5)
        losses.append(recipe.step_loss(step))
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for one, other in zip(model.parameters(), moved.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(other.grad.cpu(), one.grad, rtol=1e-3, atol=1e-4)
    certified = recipe.validate(moved, images.to(DEVICE), labels.to(DEVICE), None, slice(0, 4))
    assert certified["certified_accuracy"].device == DEVICE
