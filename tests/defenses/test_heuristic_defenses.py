"""Defenses without a certificate: what they predict, what an attacker gets, saving, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.defenses import HeuristicDefense
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec, build_model
from patchproof.preprocessing import GradientSmoothing, SaliencyMasking

SPEC = ModelSpec("tiny-resnet", 10, 1, (8, 8))
SIZE = (8, 8)
THREAT = pp.SquarePatch(2)
NAMES = ["undefended", "smoothing", "watermarking"]


@pytest.fixture
def model() -> nn.Module:
    """A network that says something else of each image."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)]
    return nn.Sequential(nn.BatchNorm2d(1, affine=False), *layers).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def defend(name: str, model: nn.Module, **shared: Any) -> HeuristicDefense:
    match name:
        case "undefended":
            return pp.Undefended(model, THREAT, image_size=SIZE, **shared)
        case "smoothing":
            own: dict[str, Any] = {"window": 4, "overlap": 1, "threshold": 0.3, "smoothing": 1.5}
            return pp.LocalGradientSmoothing(model, THREAT, image_size=SIZE, **own, **shared)
    own = {"regions": 2, "threshold": 0.2, "opening": 2, "fill": 0.25}
    return pp.DigitalWatermarking(model, THREAT, image_size=SIZE, window=3, **own, **shared)


def test_the_label_is_the_models_of_the_changed_image(model: nn.Module, images: Tensor) -> None:
    smoothed = GradientSmoothing(4, 1, 0.3, 1.5)(images)
    masked = SaliencyMasking(model, 3, 2, 0.2, 2, 0.25)(images)
    for name, seen, forwards in zip(NAMES, (images, smoothed, masked), (1, 1, 2), strict=True):
        found = defend(name, model).infer(images)
        assert torch.equal(found.label, model(seen).argmax(1))
        assert found.case.eq(pp.Case.AGREED).all()
        assert found.forwards.tolist() == [forwards] * len(images)
    assert (model(smoothed).argmax(1) != model(masked).argmax(1)).any()


@pytest.mark.parametrize("name", NAMES)
def test_an_attacker_sees_the_same_labels_and_gradients(
    name: str, model: nn.Module, images: Tensor
) -> None:
    defense = defend(name, model)
    surrogates = defense.surrogates()
    assert list(surrogates) == ["logits"]
    scores = surrogates["logits"]
    assert scores.exact
    pixels = images.clone().requires_grad_()
    logits = scores(pixels)
    assert torch.equal(logits.argmax(1), defense.predict(images))
    (gradient,) = torch.autograd.grad(logits.amax(1).sum(), pixels)
    assert gradient.isfinite().all()
    assert (gradient != 0).flatten(1).any(1).all()


@pytest.mark.parametrize("name", NAMES)
def test_batches_change_nothing(name: str, model: nn.Module, images: Tensor) -> None:
    label = defend(name, model).predict(images)
    assert torch.equal(defend(name, model, batch_size=5).predict(images), label)
    assert torch.equal(defend(name, model, memory_budget=200_000).predict(images), label)
    with torch.inference_mode():
        assert torch.equal(defend(name, model).predict(images), label)
    assert defend(name, model).predict(images[:0]).tolist() == []


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_as_it_was(name: str, tmp_path: Path, images: Tensor) -> None:
    defense = defend(name, build_model(SPEC))
    assert json.loads(json.dumps(defense.to_dict())) == defense.to_dict()
    defense.save(tmp_path / "defense.safetensors", SPEC)
    again = pp.load(tmp_path / "defense.safetensors")
    assert type(again) is type(defense)
    assert again.to_dict() == defense.to_dict()
    assert again.describe() == defense.describe()
    assert torch.equal(again.predict(images), defense.predict(images))


@pytest.mark.parametrize("name", NAMES)
def test_it_certifies_nothing(name: str, model: nn.Module) -> None:
    defense = defend(name, model)
    assert not hasattr(defense, "certify")
    assert not hasattr(defense, "kind")


