"""The named defenses over features: what they take, refuse, say, and how they are saved."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_models import SIZE, Hostile, HostileBands, mild_images
from torch import nn

import patchproof as pp
from patchproof import defenses
from patchproof.cli.feature_defenses import FEATURE_DEFENSES
from patchproof.defenses import FeatureDefense
from patchproof.models import ModelSpec, build_model

Make = Callable[..., FeatureDefense]

BAGNET = ModelSpec(
    "bagnet", 3, 1, SIZE, {"receptive_field": 3, "stride": 1, "widths": [4, 4, 4], "depth": 0}
)
BANDS = ModelSpec("band-resnet", 3, 1, SIZE, {"size": 2, "widths": [4, 4]})
ANY = ModelSpec("tiny-resnet", 3, 1, SIZE)
COLUMNS = pp.Ablation("column", 2)

CASES: dict[str, tuple[Make, ModelSpec, dict[str, Any], str]] = {
    "robust masking": (
        pp.PatchGuard,
        BAGNET,
        {},
        "64 local features of 3x3 pixels, stride 1, windows of 4x4",
    ),
    "with options": (
        pp.PatchGuard,
        BAGNET,
        {"threshold": 0.25, "window": (5, 6), "feature": "confidence", "tolerance": 0.01},
        "64 local features of 3x3 pixels, stride 1, windows of 5x6",
    ),
    "windows for a larger patch": (
        pp.PatchGuard,
        BAGNET,
        {"mask_for": pp.RectanglePatch(3, 2), "high": 50.0},
        "64 local features of 3x3 pixels, stride 1, windows of 5x4",
    ),
    "bands": (
        pp.PatchGuard,
        BANDS,
        {},
        "8 bands of columns of 8x2 pixels, windows of 1x3",
    ),
    "blocks of any network": (
        pp.PatchGuard,
        ANY,
        {"ablation": pp.Ablation("block", 2), "fill": 0.25},
        "64 blocks of 2x2 pixels, windows of 3x3",
    ),
    "detection": (
        pp.PatchGuardPlusPlus,
        BAGNET,
        {"tau": 0.4},
        "64 local features of 3x3 pixels, stride 1, windows of 4x4",
    ),
    "clipped sum": (pp.ClippedBagNet, BAGNET, {}, "64 local features of 3x3 pixels, stride 1"),
    "votes of bands": (
        pp.DerandomizedSmoothing,
        BANDS,
        {"vote_threshold": 0.2},
        "8 bands of columns of 8x2 pixels",
    ),
    "votes of two rows": (
        pp.DerandomizedSmoothing,
        ANY,
        {"vote_threshold": None, "ablation": pp.Ablation("row", 1), "bands": 2},
        "28 combinations of 2 bands of rows of 1x8 pixels",
    ),
    "local votes": (
        pp.BagCert,
        BAGNET,
        {"feature": "confidence"},
        "64 local features of 3x3 pixels, stride 1",
    ),
    "median": (
        pp.RobustStatistics,
        BAGNET,
        {"statistic": "median"},
        "64 local features of 3x3 pixels, stride 1, their median",
    ),
    "trimmed mean": (
        pp.RobustStatistics,
        BAGNET,
        {"statistic": "trimmed-mean"},
        "64 local features of 3x3 pixels, stride 1, without 16 at each end",
    ),
    "top masking": (
        pp.RobustStatistics,
        BAGNET,
        {"statistic": "top-masking", "count": 20, "feature": "prediction"},
        "64 local features of 3x3 pixels, stride 1, without the 20 of most evidence",
    ),
}


def network(spec: ModelSpec) -> nn.Module:
    torch.manual_seed(0)
    return build_model(spec)


@pytest.mark.parametrize("name", CASES)
def test_a_defense_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    make, spec, options, words = CASES[name]
    defense = make(network(spec), pp.SquarePatch(2), image_size=SIZE, **options)
    assert defense.describe() == words
    defense.save(tmp_path / "robust.safetensors", spec, made={"by": "hand"})
    again = pp.load(tmp_path / "robust.safetensors")
    assert type(again) is type(defense)
    assert again.to_dict() == defense.to_dict()
    images = torch.rand(6, 1, *SIZE)
    assert torch.equal(again.predict(images), defense.predict(images))
    labels = torch.zeros(6, dtype=torch.int64)
    assert torch.equal(
        again.certify(images, labels).verdicts, defense.certify(images, labels).verdicts
    )


def test_the_features_default_to_the_papers() -> None:
    """Table 3: logits of receptive fields, confidences of ablations."""
    for spec, feature in ((BAGNET, "logits"), (BANDS, "confidence")):
        for make, options in (
            (pp.PatchGuard, {}),
            (pp.RobustStatistics, {"statistic": "median"}),
        ):
            defense: Any = make(network(spec), pp.SquarePatch(1), image_size=SIZE, **options)
            assert defense.to_dict()["feature"] == feature


def test_trimming_and_masking_default_to_what_patches_corrupt() -> None:
    """A 2x2 patch meets at most 4x4 fields of 3x3 pixels; two of them, twice as many."""
    one, two = pp.SquarePatch(2), pp.MultiplePatches(2, pp.SquarePatch(1))
    for threat, corrupted in ((one, 16), (two, 18)):
        trimmed, masked = (
            pp.RobustStatistics(network(BAGNET), threat, image_size=SIZE, statistic=statistic)
            for statistic in ("trimmed-mean", "top-masking")
        )
        assert trimmed.trim == masked.count == corrupted
        assert trimmed.count is None
        assert masked.trim is None


def test_whether_the_papers_condition_is_sound() -> None:
    said = {
        name: make(network(spec), pp.SquarePatch(2), image_size=SIZE, **options).paper
        for name, (make, spec, options, _) in CASES.items()
    }
    assert {name for name, paper in said.items() if paper == "unsound"} == {
        "with options",  # T > 0
        "clipped sum",
    }
    assert {name for name, paper in said.items() if paper is None} == {
        "detection",
        "median",
        "trimmed mean",
        "top masking",
    }


MISTAKES: dict[str, tuple[Make, ModelSpec, dict[str, Any], str]] = {
    "several patches with windows": (
        pp.PatchGuard,
        BAGNET,
        {"threat": pp.MultiplePatches(2, pp.SquarePatch(2))},
        "expected one patch, .* RobustStatistics with top-masking",
    ),
    "windows for several patches": (
        pp.PatchGuardPlusPlus,
        BAGNET,
        {"mask_for": pp.MultiplePatches(2, pp.SquarePatch(2))},
        "expected one patch",
    ),
    "windows larger than the feature map": (
        pp.PatchGuard,
        BAGNET,
        {"window": 9},
        "windows: expected less than the 8x8 features of the image, got 9x9",
    ),
    "windows of the whole feature map": (
        pp.PatchGuardPlusPlus,
        BAGNET,
        {"window": 8},
        "got 8x8, which would leave nothing",
    ),
    "a patch as large as the image": (
        pp.PatchGuard,
        BAGNET,
        {"threat": pp.SquarePatch(7)},
        "got 8x8, which would leave nothing",
    ),
    "windows that cannot hold what a region corrupts": (
        pp.PatchGuard,
        BAGNET,
        {"window": (4, 3)},
        "windows: expected at least 4x4 features, got 4x3, which cannot hold the 4x4 features that "
        "a patch in the 2x2 pixels from row 1, column 1 corrupts",
    ),
    "windows for a smaller patch": (
        pp.PatchGuard,
        BAGNET,
        {"mask_for": pp.SquarePatch(1)},
        "expected at least 4x4 features, got 3x3",
    ),
    "windows twice": (
        pp.PatchGuard,
        BAGNET,
        {"window": 4, "mask_for": pp.SquarePatch(2)},
        "expected one of window and mask_for",
    ),
    "a window of nothing": (pp.PatchGuard, BAGNET, {"window": 0}, "window: expected features"),
    "a window of truth": (pp.PatchGuard, BAGNET, {"window": True}, "window: expected features"),
    "windows of several bands": (
        pp.PatchGuard,
        BANDS,
        {"bands": 2},
        "windows: expected views on a grid, got combinations of several bands",
    ),
    "several receptive fields": (pp.PatchGuard, BAGNET, {"bands": 2}, "with an ablation only"),
    "a negative threshold": (pp.PatchGuard, BAGNET, {"threshold": -0.1}, r"in \[0, 1\], got -0.1"),
    "a threshold over 1": (pp.PatchGuard, BAGNET, {"threshold": 1.1}, r"in \[0, 1\], got 1.1"),
    "a threshold that is no number": (
        pp.PatchGuard,
        BAGNET,
        {"threshold": float("nan")},
        r"in \[0, 1\], got nan",
    ),
    "an infinite bound": (pp.PatchGuard, BAGNET, {"high": float("inf")}, "within 1,000,000"),
    "a negative bound": (pp.PatchGuard, BAGNET, {"high": -1.0}, "low < high"),
    "no such feature": (pp.PatchGuard, BAGNET, {"feature": "edges"}, "logits, confidence"),
    "a negative tolerance": (pp.BagCert, BAGNET, {"tolerance": -1.0}, "tolerance: expected"),
    "a tolerance that is no number": (
        pp.ClippedBagNet,
        BAGNET,
        {"tolerance": float("nan")},
        "tolerance: expected",
    ),
    "a tau over 1": (pp.PatchGuardPlusPlus, BAGNET, {"tau": 1.5}, r"tau: expected .*\[0, 1\]"),
    "a vote from more than certainty": (
        pp.DerandomizedSmoothing,
        BANDS,
        {"vote_threshold": 1.5},
        r"\[0, 1\], got 1.5",
    ),
    "votes of logits": (pp.BagCert, BAGNET, {"feature": "logits"}, "votes in"),
    "no such statistic": (
        pp.RobustStatistics,
        BAGNET,
        {"statistic": "mean"},
        "median, trimmed-mean, top-masking, got 'mean'",
    ),
    "trim of the median": (
        pp.RobustStatistics,
        BAGNET,
        {"statistic": "median", "trim": 3},
        "trim: expected with trimmed-mean only, got median",
    ),
    "count of the trimmed mean": (
        pp.RobustStatistics,
        BAGNET,
        {"statistic": "trimmed-mean", "count": 3},
        "count: expected with top-masking only",
    ),
    "all trimmed": (
        pp.RobustStatistics,
        BAGNET,
        {"statistic": "trimmed-mean", "trim": 32},
        "trim: expected from 0 to less than half of 64 views",
    ),
    "all masked": (
        pp.RobustStatistics,
        BAGNET,
        {"statistic": "top-masking", "count": 64},
        "count: expected from 0 to less than 64 views",
    ),
    "neither local features nor an ablation": (
        pp.BagCert,
        ANY,
        {},
        "expected one with local_logits, such as bagnet, or an ablation",
    ),
    "another ablation than the network was made for": (
        pp.DerandomizedSmoothing,
        BANDS,
        {"ablation": pp.Ablation("column", 3)},
        "which the model was made for",
    ),
    "a band wider than the image": (
        pp.DerandomizedSmoothing,
        ANY,
        {"ablation": pp.Ablation("column", 9)},
        "inside the 8x8 image",
    ),
    "a patch larger than the image": (
        pp.BagCert,
        BAGNET,
        {"threat": pp.SquarePatch(9)},
        "8x8 image",
    ),
    "no image size": (pp.BagCert, BAGNET, {"image_size": (8, 0)}, "image_size: expected"),
    "a fill out of range": (
        pp.DerandomizedSmoothing,
        ANY,
        {"ablation": COLUMNS, "fill": 2.0},
        "fill: expected",
    ),
}


@pytest.mark.parametrize(
    ("make", "spec", "options", "message"), MISTAKES.values(), ids=list(MISTAKES)
)
def test_a_mistake_is_refused(
    make: Make, spec: ModelSpec, options: dict[str, Any], message: str
) -> None:
    arguments = {"threat": pp.SquarePatch(2), "image_size": SIZE} | options
    with pytest.raises(pp.PatchproofError, match=message):
        make(network(spec), **arguments)


class Global(nn.Module):
    """Local logits that each see the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 2, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def local_logits(self, images: torch.Tensor) -> torch.Tensor:
        features = self.inner(images)
        logits: torch.Tensor = features + self.pool(features)
        return logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.local_logits(images).mean((2, 3))


