import pandas as pd
import pytest

from patchproof.report import comparable, load_published
from patchproof.threat import (
    Box,
    RectanglePatch,
    RectanglePatches,
    SparsePixels,
    SquarePatch,
    StencilPatch,
    Threat,
)


def beside(dataset: str, threat: Threat, side: int) -> pd.DataFrame:
    return comparable(dataset, threat.to_dict(), (side, side), load_published())


def test_every_certified_figure_says_what_it_promises() -> None:
    table = load_published()
    kinds = {"recovery", "top-5 recovery", "detection", "probabilistic"}
    certified = table["certified_accuracy"].notna()
    assert set(table.loc[certified, "promise"]) == kinds
    assert set(table.loc[~certified, "promise"]) == {""}


def test_certified_accuracy_is_never_above_clean_accuracy() -> None:
    table = load_published().dropna(subset=["clean_accuracy", "certified_accuracy"])
    assert (table["certified_accuracy"] <= table["clean_accuracy"]).all()
    assert table["certified_accuracy"].between(0, 100).all()


@pytest.mark.parametrize(
    ("dataset", "side", "image", "source", "certified"),
    [
        ("mnist", 5, 28, "IBP", 62.0),
        ("mnist", 2, 28, "IBP", 91.6),
        ("cifar10", 5, 32, "PatchCleanser", 78.8),
        ("cifar10", 5, 32, "IBP", 30.3),
        ("cifar10", 2, 32, "PatchCleanser", 88.5),
        ("cifar10", 35, 224, "PatchCleanser", 78.8),
        ("imagenette", 32, 224, "PatchCleanser", 94.4),
        ("imagenet", 23, 224, "PatchGuard", 32.3),
    ],
)
def test_figures_for_a_square_of_the_same_share_are_found(
    dataset: str, side: int, image: int, source: str, certified: float
) -> None:
    rows = beside(dataset, SquarePatch(side), image)
    assert certified in set(rows.loc[rows["source"] == source, "certified_accuracy"])


@pytest.mark.parametrize(
    ("dataset", "threat", "image"),
    [
        ("cifar10", SquarePatch(3), 32),
        ("cifar10", RectanglePatch(5, 4), 32),
        ("cifar10", SquarePatch(5, "corners"), 32),
        ("cifar10", SquarePatch(5, Box(0, 0, 16, 16)), 32),
        ("cifar10", SquarePatch(5), 224),
        ("digits", SquarePatch(2), 8),
        ("mnist", SparsePixels(3), 28),
        ("mnist", SparsePixels(4), 32),
        ("mnist", RectanglePatch(4, 7, "corners"), 28),
        ("mnist", RectanglePatches([(4, 7), (1, 25)]), 28),
        ("mnist", RectanglePatch(4, 8), 28),
        ("mnist", StencilPatch.line(3), 28),
    ],
)
def test_other_threats_and_data_have_no_figures_beside(
    dataset: str, threat: Threat, image: int
) -> None:
    assert beside(dataset, threat, image).empty


@pytest.mark.parametrize(
    ("dataset", "threat", "image", "patch", "certified"),
    [
        ("mnist", SparsePixels(1), 28, "1 pixel", 96.0),
        ("mnist", SparsePixels(4), 28, "4 pixels", 90.8),
        ("cifar10", SparsePixels(10), 32, "10 pixels", 45.0),
        ("mnist", RectanglePatches([(4, 7), (7, 4), (3, 9)]), 28, "25-pixel rectangle", 50.9),
        ("mnist", RectanglePatches([(1, 25), (25, 1)]), 28, "25-pixel line", 32.4),
        ("cifar10", StencilPatch.line(4), 32, "4-pixel line", 46.1),
        (
            "cifar10",
            StencilPatch(["#" * 5 + "....", ".#####...", "..#####..", "...#####.", "....#####"],
                         "5x5 parallelogram at 45 degrees"),
            32,
            "25-pixel parallelogram",
            30.7,
        ),
    ],
)  # fmt: skip
def test_other_shapes_are_compared_at_the_same_number_of_pixels(
    dataset: str, threat: Threat, image: int, patch: str, certified: float
) -> None:
    rows = beside(dataset, threat, image)
    assert set(rows["patch"]) == {patch}
    assert rows["certified_accuracy"].iloc[0] == certified
    assert set(rows["space"]) == {f"{image}x{image}"}


def test_a_square_is_not_compared_with_a_rotated_one_or_a_rectangle() -> None:
    assert set(beside("cifar10", SquarePatch(5), 32)["patch"]) == {
        "2.4% square",
        "5x5 square",
        "25-pixel square",
    }


def test_the_headline_is_the_best_recovery_of_a_system_in_its_source() -> None:
    rows = beside("imagenet", SquarePatch(32), 224)
    headlines = rows[rows["headline"]].set_index(["source", "system"])["certified_accuracy"]
    assert headlines["PatchCleanser", "PatchCleanser"] == 62.1
    assert headlines["PatchGuard", "Mask-BN"] == 26.0, "the top-5 row is no headline"
