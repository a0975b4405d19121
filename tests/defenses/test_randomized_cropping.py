"""Randomized cropping: every content of every patch over the deployed prediction, and its draws."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.defenses.randomized_cropping import CropLabels
from patchproof.models.crops import CropResNet9, cut

SIZE = (5, 4)
LARGE = (7, 6)
CROP = (2, 2)
CLASSES = 3


class Lookup(nn.Module):
    """Classifies black and white 2x2 crops by a table: any function of their pixels."""

    def __init__(self, seed: int, share: float = 0.7) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        label = torch.randint(CLASSES, (16,), generator=generator)
        label[torch.rand(16, generator=generator) < share] = 1
        self.register_buffer("label", label)
        self.eval()

    def forward(self, crops: Tensor) -> Tensor:
        bits = (crops.flatten(1) > 0.5).long()
        table = self.get_buffer("label")[bits @ torch.tensor([8, 4, 2, 1])]
        return 10.0 * nn.functional.one_hot(table, CLASSES)


def black_and_white(count: int, seed: int, size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (count, 1, *size), generator=generator).float()


def attacks(images: Tensor, regions: pp.Regions) -> Tensor:
    """Return every image with every black and white content of every region, (N, A, 1, H, W)."""
    found = []
    for inside in regions.accumulate(torch.eye(len(regions))) > 0:
        for content in product([0.0, 1.0], repeat=int(inside.sum())):
            changed = images.clone()
            changed[:, 0, inside] = torch.tensor(content)
            found.append(changed)
    return torch.stack(found, 1)


DETERMINISTIC: dict[str, dict[str, Any]] = {
    "all": {"mode": "all-crops"},
    "fixed": {"mode": "fixed-crops", "crops": 15, "seed": 3},
    "fixed, many": {"mode": "fixed-crops", "crops": 50, "seed": 1},
    "fixed, without replacement": {
        "mode": "fixed-crops",
        "crops": 16,
        "replacement": False,
        "seed": 2,
    },
}
THREATS: dict[str, pp.Threat] = {
    "1x1": pp.SquarePatch(1),
    "2x1": pp.RectanglePatch(2, 1),
    "diagonal": pp.StencilPatch([[1, 0], [0, 1]]),
    "two corners": pp.MultiplePatches(2, pp.SquarePatch(1, "corners")),
}


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("mode", DETERMINISTIC)
def test_no_content_of_any_patch_changes_a_certified_label(mode: str, threat: str) -> None:
    certified = 0
    patch = THREATS[threat]
    for seed in range(4):
        defense = pp.RandomizedCropping(
            Lookup(seed, 0.85), patch, image_size=LARGE, crop_size=CROP, **DETERMINISTIC[mode]
        )
        images = black_and_white(10, seed, LARGE)
        labels = torch.ones(10, dtype=torch.int64)
        result = defense.certify(images, labels)
        assert isinstance(result, pp.Certification)
        regions = patch.regions(LARGE)
        if patch.patches == 2:
            regions = regions.unions(torch.combinations(torch.arange(len(regions))))
        attacked = attacks(images, regions)
        said = defense.predict(attacked.flatten(0, 1)).view(attacked.shape[:2])
        kept = (said == labels[:, None]).all(1)
        assert not (result.certified & ~kept).any()
        assert torch.equal(result.prediction, defense.predict(images))
        certified += int(result.certified.sum())
    assert certified > 3


@pytest.mark.parametrize("replacement", [True, False])
def test_a_random_draw_is_right_as_often_as_stated_whatever_the_patch_shows(
    replacement: bool,
) -> None:
    """The exact chance of every draw, for every content at every region, against the bound."""
    number = 3
    attacked_images = certified = 0
    for seed in range(3):
        model = Lookup(seed)
        defense = pp.RandomizedCropping(
            model,
            pp.SquarePatch(1),
            image_size=SIZE,
            crop_size=CROP,
            mode="random-crops",
            crops=number,
            replacement=replacement,
            probability=0.3,
        )
        images = black_and_white(12, seed)
        labels = torch.ones(12, dtype=torch.int64)
        result = defense.certify(images, labels)
        assert isinstance(result, pp.ProbableCertification)
        attacked = attacks(images, defense.regions)
        for index in range(len(images)):
            every = torch.arange(defense.places.count).expand(attacked.shape[1], -1)
            votes = defense.crop_labels(attacked[index], every).labels  # (A, V)
            draws = torch.tensor(
                [
                    draw
                    for draw in product(range(defense.places.count), repeat=number)
                    if replacement or len(set(draw)) == number
                ]
            )
            drawn = votes[:, draws]  # (A, draws, n)
            counts = nn.functional.one_hot(drawn, CLASSES).sum(2)
            right = (counts.argmax(2) == 1).double().mean(1)  # the deployed rule, ties included
            assert float(result.success_probability[index]) <= float(right.min()) + 1e-12
            attacked_images += 1
        certified += int(result.certified_with_probability.sum())
    assert attacked_images == 36
    assert certified > 3


def test_fresh_draws_are_right_as_often_as_stated() -> None:
    """The deployed prediction itself, many times, on attacked images."""
    defense = pp.RandomizedCropping(
        Lookup(1, share=0.7),
        pp.SquarePatch(1),
        image_size=SIZE,
        crop_size=CROP,
        mode="random-crops",
        crops=9,
    )
    images = black_and_white(6, 1)
    result = defense.certify(images, torch.ones(6, dtype=torch.int64))
    assert isinstance(result, pp.ProbableCertification)
    attacked = attacks(images, defense.regions)
    times = 300
    for index, stated in enumerate(result.success_probability.tolist()):
        every = torch.arange(defense.places.count).expand(attacked.shape[1], -1)
        votes = defense.crop_labels(attacked[index], every).labels
        worst = attacked[index, int((votes == 1).sum(1).argmin())]
        right = defense.predict(worst.expand(times, -1, -1, -1)) == 1
        slack = 4 * (stated * (1 - stated) / times) ** 0.5
        assert float(right.double().mean()) >= stated - slack
    often = images.repeat(20, 1, 1, 1)
    defense.crops = 1
    first = defense.predict(often).view(20, -1)
    assert (first != first[0]).any()  # every prediction draws anew
    seeded = []
    for _ in range(2):
        defense.generator = np.random.default_rng(5)
        seeded.append(defense.predict(often))
    assert torch.equal(*seeded)


def test_vote_shares_from_samples_hold_with_their_confidence() -> None:
    """Of many certificates, at most the share that the confidence leaves states too much."""
    threat = pp.SquarePatch(1)
    shared: dict[str, Any] = {
        "image_size": SIZE,
        "crop_size": CROP,
        "mode": "random-crops",
        "crops": 9,
        "probability": 0.5,
    }
    images = black_and_white(20, 4)
    labels = torch.ones(20, dtype=torch.int64)
    model = Lookup(2, share=0.9)
    known = pp.RandomizedCropping(model, threat, **shared).certify(images, labels)
    assert isinstance(known, pp.ProbableCertification)
    too_much = stated = 0
    for seed in range(30):
        sampled = pp.RandomizedCropping(
            model, threat, samples=400, confidence=0.8, seed=seed, **shared
        ).certify(images, labels)
        assert isinstance(sampled, pp.ProbableCertification)
        # What is known of all votes is the least that the worst case of the samples may state.
        too_much += int((sampled.clean_probability > known.clean_probability + 1e-9).sum())
        stated += int((sampled.success_probability > 0).sum())
    assert too_much / (30 * 20) <= 0.2
    assert stated > 100


def test_ties_of_random_draws_count_against_the_label() -> None:
    defense = pp.RandomizedCropping(
        Lookup(0),
        pp.SquarePatch(1),
        image_size=SIZE,
        crop_size=CROP,
        mode="random-crops",
        crops=2,
    )
    half = torch.tensor([[0] * 6 + [1] * 6])
    found = CropLabels(half, torch.full(half.shape, 9.0), torch.tensor([12]), 2)
    draw = torch.zeros(1, 2, dtype=torch.int64)
    result = defense.certify_votes(found, torch.tensor([0]), draw)
    assert isinstance(result, pp.ProbableCertification)
    # Right only if both crops vote for it: 1/4. The two ties, which `predict` wins, do not count.
    assert float(result.clean_probability[0]) == pytest.approx(0.25)


@pytest.mark.parametrize("mode", ["all-crops", "fixed-crops", "random-crops"])
def test_batches_and_copies_on_disk_change_nothing(mode: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    spec = small_spec()
    model = CropResNet9(CLASSES, 1, (12, 10), crop=(5, 4), widths=(4, 6, 6, 8)).eval()
    model.get_parameter("positions.weight").data.normal_()
    defense = pp.RandomizedCropping(
        model, pp.SquarePatch(2), image_size=(12, 10), mode=mode, crops=31, tolerance=1e-5
    )
    images = torch.rand(7, 1, 12, 10)
    labels = torch.arange(7) % CLASSES
    result = defense.certify(images, labels)
    path = tmp_path / "crops.safetensors"
    defense.save(path, spec)
    again = pp.load(path)
    assert isinstance(again, pp.RandomizedCropping)
    again.batch_size, again.memory_budget = 13, 2**20
    other = again.certify(images.flip(0), labels.flip(0))
    assert torch.equal(other.prediction.flip(0), result.prediction)
    assert torch.equal(other.verdicts.flip(0), result.verdicts)
    assert (
        result.forwards
        == (len(defense.fixed.unique()) if mode == "fixed-crops" else defense.places.count)
    ).all()
    assert result.vulnerability_map().shape == (7, 12, 10)


def small_spec() -> Any:
    from patchproof.models import ModelSpec

    return ModelSpec("crop-resnet9", CLASSES, 1, (12, 10), {"crop": [5, 4], "widths": [4, 6, 6, 8]})


def test_the_network_is_told_where_the_crop_is() -> None:
    model = CropResNet9(2, 1, (6, 6), crop=3, widths=(4, 4, 4, 4)).eval()
    image = torch.full((1, 1, 6, 6), 0.5)
    corners = torch.tensor([[0, 0], [3, 3]])
    both = torch.zeros(2, dtype=torch.int64)
    same = model.cropped(image, both, corners)
    assert torch.allclose(same[0], same[1])
    with torch.no_grad():
        model.get_parameter("positions.weight")[:, :3, :3] = 50.0
    moved = model.positions(image).detach() - image
    assert float(moved.abs().max()) == pytest.approx(0.1)
    told = model.cropped(image, both, corners)
    assert torch.allclose(told[1], same[1])
    assert not torch.allclose(told[0], same[0])


@pytest.mark.parametrize("mode", ["all-crops", "fixed-crops", "random-crops"])
def test_scores_that_are_not_finite_vote_for_no_class_and_are_never_certified(mode: Any) -> None:
    class Broken(nn.Module):
        def forward(self, crops: Tensor) -> Tensor:
            return torch.full((len(crops), 3), torch.nan)

    defense = pp.RandomizedCropping(
        Broken().eval(), pp.SquarePatch(1), image_size=SIZE, crop_size=CROP, mode=mode, crops=5
    )
    with pytest.warns(UserWarning, match="not finite"):
        result = defense.certify(black_and_white(2, 0), torch.zeros(2, dtype=torch.int64))
    assert (result.verdicts == pp.Verdict.LOST).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "some-crops"}, "mode: expected 'all-crops' or"),
        ({"crop_size": 6}, "crop_size: expected"),
        ({"mode": "fixed-crops", "crops": 0}, "crops: expected a number from 1 to"),
        (
            {"mode": "fixed-crops", "crops": 13, "replacement": False},
            "from 1 to 12 places, without",
        ),
        ({"mode": "random-crops", "probability": 1.0}, "probability: expected a number in"),
        ({"mode": "random-crops", "samples": 9, "confidence": 0}, "confidence: expected"),
        ({"mode": "fixed-crops", "samples": 9}, "samples: expected with mode 'random-crops'"),
        ({"threat": pp.SparsePixels(2)}, "whose places can be listed"),
        ({"mode": "fixed-crops", "seed": -1}, "seed: expected a whole number"),
        ({"memory_budget": 0}, "memory_budget: expected"),
    ],
)
def test_bad_arguments_say_what_was_expected(options: dict[str, Any], message: str) -> None:
    given = {"threat": pp.SquarePatch(1), "image_size": SIZE, "crop_size": CROP} | options
    with pytest.raises(pp.PatchproofError, match=message):
        pp.RandomizedCropping(Lookup(0), **given)


def test_a_network_for_other_crops_is_refused() -> None:
    model = CropResNet9(2, 1, (6, 6), crop=3, widths=(4, 4, 4, 4)).eval()
    with pytest.raises(pp.PatchproofError, match="which the model was made for"):
        pp.RandomizedCropping(model, pp.SquarePatch(1), image_size=(6, 6), crop_size=4)
    assert (
        prod(pp.RandomizedCropping(model, pp.SquarePatch(1), image_size=(6, 6)).places.grid) == 16
    )


class Whole(nn.Module):
    """Looks at the whole image, whatever the crop; with NaN as nothing, if it is ``lenient``."""

    crop_size = CROP

    def __init__(self, lenient: bool) -> None:
        super().__init__()
        self.lenient = lenient
        self.eval()

    def cropped(self, images: Tensor, image: Tensor, corners: Tensor) -> Tensor:
        if self.lenient:
            images = images.nan_to_num()
        images = (images - images.amin()) / (images.amax() - images.amin())
        bright = images.mean((1, 2, 3))[image]
        return torch.stack([bright, 1 - bright], 1)


class InPlace(Lookup):
    """Changes the images that it is given."""

    crop_size = CROP

    def cropped(self, images: Tensor, image: Tensor, corners: Tensor) -> Tensor:
        logits = self(cut(images, image, corners, CROP))
        images.sub_(1.0)
        return logits


@pytest.mark.parametrize("lenient", [True, False])
def test_a_model_that_sees_more_than_the_crop_is_refused(lenient: bool) -> None:
    images = black_and_white(2, 0)
    defense = pp.RandomizedCropping(InPlace(0), pp.SquarePatch(1), image_size=SIZE)
    defense.predict(images)
    defense.model = Whole(lenient)
    with pytest.raises(pp.PatchproofError, match="its pixels alone"):
        defense.certify(images, torch.zeros(2, dtype=torch.int64))


def test_a_model_that_changes_its_input_changes_nothing_else() -> None:
    images = black_and_white(3, 0)
    before = images.clone()
    labels = torch.ones(3, dtype=torch.int64)
    whole, parts = (
        pp.RandomizedCropping(InPlace(0), pp.SquarePatch(1), image_size=SIZE, batch_size=size)
        for size in (64, 5)
    )
    assert torch.equal(whole.predict(images), parts.predict(images))
    assert torch.equal(
        whole.certify(images, labels).verdicts, parts.certify(images, labels).verdicts
    )
    assert torch.equal(images, before)


def test_no_image_and_images_with_gradients_are_no_special_case() -> None:
    defense = pp.RandomizedCropping(
        Lookup(0), pp.SquarePatch(1), image_size=SIZE, crop_size=CROP, mode="random-crops", crops=3
    )
    assert defense.predict(black_and_white(0, 0)).shape == (0,)
    images = black_and_white(2, 0)
    labels = torch.ones(2, dtype=torch.int64)
    first = defense.certify(images, labels)
    assert torch.equal(defense.certify(images.requires_grad_(), labels).verdicts, first.verdicts)


def test_another_number_of_crops_states_another_probability() -> None:
    """What is kept between calls belongs to the settings that it was made for."""
    shared: dict[str, Any] = {"image_size": SIZE, "crop_size": CROP, "mode": "random-crops"}
    images = black_and_white(5, 1)
    labels = torch.ones(5, dtype=torch.int64)
    changed = pp.RandomizedCropping(Lookup(1), pp.SquarePatch(1), crops=64, **shared)
    changed.certify(images, labels)
    changed.crops, changed.seed = 3, 7
    fresh = pp.RandomizedCropping(Lookup(1), pp.SquarePatch(1), crops=3, seed=7, **shared)
    for first, second in zip(
        changed.certify_stream(zip(range(5), images, labels.tolist(), strict=True)),
        fresh.certify_stream(zip(range(5), images, labels.tolist(), strict=True)),
        strict=True,
    ):
        assert isinstance(first[1], pp.ProbableCertification)
        assert isinstance(second[1], pp.ProbableCertification)
        assert torch.equal(first[1].success_probability, second[1].success_probability)
        assert torch.equal(first[1].prediction, second[1].prediction)


def test_the_least_number_of_crops_certifies_and_others_are_told_one_by_one() -> None:
    defense = pp.RandomizedCropping(
        Lookup(1, 0.9),
        pp.SquarePatch(1),
        image_size=LARGE,
        crop_size=CROP,
        mode="random-crops",
        probability=0.9,
    )
    images = black_and_white(8, 2, LARGE)
    labels = torch.ones(8, dtype=torch.int64)
    every = torch.arange(defense.places.count).expand(8, -1)
    found = defense.crop_labels(images, every)
    numbers = [1, 2, 9, 33, 64]
    success = defense.success_by_number(found, labels, numbers)
    needed = defense.crops_needed(found, labels, numbers)
    for image, number in enumerate(needed.tolist()):
        enough = [n for n, s in zip(numbers, success[:, image].tolist(), strict=True) if s >= 0.9]
        assert number == min(enough, default=0)
        defense.crops = number or 64
        result = defense.certify(images[[image]], labels[[image]])
        assert isinstance(result, pp.ProbableCertification)
        assert bool(result.certified_with_probability) == bool(enough)
    assert (needed > 0).any()