class Glaring(nn.Module):
    """Says 1 if there are pixels above 0.9, else 0."""

    def forward(self, images: Tensor) -> Tensor:
        glare = 10 * (images - 0.9).relu().sum((1, 2, 3))
        return torch.stack([torch.full_like(glare, 0.5), glare], 1)


def test_watermarking_takes_a_patch_away_and_smoothing_darkens_it() -> None:
    image = torch.full((1, 1, 8, 8), 0.4)
    patched = image.clone()
    patched[..., 3:5, 4:6] = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    model = Glaring().eval()
    assert pp.Undefended(model, THREAT, image_size=SIZE).predict(patched).item() == 1
    watermarking = pp.DigitalWatermarking(model, THREAT, image_size=SIZE)
    assert watermarking.predict(torch.cat([image, patched])).tolist() == [0, 0]
    smoothing = pp.LocalGradientSmoothing(model, THREAT, image_size=SIZE, window=3, overlap=1)
    assert smoothing.predict(torch.cat([image, patched])).tolist() == [0, 0]


def test_watermarking_masks_as_much_as_the_attacker_may_change(model: nn.Module) -> None:
    def made_for(threat: pp.Threat) -> tuple[int, int]:
        defense = pp.DigitalWatermarking(model, threat, image_size=SIZE)
        return defense.window, defense.regions

    assert made_for(pp.SquarePatch(3)) == (3, 1)
    assert made_for(pp.RectanglePatch(2, 5)) == (5, 1)
    assert made_for(pp.MultiplePatches(2, pp.SquarePatch(2))) == (2, 2)
    with pytest.raises(PatchproofError, match="window: expected pixels a side for 4 pixels"):
        made_for(pp.SparsePixels(4))


class NotFinite(nn.Module):
    """Says nothing of bright images."""

    def forward(self, images: Tensor) -> Tensor:
        scores = images.flatten(1)
        return torch.where(scores.mean(1, keepdim=True) > 0.5, torch.nan, scores)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_are_not_finite_say_nothing(name: str) -> None:
    bright = torch.ones(1, 1, 8, 8)
    with pytest.warns(UserWarning, match="not finite"):
        found = defend(name, NotFinite().eval()).infer(bright)
    assert (found.label.item(), found.case.item()) == (0, pp.Case.MAJORITY)


@pytest.mark.parametrize("name", NAMES)
def test_mistakes(name: str, model: nn.Module, images: Tensor) -> None:
    defense = defend(name, model)
    with pytest.raises(PatchproofError, match="expected shape"):
        defense.predict(images[..., :7])
    with pytest.raises(PatchproofError, match=r"pixels in \[0, 1\]"):
        defense.predict(images + 1)
    with pytest.raises(PatchproofError, match=r"at least the .* bytes of one image, got 10"):
        defend(name, model, memory_budget=10).predict(images)
    with pytest.raises(PatchproofError, match="memory_budget: expected bytes >= 1"):
        defend(name, model, memory_budget=0)
    with pytest.raises(PatchproofError, match="batch_size: expected images >= 1"):
        defend(name, model, batch_size=0)
    model.train()
    with pytest.raises(PatchproofError, match="in training mode"):
        defense.predict(images)
    with pytest.raises(PatchproofError, match="in training mode"):
        defend(name, model)


def test_what_does_not_fit_in_the_image(model: nn.Module) -> None:
    with pytest.raises(PatchproofError, match=r"window: expected at most .* 8x8 pixels, got 15"):
        pp.LocalGradientSmoothing(model, THREAT, image_size=SIZE)
    with pytest.raises(PatchproofError, match=r"opening: expected at most .* 8x8 pixels, got 9"):
        pp.DigitalWatermarking(model, THREAT, image_size=SIZE, opening=9)
    with pytest.raises(PatchproofError, match="9x9"):
        pp.Undefended(model, pp.SquarePatch(9), image_size=SIZE)
