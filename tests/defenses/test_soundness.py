"""Certificates under fire: metamorphic properties, hostile models, and attacks on a trained one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.datasets import load_dataset
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec, load_classifier
from patchproof.threat import Box, MaskSet
from patchproof.training import CutoutRecipe, train

SIZE = (9, 12)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30, 4)
    ).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(60, 2, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def labels(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).argmax(1)


class Permuted(nn.Module):
    """Class j of this model is class ``order[j]`` of another."""

    def __init__(self, model: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.model = model
        self.order = order

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)[:, self.order]
        return logits


class Mirrored(nn.Module):
    """Sees images as another model sees them in a mirror."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.flip(3))
        return logits


@pytest.mark.parametrize("inference", ["double", "challenger"])
def test_permuting_the_classes_permutes_labels_and_keeps_certificates(
    model, images, labels, inference
):
    """Class numbers only break ties.

    With one covering mask per axis no region has half of all masks on it, so certificates need no
    vote; double masking's label on uncertified images does where the one-mask vote is tied.
    """
    order = torch.tensor([2, 0, 3, 1])
    options = {"image_size": SIZE, "masks_per_side": 4, "inference": inference}
    plain = pp.PatchCleanser(model, pp.SquarePatch(2), **options)
    permuted = pp.PatchCleanser(Permuted(model, order).eval(), pp.SquarePatch(2), **options)
    result = plain.certify(images, labels, "never")
    other = permuted.certify(images, order.argsort()[labels], "never")
    assert torch.equal(result.verdicts, other.verdicts)
    assert torch.equal(result.certified, other.certified)
    assert torch.equal(result.paper_condition, other.paper_condition)
    assert 0 < result.certified.sum() < len(images)
    hidden = plain.mask_set.masked()
    votes = torch.stack([model(images.masked_fill(m, 0.5)).argmax(1) for m in hidden], 1)
    most = nn.functional.one_hot(votes, 4).sum(1).topk(2, 1).values
    decided = (most[:, 0] > most[:, 1]) | (inference == "challenger")
    assert torch.equal(order[other.prediction][decided], result.prediction[decided])
    assert decided.sum() > result.certified.sum()


@pytest.mark.parametrize("inference", ["double", "challenger"])
@pytest.mark.parametrize("multiplicity", [1, (1, 2)])
def test_mirroring_images_model_and_masks_changes_nothing(
    model, images, labels, inference, multiplicity
):
    threat = pp.RectanglePatch(2, 3)
    masks = MaskSet.for_threat(threat, SIZE, (3, 4), multiplicity)
    boxes = tuple(Box(t, SIZE[1] - left - w, h, w) for ((t, left, h, w),) in masks.masks)
    mirrored_masks = MaskSet(SIZE, boxes, threat)
    options = {"image_size": SIZE, "inference": inference}
    result, mirrored = (
        pp.PatchCleanser(network, threat, mask_set=mask_set, **options).certify(x, labels, "never")
        for network, mask_set, x in (
            (model, masks, images),
            (Mirrored(model).eval(), mirrored_masks, images.flip(3)),
        )
    )
    assert torch.equal(result.prediction, mirrored.prediction)
    assert torch.equal(result.case, mirrored.case)
    assert torch.equal(result.certified, mirrored.certified)
    assert torch.equal(result.paper_condition, mirrored.paper_condition)
    assert torch.allclose(result.vulnerability_map(), mirrored.vulnerability_map().flip(2))
    assert 0 < result.certified.sum() < len(images)


@pytest.mark.parametrize("inference", ["double", "challenger"])
def test_restricting_the_locations_never_loses_certificates(model, images, labels, inference):
    anywhere = pp.SquarePatch(2)
    masks = MaskSet.for_threat(anywhere, SIZE, 3)
    results = [
        pp.PatchCleanser(
            model, threat, image_size=SIZE, mask_set=masks, inference=inference
        ).certify(images, labels)
        for threat in (
            anywhere,
            pp.SquarePatch(2, locations=Box(0, 0, 9, 7)),
            pp.SquarePatch(2, locations=Box(0, 0, 4, 4)),
        )
    ]
    for wider, narrower in pairwise(results):
        assert not (wider.certified & ~narrower.certified).any()
        assert torch.equal(wider.paper_condition, narrower.paper_condition)
    assert results[2].certified.sum() > results[0].certified.sum()