def test_features_that_see_everything_are_refused_with_the_layer() -> None:
    with pytest.raises(pp.PatchproofError, match="pool"):
        pp.PatchGuard(Global().eval(), pp.SquarePatch(2), image_size=SIZE)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(pp.PatchproofError, match="eval mode"):
        pp.BagCert(network(BAGNET).train(), pp.SquarePatch(2), image_size=SIZE)


def test_features_that_are_not_finite_count_as_corrupted() -> None:
    """Where a quarter of the image is worth nothing, predict goes on with the rest."""

    class Blind(Hostile):
        def local_logits(self, images: torch.Tensor) -> torch.Tensor:
            logits = super().local_logits(images)
            nothing = torch.full_like(logits[:, :, :4, :4], torch.inf)
            return torch.cat([torch.cat([nothing, logits[:, :, :4, 4:]], 3), logits[:, :, 4:]], 2)

    images = mild_images(40)
    plain, blind = (
        pp.BagCert(model.eval(), pp.SquarePatch(1), image_size=SIZE)
        for model in (Hostile(), Blind())
    )
    with pytest.warns(UserWarning, match="not finite"):
        labels = blind.predict(images)
    with pytest.warns(UserWarning, match="not finite"):
        result = blind.certify(images, labels)
    assert not (result.certified & ~plain.certify(images, labels).certified).any()
    assert 0 < result.certified.sum() < plain.certify(images, labels).certified.sum()


