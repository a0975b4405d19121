"""Figures of the analyses of features show the numbers of their tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from patchproof.report import feature_figures as figures

PATCHES = ("2x2 square", "5x5 square")


def accuracy(**values: float) -> dict[str, float]:
    return {
        f"{name}{end}": value + change
        for name, value in values.items()
        for end, change in (("", 0.0), ("_low", -0.1), ("_high", 0.05))
    }


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return rows with accuracies that differ in every row."""
    return pd.DataFrame(
        row | accuracy(clean=0.9 - place / 50, certified=0.5 - place / 50, paper=0.6)
        for place, row in enumerate(rows)
    )


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """Return what is drawn with markers, as x and y."""
    drawn: list[Any] = [container.lines[0] for container in axes.containers]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn]


def shown(axes: Axes) -> list[list[float]]:
    return [y for _, y in lines(axes)]


def test_receptive_fields_are_in_order_a_colour_a_patch() -> None:
    made = table(
        [
            {"model": name, "receptive_field": f"{side}x{side}", "threat": patch}
            for name, side in (("wide", 15), ("narrow", 7))
            for patch in PATCHES
        ]
    )
    (axes,) = figures.receptive_field_figure(made).axes
    certified = made["certified"]
    assert lines(axes)[0] == ([7, 15], [certified[2], certified[0]])
    assert lines(axes)[2] == ([7, 15], [certified[3], certified[1]])
    assert lines(axes)[1][1] == [made["clean"][2], made["clean"][0]]


def test_patch_sizes_are_a_colour_a_model() -> None:
    made = table([{"model": name, "patch_side": side} for name in "ab" for side in (3, 1)])
    (axes,) = figures.patch_size_figure(made, (32, 32)).axes
    assert [x for x, _ in lines(axes)] == [[1, 3]] * 4
    assert shown(axes)[2] == [made["certified"][3], made["certified"][2]]
    assert "32x32" in axes.get_xlabel()


def test_models_of_different_training_stand_side_by_side() -> None:
    made = table([{"model": name, "threat": patch} for name in "abc" for patch in PATCHES])
    (axes,) = figures.training_figure(made).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b", "c"]
    assert np.round(lines(axes)[0][0]).tolist() == [0, 1, 2]
    assert shown(axes)[0] == made["certified"][::2].tolist()
    assert shown(axes)[1] == made["clean"][::2].tolist()


def test_feature_types_have_a_panel_a_model_and_a_place_a_patch() -> None:
    made = table(
        [
            {"model": model, "threat": patch, "feature": feature}
            for feature in ("logits", "prediction")
            for model in ("bagnet", "bands")
            for patch in PATCHES
        ]
    )
    left, right = figures.feature_type_figure(made).axes
    assert (left.get_title(), right.get_title()) == ("bagnet", "bands")
    assert shown(right)[0] == made["certified"][2:4].tolist()
    assert shown(right)[2] == made["certified"][6:8].tolist()


@pytest.mark.parametrize(
    ("draw", "over"),
    [(figures.overlarge_mask_figure, "mask_side"), (figures.top_k_figure, "k")],
)
def test_a_colour_a_patch_over_numbers(draw: Any, over: str) -> None:
    made = table([{"model": "a", "threat": patch, over: x} for patch in PATCHES for x in (5, 2)])
    (axes,) = draw(made).axes
    assert lines(axes)[0] == ([2, 5], [made["certified"][1], made["certified"][0]])
    assert axes.get_title() == ""  # of one model


def test_thresholds_have_a_panel_a_patch() -> None:
    made = table(
        [
            {"model": "a", "threat": patch, "threshold": t} | accuracy(false_positives=1 - t)
            for patch in (*PATCHES, "8x8 square")
            for t in (0.0, 0.5, 1.0)
        ]
    )
    panels = figures.threshold_figure(made).axes
    assert [axes.get_title() for axes in panels[:3]] == [*PATCHES, "8x8 square"]
    assert not panels[3].axison
    assert shown(panels[1])[1] == made["certified"][3:6].tolist()
    assert shown(panels[1])[3] == [1.0, 0.5, 0.0]


