"""Both ways: attacks of the Adversarial Robustness Toolbox here, and these attacks there."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.attacks import PatchPGD, PlaceSearch, SquareSearch, Victim

pytest.importorskip("art", reason="needs the extra dev")

from art.attacks.evasion import AdversarialPatchPyTorch, HopSkipJump
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier

SIDE, PATCH = 12, 4
AT = (5, 1)
"""Row and column of the first pixel of the foreign patches."""


class BrighterHalf(nn.Module):
    """Says which half of an image is the brighter, 0 left and 1 right."""

    def forward(self, images: Tensor) -> Tensor:
        left, right = images.flatten(0, 1).mean(1).chunk(2, 1)
        return torch.stack([left.sum(1), right.sum(1)], 1)


@cache
def setting() -> tuple[nn.Module, pp.PatchCleanser, Tensor, Tensor]:
    """Return a model, its defense, images from little to much contrast, and right labels."""
    model = BrighterHalf().eval()
    defense = pp.PatchCleanser(
        model, pp.SquarePatch(PATCH), image_size=(SIDE, SIDE), masks_per_side=4
    )
    images = 0.2 * torch.rand(16, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(16) % 2
    contrast = torch.linspace(0.05, 0.75, 16)
    for image, label, more in zip(images, labels.tolist(), contrast, strict=True):
        image[:, :, label * SIDE // 2 :][:, :, : SIDE // 2] += more
    return model, defense, images, labels


def inside() -> Tensor:
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[:, AT[0] : AT[0] + PATCH, AT[1] : AT[1] + PATCH] = True
    return mask


def classifier(module: nn.Module) -> Any:
    return PyTorchClassifier(
        module, nn.CrossEntropyLoss(), (1, SIDE, SIDE), 2, clip_values=(0, 1), device_type="cpu"
    )


def foreign_patch(module: nn.Module, label: int) -> Tensor:
    """Return the images of a label with the one patch that the toolbox trains for them."""
    _, _, images, labels = setting()
    of_label = images[labels == label].numpy()
    attack = AdversarialPatchPyTorch(
        classifier(module),
        rotation_max=0.0,
        scale_min=0.99,
        scale_max=1.0,
        learning_rate=0.2,
        max_iter=8,
        patch_shape=(1, PATCH, PATCH),
        patch_location=(AT[1], AT[0]),
        patch_type="square",
        optimizer="pgd",
        targeted=False,
        verbose=False,
    )
    patch, _ = attack.generate(of_label, labels[labels == label].numpy())
    attacked = images[labels == label].clone()
    attacked[:, :, AT[0] : AT[0] + PATCH, AT[1] : AT[1] + PATCH] = torch.from_numpy(patch)
    return attacked


@pytest.mark.parametrize("aim", ["majority", "two-mask-disagreement"])
def test_a_foreign_patch_attacks_a_defense_as_a_module(aim: str) -> None:
    model, defense, images, labels = setting()
    certified = defense.certify(images, labels).certified
    plain = defended = 0
    for label in (0, 1):
        of_label = labels == label
        plain += int((model(foreign_patch(model, label)).argmax(1) != label).sum())
        held = defense.predict(foreign_patch(defense.surrogates()[aim], label)) == label
        assert held[certified[of_label]].all()
        defended += int((~held).sum())
    assert 0 < certified.sum() < len(images)
    assert min(plain, defended) > 0


def test_a_foreign_attack_asks_a_defense_for_labels() -> None:
    model, defense, images, labels = setting()
    certified = defense.certify(images, labels).certified
    mask = inside().expand(len(images), -1, -1, -1).numpy().astype(np.float32)

    def broken(victim: Victim) -> Tensor:
        def predict(given: np.ndarray[Any, np.dtype[np.float32]]) -> Any:
            found = victim.predict(torch.from_numpy(given).float().clamp(0, 1))
            return np.eye(2, dtype=np.float32)[found.numpy()]

        np.random.seed(0)
        attack = HopSkipJump(
            BlackBoxClassifier(predict, (1, SIDE, SIDE), 2, clip_values=(0, 1)),
            max_iter=1,
            max_eval=20,
            init_eval=5,
            init_size=20,
            verbose=False,
        )
        attacked = torch.from_numpy(attack.generate(images.numpy(), mask=mask)).float().clamp(0, 1)
        attacked = torch.where(inside(), attacked, images)
        return victim.predict(attacked) != labels

    assert broken(Victim.of_model(model)).any()
    assert not (broken(Victim.of_defense(defense)) & certified).any()


def test_these_attacks_take_a_foreign_estimator() -> None:
    """Of the toolbox: its module for gradients, and its ``predict`` for labels."""
    model, _, images, labels = setting()
    estimator = classifier(model)

    def predict(given: Tensor) -> Tensor:
        return torch.from_numpy(estimator.predict(given.numpy()).argmax(1))

    threat = pp.SquarePatch(PATCH)
    white = PatchPGD(steps=20).run(
        Victim(predict, {"logits": estimator.model}), images, labels, threat=threat
    )
    black = SquareSearch(places=PlaceSearch("random"), steps=40).run(
        Victim(predict), images, labels, threat=threat
    )
    for result in (white, black):
        assert torch.equal(result.prediction, predict(result.images))
        assert torch.equal(result.broken, result.prediction != labels)
    assert white.broken.sum() >= black.broken.sum() > 0
