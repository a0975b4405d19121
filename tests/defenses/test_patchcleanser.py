from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.errors import PatchproofError, RunError

LOGIT_GAP = 1.0


class Lookup(nn.Module):
    """Any function of small binary images: a table of labels drawn at random, by pixel values.

    Pixels are 0 or 1, hidden ones 0.5, so that the model can tell them apart.
    """

    def __init__(self, pixels: int, classes: int, seed: int, clean: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randint(classes, (3**pixels,), generator=generator)
        usual = torch.rand(3**pixels, generator=generator) < clean
        self.table[usual] = 1
        self.weights = 3 ** torch.arange(pixels)
        self.classes = classes
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        keys = ((images.flatten(1) * 2).long() * self.weights).sum(1)
        return nn.functional.one_hot(self.table[keys], self.classes) * LOGIT_GAP


def all_patched(image, threat):
    """List the image with every content of the patch at every region."""
    regions = threat.regions(tuple(image.shape[1:]))
    patched = []
    for index in range(len(regions)):
        top, left, height, width = regions.box(index)
        for content in product([0.0, 1.0], repeat=height * width):
            other = image.clone()
            other[0, top : top + height, left : left + width] = torch.tensor(content).view(
                height, width
            )
            patched.append(other)
    return torch.stack(patched)


@pytest.mark.parametrize("inference", ["double", "challenger"])
@pytest.mark.parametrize(
    ("size", "threat", "budget", "multiplicity"),
    [
        ((1, 7), pp.RectanglePatch(1, 2), (1, 3), 1),
        ((1, 7), pp.RectanglePatch(1, 1), (1, 4), (1, 2)),
        ((2, 4), pp.RectanglePatch(1, 2), 2, 1),
        ((3, 3), pp.SquarePatch(2, locations="corners"), 2, 1),
    ],
)
def test_no_patch_breaks_a_certificate(size, threat, budget, multiplicity, inference):
    """Every content at every place, through the deployed ``predict``."""
    pixels = size[0] * size[1]
    certified = broken = images_seen = 0
    for seed in range(12):
        model = Lookup(pixels, 3, seed, clean=0.9)
        defense = pp.PatchCleanser(
            model,
            threat,
            image_size=size,
            masks_per_side=budget,
            multiplicity=multiplicity,
            inference=inference,
        )
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(2, (8, 1, *size), generator=generator).float()
        labels = torch.ones(8, dtype=torch.int64)
        result = defense.certify(images, labels)
        assert torch.equal(result.prediction, defense.predict(images))
        assert not (result.paper_condition & ~result.certified).any()
        full = defense.certify(images, labels, stop="never")
        assert torch.equal(full.certified, result.certified)
        for image, holds in zip(images, result.certified, strict=True):
            images_seen += 1
            if holds:
                certified += 1
                broken += int((defense.predict(all_patched(image, threat)) != 1).sum())
    assert broken == 0
    assert 0 < certified < images_seen


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    ).eval()