def test_aggregations_have_a_panel_a_model_and_a_place_each() -> None:
    made = table(
        [
            {"model": model, "defense": defense, "threat": patch}
            for model in ("bagnet", "bands")
            for defense in ("patchguard", "median", "bagcert")
            for patch in PATCHES
            if (defense, patch) != ("median", "5x5 square")
        ]
    )
    top, bottom = figures.aggregation_figure(made).axes
    assert (top.get_title(), bottom.get_title()) == ("bagnet", "bands")
    names = [tick.get_text() for tick in bottom.get_xticklabels()]
    assert names == ["patchguard", "median", "bagcert"]
    assert shown(top)[0] == made["certified"][[0, 2, 3]].tolist()
    assert np.round(lines(bottom)[2][0]).tolist() == [0, 2]
    assert shown(bottom)[3] == made["clean"][[6, 9]].tolist()


def test_clipping_names_its_bounds() -> None:
    made = pd.DataFrame(
        {"model": model, "clipped_below": low, "clipped_above": high} | accuracy(vanilla=value)
        for model, value in (("a", 0.8), ("b", 0.7))
        for low, high in ((-np.inf, np.inf), (0.0, 5.0))
    )
    (axes,) = figures.clipping_figure(made).axes
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert names == ["[\N{MINUS SIGN}\N{INFINITY}, \N{INFINITY}]", "[0, 5]"]
    assert shown(axes) == [[0.8, 0.8], [0.7, 0.7]]


def test_windows_have_a_panel_a_measure() -> None:
    made = pd.DataFrame(
        {"model": "a", "window_side": side, "masked_accuracy": 0.8, "windows_changed": side / 10}
        | accuracy(images_wrong=0.3)
        for side in (0, 2)
    )
    panels = figures.windows_figure(made).axes
    assert [shown(axes)[0] for axes in panels] == [[0.8, 0.8], [0.3, 0.3], [0.0, 0.2]]


def local_logits(*models: str, first: int = 0) -> pd.DataFrame:
    """Return histograms with two bins, the first from ``first`` on."""
    return pd.DataFrame(
        {
            "model": model,
            "image": image,
            "evidence": evidence,
            "bin_low": float(first + place),
            "bin_high": first + place + 1.0,
            "features": features,
        }
        for model in models
        for image, counts in (("clean", (3, 0)), ("attacked", (3, 7)))
        for evidence in ("true class", "malicious class")
        for place, features in enumerate(counts)
    )


def test_large_logits_of_attacked_images_are_shares_of_their_features() -> None:
    left, right = figures.large_logit_figure(local_logits("a", "b", first=-1)).axes
    assert (left.get_title(), right.get_title()) == ("a", "b")
    outlines = [patch for patch in left.patches if not patch.get_fill()]
    assert [list(patch.get_data().values) for patch in outlines] == [[0.7], [0.7]]
    assert list(outlines[0].get_data().edges) == [0, 1]


def test_no_bar_of_any_network_is_cut_off() -> None:
    made = local_logits("few", "many")
    made.loc[made["model"] == "many", "features"] *= 1000
    for axes, highest in zip(
        figures.local_logit_figure(made).axes, (7, 7, 7000, 7000), strict=True
    ):
        assert highest <= axes.get_ylim()[1] < 2 * highest


def test_logits_of_clean_and_attacked_images_share_their_axes() -> None:
    left, right = figures.local_logit_figure(local_logits("a")).axes
    assert (left.get_title(), right.get_title()) == ("clean images", "attacked images")
    assert left.get_ylim() == right.get_ylim()
    assert left.get_xlim() == right.get_xlim()
    outlines = [patch for patch in right.patches if not patch.get_fill()]
    assert [list(patch.get_data().values) for patch in outlines] == [[3, 7], [3, 7]]
