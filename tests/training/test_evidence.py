"""The recipes of local features: what they make of local logits, and that they learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.datasets import ImageDataset, load_dataset
from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec
from patchproof.training import (
    BagCertRecipe,
    ClippedRecipe,
    CutoutRecipe,
    MaskedEvidenceRecipe,
    RankRecipe,
    Recipe,
    train,
)
from patchproof.training.bagcert import lead_of
from patchproof.training.evidence import (
    LocalRecipe,
    Statistic,
    best_window,
    evidence,
    mask_best_windows,
)

SPEC = ModelSpec(
    "bagnet", 10, 1, (8, 8), {"receptive_field": 5, "stride": 1, "widths": [16, 16, 32], "depth": 1}
)
MASKED = MaskedEvidenceRecipe(
    window=(2, 2), epochs=3, batch_size=64, shift=0, learning_rate=0.2, precision="32-true"
)


@pytest.fixture(scope="module")
def digits() -> tuple[ImageDataset, ImageDataset]:
    return load_dataset("digits", "train").sample(512, 0), load_dataset("digits", "validation")


@pytest.fixture(scope="module")
def plain(
    digits: tuple[ImageDataset, ImageDataset], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("plain") / "run"
    recipe = CutoutRecipe(square_sizes=None, epochs=8, batch_size=64, shift=0, precision="32-true")
    train(recipe, SPEC, *digits, out, device="cpu")
    return out / "model.safetensors"


class Fixed(nn.Module):
    """A network whose local logits are its images."""

    def local_logits(self, images: Tensor) -> Tensor:
        return images


class TestEvidence:
    def test_it_is_clipped_at_zero_and_logits_below_still_learn(self) -> None:
        logits = torch.tensor([-3.0, 0.0, 2.0], requires_grad=True)
        values = evidence(logits)
        assert values.tolist() == [0.0, 0.0, 2.0]
        (gradient,) = torch.autograd.grad(values.sum(), [logits])
        assert 0 < gradient[0] < gradient[2] == 1.0


class TestMaskedEvidence:
    values = torch.tensor(
        [
            [[5.0, 4.0, 0.0, 3.0], [0.0, 0.0, 2.0, 3.0]],
            [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]],
        ]
    ).unsqueeze(0)
    """One image, two classes, 2x4 cells."""

    @pytest.mark.parametrize(
        ("window", "corner"),
        [((2, 2), (0, 0)), ((1, 1), (0, 0)), ((2, 1), (0, 3)), ((1, 3), (0, 0))],
    )
    def test_the_best_window_is_found(
        self, window: tuple[int, int], corner: tuple[int, int]
    ) -> None:
        found = best_window(self.values[:, :1], window)[0, 0]
        expected = torch.zeros(2, 4, dtype=torch.bool)
        top, left = corner
        expected[top : top + window[0], left : left + window[1]] = True
        assert torch.equal(found, expected)

    def test_it_is_the_window_of_the_largest_sum_by_brute_force(self) -> None:
        torch.manual_seed(0)
        values = torch.rand(20, 1, 5, 7)
        for image, found in zip(values, best_window(values, (2, 3)), strict=True):
            sums = image[0].unfold(0, 2, 1).unfold(1, 3, 1).sum((2, 3))
            assert float(image[found].sum()) == pytest.approx(float(sums.max()))
            assert int(found.sum()) == 6

    def test_one_mask_hides_the_labels_window_from_all_classes(self) -> None:
        masked = mask_best_windows(self.values, torch.tensor([0]), (2, 2), 1)
        assert masked[0, :, :, :2].abs().sum() == 0
        assert torch.equal(masked[..., 2:], self.values[..., 2:])
        masked = mask_best_windows(self.values, torch.tensor([1]), (2, 2), 1)
        assert masked[0, :, :, 2:].abs().sum() == 0

    def test_a_second_mask_takes_from_the_label_alone(self) -> None:
        masked = mask_best_windows(self.values, torch.tensor([0]), (2, 2), 2)
        assert masked[0, 0].sum() == 0
        assert masked[0, 1].sum() == 22

    def test_the_loss_is_the_cross_entropy_of_what_is_left(self) -> None:
        recipe = replace(MASKED, label_smoothing=0.0)
        loss = recipe.loss(Fixed(), self.values, torch.tensor([0]), None)
        expected = functional.cross_entropy(torch.tensor([[1.0, 22 / 8]]), torch.tensor([0]))
        assert float(loss) == pytest.approx(float(expected))
        mixed = replace(recipe, clean_share=0.25).loss(
            Fixed(), self.values, torch.tensor([0]), None
        )
        clean = functional.cross_entropy(torch.tensor([[17 / 8, 36 / 8]]), torch.tensor([0]))
        assert float(mixed) == pytest.approx(0.75 * float(expected) + 0.25 * float(clean))

    def test_clean_accuracy_is_that_of_robust_masking(self) -> None:
        # Without masks class 0 wins; without the best window of each class, class 1.
        local = torch.tensor([[[[0.0, 9.0, 0.0, 1.0]], [[2.0, 2.0, 2.0, 2.0]]]])
        recipe = replace(MASKED, window=(1, 1))
        right = recipe.validate(Fixed(), local, torch.tensor([1]), None, slice(0, 1))
        assert right["clean_accuracy"].tolist() == [True]
        assert right["masked_accuracy"].tolist() == [False]  # 6 against 10
        right = recipe.validate(Fixed(), local, torch.tensor([0]), None, slice(0, 1))
        assert right["clean_accuracy"].tolist() == [False]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"masks": 3}, "1 or 2 evidence masks"),
            ({"window": (0, 2)}, "window from 1x1"),
            ({"scale": 0.0}, "positive scale"),
            ({"clean_share": 1.0}, "clean_share"),
        ],
    )
    def test_impossible_settings_are_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(PatchproofError, match=message):
            replace(MASKED, **changes)

    def test_a_window_of_the_whole_image_and_other_networks_are_refused(
        self, digits: tuple[ImageDataset, ImageDataset], tmp_path: Path
    ) -> None:
        with pytest.raises(PatchproofError, match="smaller than the 8x8 features"):
            train(replace(MASKED, window=(8, 8)), SPEC, *digits, tmp_path, device="cpu")
        with pytest.raises(PatchproofError, match="local_logits, such as bagnet"):
            train(MASKED, ModelSpec("tiny-resnet", 10, 1, (8, 8)), *digits, tmp_path, device="cpu")
        assert not list(tmp_path.iterdir())


class TestStatistics:
    cells = torch.tensor([[[[7.0, -1.0], [3.0, 1.0]]]])
    labels = torch.tensor([0])

    @pytest.mark.parametrize(
        ("statistic", "trim", "expected"),
        [("median", 0, 1.0), ("trimmed-mean", 1, 2.0), ("top-masking", 1, 4 / 3)],
    )
    def test_they_are_of_the_clipped_logits(
        self, statistic: Statistic, trim: int, expected: float
    ) -> None:
        recipe = RankRecipe(statistic=statistic, trim=trim)
        assert recipe.scores(self.cells, self.labels).item() == pytest.approx(expected)

    def test_the_clipped_mean_is_that_of_clipped_bagnet(self) -> None:
        expected = (torch.tanh(0.05 * self.cells - 1)).mean()
        assert ClippedRecipe().scores(self.cells, self.labels).item() == pytest.approx(
            float(expected)
        )

    @pytest.mark.parametrize(
        "changes", [{"trim": 1}, {"statistic": "trimmed-mean"}, {"statistic": "mean", "trim": 1}]
    )
    def test_impossible_ones_are_refused(self, changes: dict[str, Any]) -> None:
        with pytest.raises(PatchproofError, match="expected"):
            replace(RankRecipe(statistic="median"), **changes)

    def test_trimming_all_cells_is_refused(
        self, digits: tuple[ImageDataset, ImageDataset], tmp_path: Path
    ) -> None:
        recipe = RankRecipe(statistic="trimmed-mean", trim=32)
        with pytest.raises(PatchproofError, match="cells to be left of 8x8"):
            train(recipe, SPEC, *digits, tmp_path, device="cpu")


class TestBagCert:
    # Cells that are sure of classes 0, 0, 1 and 2.
    local = 100 * functional.one_hot(torch.tensor([[[0, 0, 1, 2]]]), 3).permute(0, 3, 1, 2).float()

    def test_the_lead_is_over_the_best_other_class(self) -> None:
        votes = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
        assert lead_of(votes, torch.tensor([0, 2])).tolist() == pytest.approx([0.2, -0.3])

    @pytest.mark.parametrize(("label", "loss"), [(0, 0.15), (1, 0.65)])
    def test_the_loss_is_what_the_lead_lacks(self, label: int, loss: float) -> None:
        recipe = BagCertRecipe(margin=0.4)
        labels = torch.tensor([label])
        assert float(recipe.loss(Fixed(), self.local, labels, None)) == pytest.approx(loss)
        assert float(
            replace(recipe, margin=0.2).loss(Fixed(), self.local, labels, None)
        ) == pytest.approx(max(0.0, loss - 0.2))

    def test_the_epoch_is_chosen_by_the_margin(self) -> None:
        recipe = BagCertRecipe(margin=0.2)
        right = recipe.validate(Fixed(), self.local, torch.tensor([0]), None, slice(0, 1))
        assert all(bool(values) for values in right.values())
        higher = replace(recipe, margin=0.3)
        right = higher.validate(Fixed(), self.local, torch.tensor([0]), None, slice(0, 1))
        assert right["clean_accuracy"].tolist() == [True]
        assert right["margin_accuracy"].tolist() == [False]

    @pytest.mark.parametrize("margin", [0.0, 1.0, float("nan")])
    def test_a_margin_that_no_votes_can_have_is_refused(self, margin: float) -> None:
        with pytest.raises(PatchproofError, match="share of the cells between 0 and 1"):
            BagCertRecipe(margin=margin)


COMMON: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 64,
    "shift": 0,
    "learning_rate": 0.03,
    "precision": "32-true",
}


@pytest.mark.parametrize(
    "recipe",
    [
        MaskedEvidenceRecipe(window=(2, 2), **COMMON),
        MaskedEvidenceRecipe(window=(2, 2), masks=2, **COMMON),
        BagCertRecipe(margin=0.1, **COMMON),
        ClippedRecipe(**COMMON),
        RankRecipe(statistic="median", **COMMON),
        RankRecipe(statistic="trimmed-mean", trim=8, **COMMON),
        RankRecipe(statistic="top-masking", trim=8, **COMMON),
    ],
    ids=lambda recipe: recipe.name,
)
def test_fine_tuning_lowers_the_loss_and_costs_little_accuracy(
    recipe: LocalRecipe,
    digits: tuple[ImageDataset, ImageDataset],
    plain: Path,
    tmp_path: Path,
) -> None:
    still: Recipe = replace(recipe, epochs=1, learning_rate=1e-9, weight_decay=0.0)
    before = train(still, SPEC, *digits, tmp_path / "still", device="cpu", start=plain)
    after = train(recipe, SPEC, *digits, tmp_path / "tuned", device="cpu", start=plain)
    assert after["loss"] < before["loss"] - 0.01
    assert after[recipe.chosen_by] > before[recipe.chosen_by] - 0.1
    card = json.loads((tmp_path / "tuned" / "card.json").read_text())
    assert card["recipe"] == recipe.name
    assert "start" in card


def test_masked_evidence_learns_from_random_weights_with_a_clean_share(
    digits: tuple[ImageDataset, ImageDataset], tmp_path: Path
) -> None:
    recipe = replace(MASKED, epochs=6, clean_share=0.5)
    best = train(recipe, SPEC, *digits, tmp_path, device="cpu")
    assert best["masked_accuracy"] > 0.4
    assert best["clean_accuracy"] > best["masked_accuracy"]