@pytest.mark.parametrize("inference", ["double", "challenger"])
def test_batch_size_and_threads_change_no_verdict(model, images, labels, inference):
    results = []
    threads = torch.get_num_threads()
    try:
        for count, batch_size in ((1, 1), (1, 5), (1, 64), (2, 64)):
            torch.set_num_threads(count)
            defense = pp.PatchCleanser(
                model,
                pp.SquarePatch(2),
                image_size=SIZE,
                masks_per_side=3,
                inference=inference,
                batch_size=batch_size,
            )
            results.append(defense.certify(images[:10], labels[:10], "never"))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result.verdicts, results[0].verdicts)
        assert torch.equal(result.certified, results[0].certified)
        assert torch.equal(result.paper_condition, results[0].paper_condition)
        assert torch.equal(result.prediction, results[0].prediction)


class Lookup(nn.Module):
    """A table of labels drawn at random; a pixel counts as 0, 1 (from 0.5, as masks) or 2 (at 1).

    So the contents 0, 0.5 and 1 stand for all contents.
    """

    def __init__(self, pixels: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randint(3, (3**pixels,), generator=generator)
        self.table[torch.rand(3**pixels, generator=generator) < 0.75] = 1
        self.weights = 3 ** torch.arange(pixels)

    def forward(self, images: Tensor) -> Tensor:
        keys = ((images.flatten(1) * 2).long() * self.weights).sum(1)
        return nn.functional.one_hot(self.table[keys], 3).float()


@pytest.mark.parametrize("inference", ["double", "challenger"])
def test_masks_of_higher_multiplicity_certify_more_than_the_paper_and_no_patch_breaks_it(
    inference,
):
    size, threat = (1, 6), pp.RectanglePatch(1, 2)
    contents = torch.tensor(list(product([0.0, 0.5, 1.0], repeat=2)))
    beyond_paper = broken = broken_uncertified = 0
    for seed in range(8):
        defense = pp.PatchCleanser(
            Lookup(6, seed).eval(),
            threat,
            image_size=size,
            masks_per_side=(1, 4),
            multiplicity=(1, 2),
            inference=inference,
        )
        images = torch.tensor(list(product([0.0, 1.0], repeat=6))).view(-1, 1, *size)
        result = defense.certify(images, torch.ones(64, dtype=torch.int64))
        assert not (result.paper_condition & ~result.certified).any()
        beyond_paper += int((result.certified & ~result.paper_condition).sum())
        patched = images[:, None, None].repeat(1, 5, 9, 1, 1, 1)
        for left in range(5):
            patched[:, left, :, 0, 0, left : left + 2] = contents
        wrong = (defense.predict(patched.flatten(0, 2)) != 1).view(64, -1).any(1)
        broken += int((wrong & result.certified).sum())
        broken_uncertified += int((wrong & ~result.certified & (result.prediction == 1)).sum())
    assert broken == 0
    assert beyond_paper > 10
    assert broken_uncertified > 10


class Recorded(nn.Module):
    """Remembers the batches that another model is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.batches: list[list[bytes]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append([image.numpy().tobytes() for image in images])
        scores: Tensor = self.model(images)
        return scores


@pytest.mark.parametrize("inference", ["double", "challenger"])
def test_no_view_is_evaluated_twice_and_batches_are_full(model, images, labels, inference):
    recorded = Recorded(model).eval()
    defense = pp.PatchCleanser(
        recorded,
        pp.SquarePatch(2),
        image_size=SIZE,
        masks_per_side=3,
        multiplicity=(1, 2),
        inference=inference,
        batch_size=16,
    )
    defense.predict(images[:1])  # the first call asks for one more view, to count the classes
    for run in (defense.infer, lambda x: defense.certify(x, labels)):
        recorded.batches.clear()
        forwards = run(images).forwards
        seen = Counter(view for batch in recorded.batches for view in batch)
        assert max(seen.values()) == 1
        assert seen.total() == forwards.sum()
        assert max(map(len, recorded.batches)) == 16
        full = [len(batch) == 16 for batch in recorded.batches]
        assert all(full[: 3 * len(full) // 4])  # there are images left to start on


class Extreme(nn.Module):
    """Scores of either sign whose difference overflows to infinity."""

    def forward(self, images: Tensor) -> Tensor:
        score = torch.where(images.flatten(1).mean(1) > 0.4, 3e38, -3e38)
        return torch.stack([score, -score], 1)


def test_scores_near_the_largest_float_end():
    defense = pp.PatchCleanser(
        Extreme().eval(), pp.SquarePatch(1), image_size=(4, 4), masks_per_side=3
    )
    images = torch.zeros(2, 1, 4, 4)
    images[0, :, :2], images[1] = 0.75, 1.0
    result = defense.certify(images, torch.zeros(2, dtype=torch.int64), "never")
    assert result.certified.tolist() == [False, True]
    assert torch.equal(defense.predict(images), result.prediction)


class Twin(nn.Module):
    """Two large scores, equal but for the order in which they are summed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(1, 64, 3, padding=1)
        self.weights = nn.Parameter(1e3 * torch.rand(64 * 64))

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images).flatten(1)
        return torch.stack([features @ self.weights, features.flip(1) @ self.weights.flip(0)], 1)


