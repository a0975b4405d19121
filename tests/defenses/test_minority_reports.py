"""Minority Reports as a whole: real patches through ``predict``, one pass for every tau."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec, build_model
from patchproof.results import Verdict


class Lookup(nn.Module):
    """A table of scores drawn at random; a pixel counts as 0, 1 (from 0.5, as masks) or 2 (at 1).

    So the contents 0, 0.5 and 1 stand for all contents. Usually class 1 leads by some gap.
    """

    def __init__(self, pixels: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = 3 * torch.rand(3**pixels, 3, generator=generator)
        usual = torch.rand(3**pixels, generator=generator) < 0.8
        self.table[usual, 1] += 4 * torch.rand(int(usual.sum()), generator=generator)
        self.weights = 3 ** torch.arange(pixels)

    def forward(self, images: Tensor) -> Tensor:
        return self.table[((images.flatten(1) * 2).long() * self.weights).sum(1)]


def all_patched(image: Tensor, threat: pp.Threat) -> Tensor:
    """List the image with every content of the patch at every region."""
    regions = threat.regions((image.shape[1], image.shape[2]))
    patched = []
    for index in range(len(regions)):
        top, left, height, width = regions.box(index)
        for content in product([0.0, 0.5, 1.0], repeat=height * width):
            other = image.clone()
            other[0, top : top + height, left : left + width] = torch.tensor(content).view(
                height, width
            )
            patched.append(other)
    return torch.stack(patched)


@pytest.mark.parametrize("tau", [0.5, 0.6, 0.75])
@pytest.mark.parametrize(
    ("size", "threat", "budget", "multiplicity"),
    [
        ((1, 7), pp.RectanglePatch(1, 2), (1, 3), 1),
        ((1, 7), pp.RectanglePatch(1, 1), (1, 4), (1, 2)),
        ((2, 4), pp.RectanglePatch(1, 2), 2, 1),
        ((3, 3), pp.RectanglePatch(2, 1, locations="corners"), 2, 1),
    ],
)
def test_no_patch_goes_unnoticed_where_detection_is_certified(
    size, threat, budget, multiplicity, tau
):
    """Every content at every place, through the deployed ``predict``."""
    certified = fooled = fooled_uncertified = images_seen = 0
    for seed in range(8):
        defense = pp.MinorityReports(
            Lookup(size[0] * size[1], seed).eval(),
            threat,
            image_size=size,
            tau=tau,
            masks_per_side=budget,
            multiplicity=multiplicity,
        )
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(2, (8, 1, *size), generator=generator).float()
        result = defense.certify(images, torch.ones(8, dtype=torch.int64))
        assert torch.equal(result.prediction, defense.predict(images))
        assert torch.equal(
            result.certified_detection,
            (result.verdicts == Verdict.HOLDS).all(1) & (result.prediction == 1),
        )
        for image, holds in zip(images, result.certified_detection, strict=True):
            label = defense.predict(all_patched(image, threat))
            wrong = int(((label != 1) & (label != pp.ALERT)).sum())
            images_seen += 1
            certified += int(holds)
            fooled += wrong * int(holds)
            fooled_uncertified += wrong * int(not holds)
    assert fooled == 0
    assert 0 < certified < images_seen
    assert fooled_uncertified > 0


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4), Scaled(30.0)
    ).eval()


class Scaled(nn.Module):
    """Makes a network surer of itself."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, scores: Tensor) -> Tensor:
        return self.scale * scores


