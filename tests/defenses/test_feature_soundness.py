"""Certificates of the defenses over features under fire: no attack may change a certified label."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from feature_models import SIZE, Hostile, HostileBands, mild_images
from torch import Tensor, nn
from torch.nn import functional

import patchproof as pp
from patchproof.datasets import load_dataset
from patchproof.defenses import FeatureDefense
from patchproof.models import ModelSpec, build_model
from patchproof.models.ablation import Kept

Make = Callable[..., FeatureDefense]

LOCAL: dict[str, tuple[Make, dict[str, Any]]] = {
    "robust masking": (pp.PatchGuard, {}),
    "robust masking of confidences": (pp.PatchGuard, {"feature": "confidence"}),
    "robust masking of predictions": (pp.PatchGuard, {"feature": "prediction"}),
    "robust masking, T = 0.2": (pp.PatchGuard, {"threshold": 0.2, "high": 60.0}),
    "robust masking, T = 0.5, larger windows": (
        pp.PatchGuard,
        {"threshold": 0.5, "high": 40.0, "window": 5},
    ),
    "window vote": (pp.PatchGuardPlusPlus, {"tau": 0.5}),
    "clipped sum": (pp.ClippedBagNet, {}),
    "votes": (pp.BagCert, {}),
    "votes of confidences": (pp.BagCert, {"feature": "confidence"}),
    "confident votes": (pp.DerandomizedSmoothing, {"vote_threshold": 0.4}),
    "median": (pp.RobustStatistics, {"statistic": "median"}),
    "trimmed mean": (pp.RobustStatistics, {"statistic": "trimmed-mean"}),
    "top masking": (pp.RobustStatistics, {"statistic": "top-masking"}),
}


def kept(defense: FeatureDefense, images: Tensor, labels: Tensor) -> Tensor:
    """Return for which images the defense keeps its promise, (N,) bool."""
    said = defense.predict(images)
    return (said == labels) | ((said == pp.ALERT) & (defense.kind == "detection"))


def certified(defense: FeatureDefense, images: Tensor, labels: Tensor) -> Tensor:
    result = defense.certify(images, labels)
    if isinstance(result, pp.DetectionCertification):
        return result.certified_detection
    return result.certified


def region_pixels(defense: FeatureDefense) -> Tensor:
    """Return the pixels of every patch region, (R, 1, H, W) bool."""
    regions = defense.regions
    each = torch.eye(len(regions))
    return regions.accumulate(each)[:, None] > 0


def attacked(images: Tensor, pixels: Tensor, count: int, seed: int) -> Tensor:
    """Return every image with ``count`` contents at every region, (N, R, count, 1, H, W).

    Contents: black, white, and random ones of different strength around the middle.
    """
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(len(images), len(pixels), count, 1, 1, 1, generator=generator) ** 2
    noise = torch.randn(len(images), len(pixels), count, 1, *SIZE, generator=generator).sign()
    noise *= torch.rand(noise.shape, generator=generator)
    contents = 0.5 + 0.5 * noise * strength.sqrt()
    contents[:, :, 0], contents[:, :, 1] = 0.0, 1.0
    return torch.where(pixels[None, :, None], contents, images[:, None, None])


def broken(
    defense: FeatureDefense, images: Tensor, labels: Tensor, count: int, seed: int = 0
) -> Tensor:
    """Return which images some content at some region changes, (N,) bool."""
    tries = attacked(images, region_pixels(defense), count, seed)
    each = labels[:, None, None].expand(tries.shape[:3])
    return ~kept(defense, tries.flatten(0, 2), each.flatten()).view(len(images), -1).all(1)


def attack_both(defense: FeatureDefense, images: Tensor, some: int, count: int) -> tuple[int, int]:
    """Attack some certified and some other images; return how many of each are broken."""
    labels = defense.predict(images).clamp(min=0)
    holds = certified(defense, images, labels)
    assert 0 < holds.sum() < len(images), "the test needs images of both kinds"
    found = [
        int(broken(defense, images[chosen], labels[chosen], count).sum())
        for chosen in (which.nonzero().squeeze(1)[:some] for which in (holds, ~holds))
    ]
    return found[0], found[1]


@pytest.mark.parametrize("name", LOCAL)
def test_no_content_changes_what_is_certified(name: str) -> None:
    make, options = LOCAL[name]
    gain = 200.0 if make is pp.ClippedBagNet else 10.0
    defense = make(Hostile(1, gain=gain).eval(), pp.SquarePatch(2), image_size=SIZE, **options)
    wrong, others = attack_both(defense, mild_images(50, 1), some=6, count=8)
    assert wrong == 0
    assert others, "the attack must be able to win"


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("seed", range(1, 4))
def test_no_content_changes_what_is_certified_at_strides(name: str, seed: int) -> None:
    make, options = LOCAL[name]
    options = options | ({"window": 3} if "window" in options else {})
    gain = 200.0 if make is pp.ClippedBagNet else 10.0
    model = Hostile(seed, stride=2, gain=gain).eval()
    defense = make(model, pp.RectanglePatch(1, 2), image_size=SIZE, **options)
    wrong, _ = attack_both(defense, mild_images(80, seed), some=8, count=20)
    assert wrong == 0


BANDS: dict[str, tuple[Make, dict[str, Any]]] = {
    "votes": (pp.DerandomizedSmoothing, {"vote_threshold": None}),
    "confident votes": (pp.DerandomizedSmoothing, {"vote_threshold": 0.4}),
    "robust masking": (pp.PatchGuard, {}),
    "robust masking, T = 0.3": (pp.PatchGuard, {"threshold": 0.3}),
    "window vote": (pp.PatchGuardPlusPlus, {"tau": 0.4}),
    "median": (pp.RobustStatistics, {"statistic": "median"}),
    "top masking": (pp.RobustStatistics, {"statistic": "top-masking"}),
}


@pytest.mark.parametrize("name", BANDS)
def test_no_content_changes_what_is_certified_of_bands(name: str) -> None:
    make, options = BANDS[name]
    ablation = pp.Ablation("column", 2)
    defense = make(HostileBands(ablation).eval(), pp.SquarePatch(2), image_size=SIZE, **options)
    wrong, others = attack_both(defense, mild_images(40), some=4, count=4)
    assert wrong == 0
    assert others, "the attack must be able to win"


@pytest.mark.parametrize(
    ("statistic", "bands"), [("top-masking", 1), ("median", 1), ("votes", 1), ("votes", 2)]
)
def test_no_two_patches_change_what_is_certified(statistic: str, bands: int) -> None:
    """Two patches anywhere: without windows, and with views of one band or of two."""
    ablation = pp.Ablation("column", 1)
    model = HostileBands(ablation).eval()
    threat = pp.MultiplePatches(2, pp.RectanglePatch(2, 1))
    if statistic == "votes":
        defense: FeatureDefense = pp.DerandomizedSmoothing(
            model, threat, image_size=SIZE, vote_threshold=None, bands=bands
        )
    else:
        defense = pp.RobustStatistics(model, threat, image_size=SIZE, statistic=statistic)
    images = mild_images(60)
    labels = defense.predict(images)
    holds = certified(defense, images, labels)
    assert 0 < holds.sum() < len(images)
    one = region_pixels(defense)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(len(one), (300, 2), generator=generator)
    pixels = one[pairs[:, 0]] | one[pairs[:, 1]]
    changed = []
    for sure in (True, False):
        some = (holds == sure).nonzero().squeeze(1)[:5]
        tries = attacked(images[some], pixels, 2, 0)
        each = labels[some][:, None, None].expand(tries.shape[:3])
        changed.append(int((~kept(defense, tries.flatten(0, 2), each.flatten())).sum()))
    assert changed[0] == 0
    assert changed[1] > 0


def trained(spec: ModelSpec, views: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """Return a network after a few steps on zeros and ones, every view of which is to be right.

    Args:
        spec: the network.
        views: from the network and images to the scores of K views, (N, K, classes).
    """
    torch.manual_seed(0)
    images, labels = pictures("train")
    model = build_model(spec).train()
    steps = 40
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (32,))
        scores = views(model, images[batch])
        wanted = labels[batch][:, None].expand(scores.shape[:2])
        loss = functional.cross_entropy(scores.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def pictures(split: str) -> tuple[Tensor, Tensor]:
    """Return up to 100 zeros and ones of the digits, and which they are."""
    digits = load_dataset("digits", split)
    chosen = (digits.labels < 2).nonzero().squeeze(1).tolist()[:100]
    return torch.stack([digits.image(index) for index in chosen]), digits.labels[chosen]


def local_views(model: nn.Module, images: Tensor) -> Tensor:
    local = cast(Callable[[Tensor], Tensor], model.local_logits)
    return local(images).flatten(2).transpose(1, 2)


def band_views(model: nn.Module, images: Tensor) -> Tensor:
    """Return the scores of all bands of two columns."""
    corners = pp.Ablation("column", 2).corners(SIZE)
    kept = Kept(corners.repeat(len(images), 1)[:, None], (8, 2))
    ablated = cast(Callable[..., Tensor], model.ablated)
    return ablated(images.repeat_interleave(len(corners), 0), kept).unflatten(0, (len(images), -1))


@pytest.fixture(scope="module")
def bagnet() -> nn.Module:
    options = {"receptive_field": 3, "stride": 1, "widths": [8, 12, 16], "depth": 0}
    return trained(ModelSpec("bagnet", 2, 1, SIZE, options), local_views)


@pytest.fixture(scope="module")
def band_network() -> nn.Module:
    options = {"size": 2, "widths": [6, 8]}
    return trained(ModelSpec("band-resnet", 2, 1, SIZE, options), band_views)


def gradient_attack(
    views: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, pixels: Tensor
) -> Tensor:
    """Return every image with a patch at every region that lowers the label's mean score.

    Args:
        views: from images to the scores of all their views, (N, V, classes).
        images: (N, 1, H, W).
        labels: (N,).
        pixels: (R, 1, H, W) bool.
    """
    start = torch.where(pixels, 0.5, images[:, None]).flatten(0, 1)
    where = pixels.expand(len(images), -1, -1, -1, -1).flatten(0, 1)
    label = labels.repeat_interleave(len(pixels))
    tries = start
    for step in (0.5, 0.25, 0.25, 0.1):
        tries = tries.detach().requires_grad_()
        confidence = views(tries).softmax(2).mean(1)
        (gradient,) = torch.autograd.grad(confidence.gather(1, label[:, None]).sum(), tries)
        tries = torch.where(where, (tries - step * gradient.sign()).clamp(0, 1), tries)
    return tries.detach()


TRAINED = {name: case for name, case in LOCAL.items() if case[0] is not pp.ClippedBagNet}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_gradients_break_no_certificate_of_a_trained_bagnet(name: str, bagnet: nn.Module) -> None:
    make, options = TRAINED[name]
    defense = make(bagnet, pp.SquarePatch(1), image_size=SIZE, **options)
    attack_digits(defense, partial(local_views, bagnet))


@pytest.mark.slow
@pytest.mark.parametrize("name", BANDS)
def test_gradients_break_no_certificate_of_a_trained_band_network(
    name: str, band_network: nn.Module
) -> None:
    make, options = BANDS[name]
    defense = make(band_network, pp.SquarePatch(1), image_size=SIZE, **options)
    attack_digits(defense, partial(band_views, band_network))


def attack_digits(defense: FeatureDefense, views: Callable[[Tensor], Tensor]) -> None:
    images, labels = pictures("test")
    holds = certified(defense, images, labels)
    some = holds.nonzero().squeeze(1)[:4]
    assert len(some) == 4, "the network is too weak for the test"
    images, labels = images[some], labels[some]
    assert not broken(defense, images, labels, 3).any()
    pixels = region_pixels(defense)
    tries = gradient_attack(views, images, labels, pixels)
    assert kept(defense, tries, labels.repeat_interleave(len(pixels))).all()