@pytest.fixture
def images():
    return torch.rand(20, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def plain_certify(model, defense, image, label):
    """Two-mask correctness one pair of masks at a time, over all ordered pairs."""
    masked = defense.mask_set.masked()
    hidden = torch.stack([a | b for a in masked for b in masked])
    return bool((model(image.masked_fill(hidden[:, None], 0.5)).argmax(1) == label).all())


@pytest.mark.parametrize("inference", ["double", "challenger"])
def test_the_result_is_that_of_the_plain_algorithm_at_any_batch_size(
    small_model, images, inference
):
    labels = small_model(images).argmax(1)
    results = []
    for batch_size in (1, 7, 64):
        defense = pp.PatchCleanser(
            small_model,
            pp.SquarePatch(2),
            image_size=(12, 12),
            masks_per_side=4,
            inference=inference,
            batch_size=batch_size,
        )
        result = defense.certify(images, labels)
        prediction = defense.infer(images)
        assert torch.equal(prediction.label, result.prediction)
        assert torch.equal(prediction.case, result.case)
        assert (result.forwards <= 136).all()
        assert (result.forwards[result.certified] <= 136).all()
        results.append(result)
    for result in results[1:]:
        assert torch.equal(result.certified, results[0].certified)
        assert torch.equal(result.prediction, results[0].prediction)
        assert torch.equal(result.paper_condition, results[0].paper_condition)
    plain = [
        plain_certify(small_model, defense, *pair) for pair in zip(images, labels, strict=True)
    ]
    assert results[0].paper_condition.tolist() == plain
    assert 0 < sum(plain) < len(plain)


def test_a_larger_patch_never_certifies_more_with_the_same_masks(small_model, images):
    labels = small_model(images).argmax(1)
    masks = pp.MaskSet.for_threat(pp.SquarePatch(3), (12, 12), 4)
    certified = [
        pp.PatchCleanser(
            small_model, pp.SquarePatch(side), image_size=(12, 12), mask_set=masks
        ).certify(images, labels, "never")
        for side in (1, 2, 3)
    ]
    for smaller, larger in pairwise(certified):
        assert not (larger.certified & ~smaller.certified).any()


def test_the_vulnerability_map_is_the_share_of_lost_regions_at_each_pixel(small_model, images):
    labels = small_model(images).argmax(1)
    threat = pp.SquarePatch(3)
    defense = pp.PatchCleanser(small_model, threat, image_size=(12, 12), masks_per_side=3)
    result = defense.certify(images, labels, "never")
    assert not (result.verdicts == pp.Verdict.UNKNOWN).any()
    lost = result.region_verdicts() != pp.Verdict.HOLDS
    expected, count = torch.zeros(len(images), 12, 12), torch.zeros(12, 12)
    for index in range(len(result.regions)):
        top, left, height, width = result.regions.box(index)
        expected[:, top : top + height, left : left + width] += lost[:, index, None, None]
        count[top : top + height, left : left + width] += 1
    assert torch.allclose(result.vulnerability_map(), expected / count)
    assert torch.equal(result.vulnerability_map().flatten(1).amax(1) == 0, result.certified)


class NotANumber(nn.Module):
    """Scores class 1, but NaN where the last pixel is hidden."""

    def forward(self, images: Tensor) -> Tensor:
        scores = torch.tensor([0.0, 1.0, 0.0]).repeat(len(images), 1)
        scores[images[:, 0, -1, -1] == 0.5] = torch.nan
        return scores


def test_views_that_are_not_finite_are_never_returned_and_count_as_corrupted():
    defense = pp.PatchCleanser(
        NotANumber().eval(), pp.SquarePatch(1), image_size=(4, 4), masks_per_side=2
    )
    image = torch.zeros(1, 1, 4, 4)
    with pytest.warns(UserWarning, match="not finite"):
        result = defense.certify(image, torch.tensor([1]), "never")
    assert result.prediction.tolist() == [1]
    assert not result.certified
    assert not result.paper_condition
    with pytest.warns(UserWarning, match="not finite"):
        assert defense.predict(image).tolist() == [1]


class Hungry(nn.Module):
    """Runs out of memory for batches above a size."""

    def __init__(self, model: nn.Module, largest: int) -> None:
        super().__init__()
        self.model = model
        self.largest = largest

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.largest:
            raise torch.OutOfMemoryError("no memory")
        scores: Tensor = self.model(images)
        return scores


def test_running_out_of_memory_halves_the_batch(small_model, images):
    threat = pp.SquarePatch(2)
    labels = small_model(images).argmax(1)
    plain = pp.PatchCleanser(small_model, threat, image_size=(12, 12), masks_per_side=3)
    hungry = pp.PatchCleanser(
        Hungry(small_model, 5).eval(), threat, image_size=(12, 12), masks_per_side=3, batch_size=32
    )
    with pytest.warns(UserWarning, match="halved"):
        result = hungry.certify(images, labels)
    assert hungry.batch_size == 4
    assert torch.equal(result.certified, plain.certify(images, labels).certified)
    starved = pp.PatchCleanser(Hungry(small_model, 0).eval(), threat, image_size=(12, 12))
    with pytest.raises(RunError, match="single image"):
        starved.predict(images)


def test_a_memory_budget_bounds_the_batch(small_model, images):
    batches = []
    small_model.register_forward_hook(lambda _, inputs, output: batches.append(len(inputs[0])))
    needed = 2 * 4 * (3 * 12 * 12 + 8 * 6 * 6)  # the convolution's input and output, doubled
    for budget, largest in ((3 * needed, 3), (100 * needed, 100)):
        batches.clear()
        pp.PatchCleanser(
            small_model,
            pp.SquarePatch(2),
            image_size=(12, 12),
            memory_budget=budget,
            batch_size=256,
        ).predict(images)
        assert max(batches) == largest
    with pytest.raises(PatchproofError, match=f"at least the {needed:,} bytes"):
        pp.PatchCleanser(
            small_model, pp.SquarePatch(2), image_size=(12, 12), memory_budget=9
        ).predict(images)


def test_tuning_keeps_a_measured_batch_size(small_model, images):
    defense = pp.PatchCleanser(small_model, pp.SquarePatch(2), image_size=(12, 12))
    assert defense.tune_batch_size(images[0]) == defense.batch_size >= 8
    assert defense.tune_batch_size(images[0], 1) <= defense.views.count


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("fitting", "best"), [(5, 4), (20, 16)])
def test_tuning_keeps_to_what_fits_into_memory(small_model, images, fitting, best):
    hungry = Hungry(small_model, fitting).eval()
    defense = pp.PatchCleanser(hungry, pp.SquarePatch(2), image_size=(12, 12))
    assert defense.tune_batch_size(images[0]) <= best
    defense.predict(images)  # no warning: no batch runs out of memory


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 12, 11), r"shape \(N, channels, 12, 12\), got \(2, 3, 12, 11\)"),
        (torch.rand(3, 12, 12), r"got \(3, 12, 12\)"),
        (torch.rand(2, 3, 12, 12).double(), "float32 tensor, got torch.float64"),
        (torch.zeros(2, 3, 12, 12, dtype=torch.uint8), "got torch.uint8"),
        (255 * torch.ones(2, 3, 12, 12), r"pixels in \[0, 1\], got values from 255"),
        (torch.full((2, 3, 12, 12), torch.nan), "got values from nan"),
        ([[1.0]], "got list"),
    ],
)
def test_bad_images(small_model, images, message):
    defense = pp.PatchCleanser(small_model, pp.SquarePatch(2), image_size=(12, 12))
    with pytest.raises(PatchproofError, match=message):
        defense.predict(images)
    with pytest.raises(PatchproofError, match=message):
        defense.certify(images, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), "expected 0 to 3, got 4"),
        (torch.tensor([-1, 0]), "expected 0 to 3, got -1"),
        (torch.tensor([0]), r"expected shape \(2,\), got \(1,\)"),
        (torch.tensor([0.0, 1.0]), "integer tensor, got torch.float32"),
        ([0, 1], "got list"),
    ],
)
def test_bad_labels(small_model, images, labels, message):
    defense = pp.PatchCleanser(small_model, pp.SquarePatch(2), image_size=(12, 12))
    with pytest.raises(PatchproofError, match=message):
        defense.certify(images[:2], labels)