@pytest.fixture
def images() -> Tensor:
    return torch.rand(60, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels(model: nn.Module, images: Tensor) -> Tensor:
    """Return the right labels: the model's, but for every eighth."""
    labels = model(images).argmax(1)
    labels[::8] = (labels[::8] + 1) % 4
    return labels


def reports(model: nn.Module, **options: object) -> pp.MinorityReports:
    settings = {"image_size": (12, 12), "masks_per_side": 3} | options
    return pp.MinorityReports(model, settings.pop("threat", pp.SquarePatch(2)), **settings)


def test_one_pass_tells_what_certifying_at_every_tau_gives(model, images, labels):
    once = reports(model, tau=0.5)
    curve = once.trade_off(images, labels)
    middles = (curve.tau[1:] + curve.tau[:-1]) / 2
    taus = torch.cat([curve.tau, middles]).sort().values[::11]
    counted = once.trade_off(images, labels, taus)
    assert len(curve.tau) > 40
    for place, tau in enumerate(taus.tolist()):
        result = reports(model, tau=tau).certify(images, labels)
        assert counted.clean[place] == (result.prediction == labels).sum()
        assert counted.certified_detection[place] == result.certified_detection.sum()
        assert counted.alert[place] == (result.prediction == pp.ALERT).sum()
    assert curve.clean[0] < curve.clean[-1], "a higher tau alerts less"
    assert curve.certified_detection.max() > curve.certified_detection[-1] == 0


def test_results_are_those_of_the_plain_algorithm_at_any_batch_size(model, images, labels):
    tau = 0.6
    masked = pp.MaskSet.for_threat(pp.SquarePatch(2), (12, 12), 3).masked()
    probabilities = torch.stack(
        [model(images.masked_fill(mask, 0.5)).softmax(1) for mask in masked], 1
    )
    confidence, label = probabilities.max(2)
    unmasked = model(images).argmax(1)
    alert = ((label != unmasked[:, None]) & (confidence >= tau)).any(1)
    plain = torch.where(alert, pp.ALERT, unmasked)
    # Every mask is the only one over some place.
    sure = ((label == labels[:, None]) & (confidence >= tau)).all(1) & (plain == labels)
    for batch_size in (1, 7, 64):
        result = reports(model, tau=tau, batch_size=batch_size).certify(images, labels)
        assert torch.equal(result.prediction, plain)
        assert torch.equal(result.certified_detection, sure)
        assert (result.forwards == 10).all()
    assert 0 < sure.sum() < len(images)
    assert 0 < alert.sum() < len(images)


def test_an_alert_ends_the_evaluation(model, images):
    prediction = reports(model, tau=0.5, batch_size=1).infer(images)
    alert = prediction.label == pp.ALERT
    assert (prediction.forwards[~alert] == 10).all()
    assert (prediction.forwards[alert] < 10).any()


def test_a_larger_patch_and_more_places_never_certify_more(model, images, labels):
    masks = pp.MaskSet.for_threat(pp.SquarePatch(3), (12, 12), 4)
    threats = [pp.SquarePatch(3), pp.SquarePatch(2), pp.SquarePatch(2, locations="corners")]
    results = [
        reports(model, threat=threat, mask_set=masks, tau=0.7).certify(images, labels)
        for threat in threats
    ]
    for larger, smaller in pairwise(results):
        assert not (larger.certified_detection & ~smaller.certified_detection).any()
        assert torch.equal(larger.prediction, smaller.prediction)
        assert (larger.certified_threshold <= smaller.certified_threshold).all()
    assert results[0].certified_detection.sum() < results[2].certified_detection.sum()


def test_the_map_shows_where_no_sure_mask_covers(model, images, labels):
    defense = reports(model, tau=0.8)
    result = defense.certify(images, labels)
    assert not (result.verdicts == Verdict.UNKNOWN).any()
    lost = result.vulnerability_map().flatten(1).amax(1) > 0
    right = result.prediction == labels
    assert torch.equal(lost[right], ~result.certified_detection[right])


class NotANumber(nn.Module):
    """Scores class 1, but NaN where the last pixel is as given."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, images: Tensor) -> Tensor:
        scores = torch.tensor([0.0, 9.0, 0.0]).repeat(len(images), 1)
        scores[images[:, 0, -1, -1] == self.bad] = torch.nan
        return scores


@pytest.mark.parametrize(("bad", "label"), [(0.5, 1), (0.0, pp.ALERT)])
def test_scores_that_are_not_finite(bad, label):
    """With a mask on the last pixel, where that mask certifies nothing; without, an alert."""
    defense = pp.MinorityReports(
        NotANumber(bad).eval(), pp.SquarePatch(1), image_size=(4, 4), masks_per_side=2
    )
    image = torch.zeros(1, 1, 4, 4)
    with pytest.warns(UserWarning, match="not finite"):
        result = defense.certify(image, torch.tensor([1]))
    assert result.prediction.tolist() == [label]
    assert not result.certified_detection
    with pytest.warns(UserWarning, match="not finite"):
        assert defense.predict(image).tolist() == [label]


def test_detection_shares_no_name_with_recovery(model, images, labels):
    detection = reports(model).certify(images, labels)
    recovery = pp.PatchCleanser(model, pp.SquarePatch(2), image_size=(12, 12)).certify(
        images, labels
    )
    assert (detection.kind, recovery.kind) == ("detection", "recovery")
    assert not hasattr(detection, "certified")
    assert not hasattr(detection, "paper_condition")
    assert not hasattr(recovery, "certified_detection")


@pytest.mark.parametrize("tau", [-0.1, 1.1, float("nan"), "0.5", None])
def test_a_tau_that_is_no_confidence_is_refused(model, tau):
    with pytest.raises(PatchproofError, match=r"tau: expected a confidence in \[0, 1\]"):
        reports(model, tau=tau)


def test_several_patches_and_any_rectangle_are_detected_as_well(model, images, labels):
    for threat in (pp.MultiplePatches(2, pp.SquarePatch(2)), pp.AnyRectangle(4)):
        defense = reports(model, threat=threat, masks_per_side=2, tau=0.6)
        result = defense.certify(images, labels)
        assert 0 < result.certified_detection.sum() < len(images)
        assert torch.equal(
            result.certified_detection,
            (result.verdicts == Verdict.HOLDS).all(1) & (result.prediction == labels),
        )


def test_a_defense_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    spec = ModelSpec("tiny-resnet", 10, 1, (8, 8))
    options = {"masks_per_side": (3, 2), "fill": 0.25, "tolerance": 0.01, "tau": 0.15}
    defense = pp.MinorityReports(build_model(spec), pp.SquarePatch(2), image_size=(8, 8), **options)
    defense.save(tmp_path / "detector.safetensors", spec)
    again = pp.load(tmp_path / "detector.safetensors")
    assert isinstance(again, pp.MinorityReports)
    assert again.to_dict() == defense.to_dict()
    assert again.to_dict()["tau"] == 0.15
    images = torch.rand(6, 1, 8, 8)
    assert torch.equal(again.predict(images), defense.predict(images))
