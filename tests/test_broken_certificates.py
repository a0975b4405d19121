"""The search for broken certificates: every defense, on trained networks and real images.

Each certified image is attacked by somebody who knows the defense. One that breaks is the worst bug
that this project can have. That the attacks are worth the name is shown on images without a
certificate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import patchproof as pp
from patchproof.attacks import LaVAN, PatchAttack, PatchPGD, PlaceSearch, SquareSearch, Victim
from patchproof.defenses import NamedDefense
from patchproof.evaluation.store import CERTIFIED
from patchproof.models import load_classifier
from patchproof.threat import Threat

ROOT = Path(__file__).parent.parent
LABELS = {
    "mnist": (3, 0, 7, 7, 3, 1, 8, 6, 5, 7, 6, 9, 3, 6, 5, 8, 4, 9, 3, 2, 3, 9, 7, 0),
    "cifar10": (7, 2, 6, 8, 9, 6, 8, 9, 3, 2, 6, 3, 3, 9, 4, 7),
}
"""Of the images in ``tests/images``: test images of the data sets, eight in a row."""


@dataclass(frozen=True)
class Case:
    """A defense of a trained network.

    Attributes:
        defense: the class.
        weights: of the network, a file of the zoo whose name begins with that of the data.
        options: of the defense.
        threat: what the attacker may do.
    """

    defense: Any
    weights: str
    options: dict[str, Any] = field(default_factory=dict)
    threat: Threat = field(default_factory=lambda: pp.SquarePatch(5))

    def __str__(self) -> str:
        return " ".join([self.defense.__name__, self.weights, *map(str, self.options.values())])


CASES = (
    Case(pp.PatchCleanser, "mnist-greedy", {"masks_per_side": 4}),
    Case(pp.PatchCleanser, "mnist-greedy", {"masks_per_side": 4, "inference": "challenger"}),
    Case(
        pp.PatchCleanser,
        "mnist-cutout",
        {"masks_per_side": 4},
        pp.MultiplePatches(2, pp.SquarePatch(2)),
    ),
    Case(pp.MinorityReports, "mnist-greedy", {"masks_per_side": 4, "tau": 0.6}),
    Case(pp.PatchGuard, "cifar10-bagnet7-masked2"),
    Case(pp.PatchGuard, "cifar10-bagnet7-masked2", {"threshold": 0.3}),
    Case(pp.PatchGuard, "mnist-band4"),
    Case(pp.PatchGuardPlusPlus, "cifar10-bagnet7-masked2", {"tau": 0.4}),
    Case(pp.ClippedBagNet, "cifar10-bagnet7-clipped", {}, pp.SquarePatch(2)),
    Case(pp.DerandomizedSmoothing, "mnist-band4"),
    Case(pp.DerandomizedSmoothing, "mnist-band4", {"vote_threshold": None}),
    Case(pp.BagCert, "cifar10-bagnet7-bagcert"),
    Case(pp.BagCert, "cifar10-bagnet7-masked2", {"feature": "confidence"}),
    Case(pp.RobustStatistics, "cifar10-bagnet7-masked2", {"statistic": "median"}),
    Case(pp.RobustStatistics, "cifar10-bagnet7-masked2", {"statistic": "trimmed-mean"}),
    Case(
        pp.RobustStatistics,
        "cifar10-bagnet7-masked2",
        {"statistic": "top-masking"},
        pp.SquarePatch(2),
    ),
    Case(pp.RandomizedCropping, "mnist-crops7", {"mode": "all-crops"}, pp.SquarePatch(2)),
    Case(pp.RandomizedCropping, "mnist-crops7", {"mode": "fixed-crops"}, pp.SquarePatch(2)),
    Case(pp.IntervalBoundPropagation, "mnist-ibp-mlp-5x5-guided10"),
    Case(pp.IntervalBoundPropagation, "mnist-ibp-mlp-5x5-random10", {"method": "backward"}),
    Case(pp.IntervalBoundPropagation, "mnist-ibp-conv2-5x5-random10"),
    Case(
        pp.IntervalBoundPropagation,
        "mnist-ibp-mlp-sparse4-by-weights",
        {},
        pp.SparsePixels(4),
    ),
    Case(
        pp.IntervalBoundPropagation,
        "mnist-ibp-mlp-2x2-all",
        {},
        pp.StencilPatch.line(4, degrees=45),
    ),
)


def images_of(data: str) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) in [0, 1] and their labels."""
    sheet = np.asarray(Image.open(ROOT / f"tests/images/{data}-test.png"))
    side, count = sheet.shape[1] // 8, len(LABELS[data])
    tiles = sheet.reshape(count // 8, side, 8, side, -1).transpose(0, 2, 4, 1, 3)
    pixels = torch.from_numpy(tiles.reshape(count, -1, side, side).copy())
    return pixels.float() / 255, torch.tensor(LABELS[data])


def build(case: Case) -> tuple[NamedDefense, Tensor, Tensor]:
    """Return the defense, and the images with their labels."""
    model, _ = load_classifier(ROOT / f"zoo/{case.weights}.safetensors")
    images, labels = images_of(case.weights.partition("-")[0])
    size = (images.shape[2], images.shape[3])
    return case.defense(model, case.threat, image_size=size, **case.options), images, labels


def test_every_named_defense_is_searched() -> None:
    assert {case.defense for case in CASES} == set(get_args(NamedDefense))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_attack_breaks_a_certificate(case: Case) -> None:
    defense, images, labels = build(case)
    certificates = defense.certify(images, labels)
    certified: Tensor = getattr(certificates, CERTIFIED[certificates.kind])
    assert certified.any(), "there is nothing to break"
    chosen = certified.nonzero().squeeze(1)[:4]
    attacks: tuple[PatchAttack, ...] = (
        PatchPGD(places=PlaceSearch("gradient", count=2), steps=8, step_size=0.25),
        PatchPGD(
            places=PlaceSearch("trial", count=2, stride=9),
            steps=8,
            step_size=0.25,
            start="black-white",
            loss="cross-entropy",
        ),
        SquareSearch(places=PlaceSearch("random", count=1), steps=10),
    )
    for attack in attacks:
        result = attack.run(
            Victim.of_defense(defense), images[chosen], labels[chosen], threat=case.threat
        )
        assert (result.tries > 0).all()
        assert not result.broken.any()


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.weights in ("cifar10-bagnet7-masked2", "mnist-greedy")
        or (case.defense is pp.IntervalBoundPropagation and case.weights != "mnist-ibp-mlp-2x2-all")
    ],
    ids=str,
)
def test_the_attacks_break_what_is_not_certified(case: Case) -> None:
    defense, images, labels = build(case)
    certificates = defense.certify(images, labels)
    certified: Tensor = getattr(certificates, CERTIFIED[certificates.kind])
    chosen = (~certified & (certificates.prediction == labels)).nonzero().squeeze(1)[:8]
    assert len(chosen)
    attack = LaVAN if case.weights == "mnist-ibp-conv2-5x5-random10" else PatchPGD
    result = attack(places=PlaceSearch("gradient", count=3), steps=20).run(
        Victim.of_defense(defense), images[chosen], labels[chosen], threat=case.threat
    )
    assert result.broken.any()