def test_rounding_of_large_scores_is_no_margin():
    """With an absolute tolerance alone some of these are certified, and break in other batches."""
    images = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = Twin().eval()
    defense = pp.PatchCleanser(model, pp.SquarePatch(2), image_size=(8, 8), masks_per_side=2)
    scores = model(images)
    assert (scores[:, 0] - scores[:, 1]).abs().max() > 10 * defense.tolerance
    assert not defense.certify(images, defense.predict(images)).certified.any()


def test_a_model_that_scores_images_by_their_batch_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten()).eval()
    with pytest.raises(PatchproofError, match="'0' that normalises by the statistics of the batch"):
        pp.PatchCleanser(model, pp.SquarePatch(1), image_size=(4, 4))


class InPlace(nn.Module):
    """Normalises its input in place."""

    def forward(self, images: Tensor) -> Tensor:
        score = images.sub_(0.5).mul_(4).flatten(1).sum(1)
        return torch.stack([score, -score], 1)


def test_a_model_that_changes_its_input_changes_no_other_view():
    """Measuring the memory of a forward pass once normalised the first image of each call."""
    images = torch.full((2, 1, 4, 4), 0.55)
    plain, measured = (
        pp.PatchCleanser(
            InPlace().eval(),
            pp.SquarePatch(1),
            image_size=(4, 4),
            masks_per_side=3,
            memory_budget=budget,
        ).certify(images, torch.zeros(2, dtype=torch.int64))
        for budget in (None, 10**9)
    )
    assert measured.certified.tolist() == [True, True]
    assert torch.equal(measured.smallest_margin, plain.smallest_margin)


def test_another_number_of_classes_needs_a_new_defense(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 9 * 12, 3)).eval()
    defense = pp.PatchCleanser(model, pp.SquarePatch(2), image_size=SIZE)
    defense.predict(images[:2])
    model[1] = nn.Linear(2 * 9 * 12, 5).eval()
    with pytest.raises(PatchproofError, match="expected 3 classes as before, got 5"):
        defense.predict(images[:2])


def test_new_weights_give_new_results(model, images):
    """Nothing that a model once said is kept."""
    scores = nn.Sequential(nn.Flatten(), nn.Linear(2 * 9 * 12, 4)).eval()
    defense = pp.PatchCleanser(scores, pp.SquarePatch(2), image_size=SIZE, masks_per_side=2)
    before = defense.predict(images)
    with torch.no_grad():
        scores[1].weight.neg_()
        scores[1].bias.neg_()
    fresh = pp.PatchCleanser(scores, pp.SquarePatch(2), image_size=SIZE, masks_per_side=2)
    assert torch.equal(defense.predict(images), fresh.predict(images))
    assert not torch.equal(defense.predict(images), before)