def test_top_k_certificates() -> None:
    """The label stays among more classes at least as often; among all of them always."""
    defense = pp.PatchGuard(Hostile().eval(), pp.SquarePatch(2), image_size=SIZE)
    images = mild_images(60)
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(0))
    first = defense.certify(images, labels)
    tops = [defense.certify_top(images, labels, k) for k in (1, 2, 3)]
    assert torch.equal(tops[0].right, first.prediction == labels)
    assert torch.equal(tops[0].certified, first.certified)
    for less, more in pairwise(tops):
        assert not (less.right & ~more.right).any()
        assert not (less.certified & ~more.certified).any()
    assert 0 < tops[0].certified.sum() < tops[1].certified.sum() < tops[1].right.sum() < 60
    assert tops[2].right.all()
    assert tops[2].certified.all()
    with pytest.raises(pp.PatchproofError, match="k: expected classes >= 1, got 0"):
        defense.certify_top(images, labels, 0)


def test_larger_patches_never_certify_more() -> None:
    images = mild_images(60)
    for make, options in (
        (pp.PatchGuard, {"window": 5}),
        (pp.PatchGuard, {"window": 5, "threshold": 0.3, "high": 50.0}),
        (pp.BagCert, {}),
        (pp.RobustStatistics, {"statistic": "median"}),
    ):
        counts = []
        before = torch.ones(60, dtype=torch.bool)
        for side in (1, 2, 3):
            defense: Any = make(Hostile(1).eval(), pp.SquarePatch(side), image_size=SIZE, **options)
            certified = defense.certify(images, defense.predict(images)).certified
            assert not (certified & ~before).any()
            before = certified
            counts.append(int(certified.sum()))
        assert counts[0] > counts[2]


