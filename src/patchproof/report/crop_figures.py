"""Figures of the analyses of randomized cropping: pure functions from their tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from patchproof.report.figures import LineStyle, accuracy_axis, add_legend, draw_line
from patchproof.report.plots import ON_LIGHT, Ink, style

_STYLES: dict[str, LineStyle] = {"certified": "-", "paper condition (not sound)": ":"}


def over_patches_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw accuracies against several patches (Table 2).

    Args:
        table: of ``crop_analyses.certified_accuracies``, of one classifier and one probability.
        ink: colours.
    """
    patches = list(dict.fromkeys(table["threat"]))
    x = table["threat"].map({patch: place for place, patch in enumerate(patches)})

    def label(axes: Axes) -> None:
        names = [patch.partition(" (")[0] for patch in patches]
        axes.set_xticks(range(len(patches)), names, rotation=20, ha="right")
        axes.set_xlabel("patch")

    return _drawn(table, x, label, ink)


def over_numbers_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw accuracies over the number of crops; that of all crops as a level line (Figure 3).

    Args:
        table: of ``crop_analyses.certified_accuracies``, of one classifier, patch and probability.
        ink: colours.
    """
    numbers = sorted(set(table.loc[table["mode"] != "all-crops", "crops"]))
    every = table["mode"] == "all-crops"
    ends = [rows.assign(crops=end) for rows in [table[every]] for end in (numbers[0], numbers[-1])]
    spread = pd.concat([table[~every], *ends], ignore_index=True)

    def label(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(numbers))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("crops")

    return _drawn(spread, spread["crops"], label, ink)


def over_sizes_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw accuracies over the size of the crops, with and without their positions (Figure 2).

    Args:
        table: of ``crop_analyses.certified_accuracies``, of one mode, patch and probability.
        ink: colours.
    """
    side = table["crop"].map(lambda text: max(map(int, str(text).split("x"))))
    ordered = table.assign(side=side).sort_values("side", kind="stable")
    with style(ink):
        figure = Figure(figsize=(5.6, 3.8), layout="constrained")
        axes = figure.subplots()
        for place, (told, rows) in enumerate(ordered.groupby("positions", sort=False)):
            name = "told where the crop is" if told else "not told"
            measure = certified_column(rows)
            draw_line(axes, rows["side"], rows, measure, place, ink, name)
            draw_line(axes, rows["side"], rows, "clean", place, ink, None, "--")
        axes.xaxis.set_major_locator(FixedLocator(sorted(set(side))))
        axes.set_xlabel("side of the crops (pixels)")
        axes.set_title(f"{table['mode'].iloc[0]}, {table['threat'].iloc[0]}", fontsize=9)
        accuracy_axis(axes, "accuracy", whole=False)
        add_legend(figure, axes, {"certified": "-", "clean": "--"})
    return figure


def needed_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw for how many images so many random crops are enough.

    Args:
        table: of ``crop_analyses.crops_needed``, of one classifier.
        ink: colours.
    """
    with style(ink):
        figure = Figure(figsize=(5.6, 3.8), layout="constrained")
        axes = figure.subplots()
        groups = table.groupby(["threat", "probability"], sort=False)
        for place, ((patch, probability), rows) in enumerate(groups):
            name = f"{patch}, probability {probability:g}"
            draw_line(axes, rows["crops"], rows, "certified_with_probability", place, ink, name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(set(table["crops"]))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("random crops")
        axes.set_title(str(table["model"].iloc[0]), fontsize=9)
        accuracy_axis(axes, "certified with the probability", whole=False)
        add_legend(figure, axes)
    return figure


def certified_column(rows: pd.DataFrame) -> str:
    """Return which column holds the certificates of rows of one mode."""
    of_chance = (rows["mode"] == "random-crops").all()
    return "certified_with_probability" if of_chance else "certified"


def _drawn(
    table: pd.DataFrame, x: pd.Series[Any], label: Callable[[Axes], None], ink: Ink
) -> Figure:
    """Draw certificates and paper's conditions in a colour for each mode."""
    with style(ink):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        groups = table.groupby(["mode", "replacement"], sort=False)
        for place, ((mode, replacement), rows) in enumerate(groups):
            words = [str(mode)]
            if mode == "random-crops":
                words.append(f"probability {rows['probability'].iloc[0]:g}")
            if mode != "all-crops" and not replacement:
                words.append("without replacement")
            at = x[rows.index]
            draw_line(axes, at, rows, certified_column(rows), place, ink, ", ".join(words))
            draw_line(axes, at, rows, "paper", place, ink, None, ":")
        label(axes)
        axes.set_title(_said(table), fontsize=9)
        accuracy_axis(axes, "accuracy", whole=False)
        add_legend(figure, axes, _STYLES)
    return figure


def _said(table: pd.DataFrame) -> str:
    """Say what all rows have in common."""
    drawn = table[table["mode"] != "all-crops"]
    words = [
        f"{rows[name].iloc[0]}{unit}"
        for name, unit, rows in (
            ("model", "", table),
            ("threat", "", table),
            ("crops", " crops of a draw", drawn),
        )
        if rows[name].nunique() == 1
    ]
    return ", ".join(words)