@pytest.mark.parametrize("inference", ["double", "challenger"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_single_pixel_is_always_hidden(inference, channels):
    scores = nn.Sequential(nn.Flatten(), nn.Linear(channels, 3)).eval()
    defense = pp.PatchCleanser(
        scores, pp.SquarePatch(1), image_size=(1, 1), masks_per_side=1, inference=inference
    )
    images = torch.rand(5, channels, 1, 1, generator=torch.Generator().manual_seed(0))
    constant = scores(torch.full((1, channels, 1, 1), 0.5)).argmax().item()
    result = defense.certify(images, torch.tensor([0, 1, 2, 0, 1]))
    assert (result.prediction == constant).all()
    assert torch.equal(result.certified, torch.tensor([0, 1, 2, 0, 1]) == constant)


@dataclass
class Victim:
    """A network trained for the defense, the defense, and test digits that it gets right."""

    model: nn.Module
    defense: pp.PatchCleanser
    images: Tensor
    labels: Tensor
    certified: Tensor


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    out = tmp_path_factory.mktemp("digits") / "run"
    recipe = CutoutRecipe(
        square_sizes=(2, 3),
        epochs=16,
        batch_size=64,
        learning_rate=0.2,
        shift=0,
        precision="32-true",
    )
    spec = ModelSpec("tiny-resnet", 10, 1, (8, 8), {"widths": [16, 32]})
    splits = (load_dataset("digits", split) for split in ("train", "validation"))
    train(recipe, spec, *splits, out, device="cpu")
    model, _ = load_classifier(out / "model.safetensors")
    pixels, labels = load_dataset("digits", "test").tensors()
    images = pixels / 255
    defense = pp.PatchCleanser(model, pp.SquarePatch(2), image_size=(8, 8), masks_per_side=4)
    result = defense.certify(images, labels)
    right = (result.prediction == labels) & (model(images).argmax(1) == labels)
    return Victim(model, defense, images[right], labels[right], result.certified[right])


RANDOM_CONTENTS = 4
GRADIENT_STEPS = 4
VIEWS_PER_STEP = 6


def patched_everywhere(victim: Victim, image: Tensor, label: Tensor, seed: int) -> Tensor:
    """Return one image with hostile 2x2 patches at every region, (A, 1, 8, 8).

    All 16 contents of 0 and 1, random ones, and one from a gradient attack at each region.
    """
    generator = torch.Generator().manual_seed(seed)
    regions = victim.defense.regions
    inside = torch.zeros(len(regions), 1, 8, 8, dtype=torch.bool)
    for index in range(len(regions)):
        top, left, height, width = regions.box(index)
        inside[index, :, top : top + height, left : left + width] = True
    clean = image.expand(len(regions), -1, -1, -1)
    extreme = torch.tensor(list(product([0.0, 1.0], repeat=4)))
    attacked = []
    for contents in (
        *extreme.expand(len(regions), -1, -1).unbind(1),
        *torch.rand(RANDOM_CONTENTS, len(regions), 4, generator=generator),
        follow_gradients(victim, image, label, inside, generator),
    ):
        attacked.append(clean.masked_scatter(inside, contents))
    return torch.cat(attacked)


def follow_gradients(
    victim: Victim, image: Tensor, label: Tensor, inside: Tensor, generator: torch.Generator
) -> Tensor:
    """Look for contents, (R, 4), with which the masked views that show the patch turn wrong.

    All are pushed to one wrong label, the runner-up, so that rows of two-mask labels agree on it.
    """
    hidden, corruption = victim.defense.views.hidden.pixels(), victim.defense.corruption
    shown = corruption.patterns[corruption.region_to_pattern].float()
    runner_up = victim.model(image[None])[0].topk(2).indices
    target = runner_up[runner_up != label][0]
    contents = torch.rand(len(inside), 4, generator=generator)
    for step in range(GRADIENT_STEPS):
        contents.requires_grad_(True)
        patched = image.expand(len(inside), -1, -1, -1).masked_scatter(inside, contents)
        view = shown.multinomial(VIEWS_PER_STEP, generator=generator)
        views = patched[:, None].masked_fill(hidden[view][:, :, None], 0.5).flatten(0, 1)
        logits = victim.model(views)
        (gradient,) = torch.autograd.grad((logits[:, target] - logits[:, label]).sum(), contents)
        with torch.no_grad():
            contents = (contents + 0.5 / (1 + step) * gradient.sign()).clamp(0.0, 1.0)
    return contents


def count_broken(victim: Victim, chosen: Tensor) -> tuple[int, int]:
    """Attack some images; return how many broke undefended, and how many defended."""
    undefended = defended = 0
    for index in chosen.tolist():
        image, label = victim.images[index], victim.labels[index]
        attacked = patched_everywhere(victim, image, label, seed=index)
        assert ((attacked != image).flatten(1).sum(1) <= 4).all()
        with torch.no_grad():
            undefended += int((victim.model(attacked).argmax(1) != label).any())
        defended += int((victim.defense.predict(attacked) != label).any())
    return undefended, defended


def test_no_attack_breaks_a_certified_digit(victim):
    assert victim.certified.float().mean() > 0.25
    # the least sure first: the smallest margin of the undefended model
    highest = victim.model(victim.images).topk(2, 1).values
    order = (highest[:, 0] - highest[:, 1]).argsort()
    chosen = order[victim.certified[order]][:10]
    undefended, defended = count_broken(victim, chosen)
    assert defended == 0
    assert undefended >= 6


def test_the_same_attack_breaks_digits_that_are_not_certified(victim):
    undefended, defended = count_broken(victim, (~victim.certified).nonzero()[:4, 0])
    assert undefended >= 2
    assert defended >= 1