def test_batch_size_changes_nothing() -> None:
    images = mild_images(20)
    for model in (Hostile().eval(), HostileBands(COLUMNS).eval()):
        results = [
            pp.PatchGuard(model, pp.SquarePatch(1), image_size=SIZE, batch_size=size).certify(
                images, torch.zeros(20, dtype=torch.int64), "never"
            )
            for size in (1, 7, 64)
        ]
        for result in results[1:]:
            assert torch.equal(result.verdicts, results[0].verdicts)
            assert torch.equal(result.forwards, results[0].forwards)


def test_one_forward_yields_all_local_features() -> None:
    images = mild_images(5)
    local = pp.BagCert(Hostile().eval(), pp.SquarePatch(1), image_size=SIZE)
    bands = pp.DerandomizedSmoothing(
        HostileBands(COLUMNS).eval(), pp.SquarePatch(1), image_size=SIZE
    )
    assert local.infer(images).forwards.tolist() == [1] * 5
    assert bands.infer(images).forwards.tolist() == [8] * 5


@pytest.mark.parametrize("name", FEATURE_DEFENSES)
def test_the_command_lines_options_are_arguments(name: str) -> None:
    named = FEATURE_DEFENSES[name]
    arguments = inspect.signature(getattr(defenses, named.type)).parameters
    assert {*named.options, *named.fixed} <= set(arguments)