def test_a_model_in_training_mode_is_refused_now_and_later(small_model, images):
    defense = pp.PatchCleanser(small_model, pp.SquarePatch(2), image_size=(12, 12))
    small_model[1].train()
    with pytest.raises(PatchproofError, match="layer '1' in training mode"):
        defense.certify(images, torch.zeros(20, dtype=torch.int64))
    with pytest.raises(PatchproofError, match="training mode"):
        pp.PatchCleanser(small_model, pp.SquarePatch(2), image_size=(12, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inference": "triple"}, "'double' or 'challenger', got 'triple'"),
        ({"fill": 1.5}, "fill: expected a pixel value"),
        ({"tolerance": -1.0}, "tolerance: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"memory_budget": 0}, "memory_budget: expected"),
        ({"masks_per_side": 0}, "masks_per_side: expected"),
        ({"image_size": (1, 12)}, "no larger than the 1x12 image, got 2x2"),
        ({"image_size": 12}, "image_size: expected"),
    ],
)
def test_bad_options(small_model, options, message):
    with pytest.raises(PatchproofError, match=message):
        pp.PatchCleanser(small_model, pp.SquarePatch(2), **{"image_size": (12, 12), **options})


def test_no_images_and_a_bad_stop_are_refused(small_model, images):
    defense = pp.PatchCleanser(small_model, pp.SquarePatch(2), image_size=(12, 12))
    assert defense.predict(images[:0]).shape == (0,)
    with pytest.raises(PatchproofError, match="at least one, got none"):
        defense.certify(images[:0], torch.zeros(0, dtype=torch.int64))
    with pytest.raises(PatchproofError, match="stop: expected"):
        defense.certify(images, torch.zeros(20, dtype=torch.int64), stop="soon")


def test_a_model_without_two_logits_per_image_is_refused(images):
    defense = pp.PatchCleanser(nn.Identity().eval(), pp.SquarePatch(2), image_size=(12, 12))
    with pytest.raises(PatchproofError, match=r"logits of shape \(1, classes >= 2\)"):
        defense.predict(images)
