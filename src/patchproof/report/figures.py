"""Figures of the analyses: pure functions from their tables, in the style of ``report.plots``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from patchproof.evaluation.analyses import certified_column
from patchproof.report.plots import MARKERS, ON_LIGHT, Ink, interval_bars, style

LineStyle = Literal["-", "--", ":", ""]
_ALGORITHMS = {"double": "double masking", "challenger": "challenger game"}
_LINES: dict[str, LineStyle] = {"double": "-", "challenger": "--"}
_CHARACTERS = 12
"""Of a legend fit into an inch."""
_APART = {"wspace": 0.08}
_NAMED_CLASSES = 30
"""Classes are named on the axis up to so many, else numbered by rank."""


def budget_figures(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> dict[str, Figure]:
    """Draw what mask sets achieve, and at which cost (PatchCleanser, Figures 4 and 5).

    Args:
        table: of ``analyses.budget``.
        ink: colours.

    Returns:
        ``accuracy``: clean and certified accuracy and forwards over the masks per side;
        ``trade-off``: both accuracies over the forwards.
    """
    with style(ink):
        accuracy = Figure(figsize=(9.0, 3.4), layout="constrained")
        clean, certified, forwards = accuracy.subplots(1, 3, gridspec_kw=_APART)
        for axes, measure in ((clean, "clean"), (certified, "certified")):
            _over_masks(axes, table, measure, ink)
            accuracy_axis(axes, f"{measure} accuracy", whole=measure == "certified")
        _reference(clean, table, ink)
        _over_masks(forwards, table, "forwards", ink)
        forwards.set_ylim(bottom=0)
        _forwards_axis(forwards, table)
        add_legend(accuracy, clean, _styles(table))

        trade_off = Figure(figsize=(8.0, 3.6), layout="constrained")
        left, right = trade_off.subplots(1, 2, gridspec_kw=_APART)
        for axes, measure in ((left, "clean"), (right, "certified")):
            for one in _series(table):
                draw_line(
                    axes,
                    one.rows["forwards"],
                    one.rows,
                    measure,
                    one.place,
                    ink,
                    one.name,
                    one.line,
                )
            if not _has_ways(table):
                for _, rows in table.groupby("masks_per_side", sort=False):
                    lowest = rows.loc[[rows[f"{measure}_low"].idxmin()]]
                    y = lowest[f"{measure}_low"]
                    _annotate(axes, lowest["forwards"], y, lowest["masks_per_side"], -12)
            axes.set_xscale("log")
            axes.set_xlim(table["forwards"].min() / 1.4, table["forwards"].max() * 1.4)
            axes.set_xlabel("model forwards per image")
            _plain_ticks(axes.xaxis)
            accuracy_axis(axes, f"{measure} accuracy", whole=measure == "certified")
        _reference(left, table, ink)
        if not _has_ways(table):
            trade_off.supxlabel("numbers at the points: masks per side", fontsize=9)
        add_legend(trade_off, left, _styles(table))
    return {"accuracy": accuracy, "trade-off": trade_off}


def inference_figures(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> dict[str, Figure]:
    """Draw the challenger game beside double masking (PatchCleanser, Figure 10).

    Args:
        table: of ``analyses.inference``.
        ink: colours.

    Returns:
        ``inference``: clean accuracy, and mean and most forwards, over the masks per side.
    """
    with style(ink):
        figure = Figure(figsize=(8.0, 3.6), layout="constrained")
        clean, forwards = figure.subplots(1, 2, gridspec_kw=_APART)
        _over_masks(clean, table, "clean", ink)
        _reference(clean, table, ink)
        accuracy_axis(clean, "clean accuracy", whole=False)
        _over_masks(forwards, table, "forwards", ink)
        for one in _series(table):
            most = one.rows["forwards_most"]
            forwards.plot(_per_side(one.rows), most, linestyle=":", color=color_of(ink, one.place))
        forwards.set_yscale("log")
        _plain_ticks(forwards.yaxis)
        _forwards_axis(forwards, table)
        words: dict[LineStyle, str] = {"-": "mean", ":": "most of any image"}
        forwards.legend(
            handles=[
                Line2D([], [], color=ink.text, linestyle=line, label=word)
                for line, word in words.items()
            ],
            frameon=False,
            fontsize=9,
        )
        add_legend(figure, clean, _styles(table))
    return {"inference": figure}


def sizes_figures(
    table: pd.DataFrame, image_size: tuple[int, int], ink: Ink = ON_LIGHT
) -> dict[str, Figure]:
    """Draw how far the defense goes as the patch grows (PatchCleanser, Figures 7 and 8).

    Args:
        table: of ``analyses.sizes``.
        image_size: (H, W) in pixels.
        ink: colours.

    Returns:
        ``sizes``: clean and certified accuracy over the side of the patch.
    """
    with style(ink):
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        axes = figure.subplots()
        _reference(axes, table, ink)
        draw_line(axes, table["patch"], table, "clean", 2, ink, "clean")
        draw_line(axes, table["patch"], table, "certified", 0, ink, "certified")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        height, width = image_size
        axes.set_xlabel(f"side of the square patch (pixels of the {height}x{width} image)")
        accuracy_axis(axes, "accuracy")
        add_legend(figure, axes)
    return {"sizes": figure}


def overestimate_figures(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> dict[str, Figure]:
    """Draw what it costs to take the patch for larger than it is (PatchCleanser, Figure 6).

    Args:
        table: of ``analyses.overestimate``.
        ink: colours.

    Returns:
        ``overestimate``: the accuracies over the ratio of estimated to actual area.
    """
    with style(ink):
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        axes = figure.subplots()
        _reference(axes, table, ink)
        ratio = table["area_ratio"]
        draw_line(axes, ratio, table, "clean", 2, ink, "clean")
        draw_line(axes, ratio, table, "certified", 0, ink, "certified, actual patch")
        draw_line(
            axes, ratio, table, "certified_estimate", 1, ink, "certified, estimated patch", ":"
        )
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("estimated area / actual area of the patch")
        accuracy_axis(axes, "accuracy")
        add_legend(figure, axes)
    return {"overestimate": figure}


def object_size_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw certified accuracy by the size of the objects (PatchCleanser, Figure 11).

    Args:
        table: of ``analyses.by_object_size``.
        ink: colours.
    """
    measure = certified_column(table)
    with style(ink):
        figure = Figure(figsize=(5.4, 3.4), layout="constrained")
        axes = figure.subplots()
        middle = (table["size_low"] + table["size_high"]) / 2
        axes.bar(
            table["size_low"],
            table[measure],
            width=table["size_high"] - table["size_low"],
            align="edge",
            color=color_of(ink, 0),
            edgecolor=ink.ground,
            linewidth=1.5,
        )
        axes.errorbar(
            middle,
            table[measure],
            yerr=interval_bars(_interval(table, measure)),
            fmt="none",
            ecolor=ink.text,
            capsize=3,
            linewidth=1.2,
        )
        counts = table["count"].map("{:,}".format)
        _annotate(axes, middle, table[f"{measure}_high"], counts, 3)
        edges = sorted({*table["size_low"], *table["size_high"]})
        axes.set_xlim(min(edges), max(edges))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("size of the objects (share of the image's pixels)")
        accuracy_axis(axes, f"{measure.replace('_', ' ')} accuracy")
        axes.set_ylim(0, 1.1)
        axes.set_title("above the bars: number of images", fontsize=9)
    return figure


def class_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw certified accuracy, and the size of the objects, by class (PatchCleanser, Figure 13).

    Args:
        table: of ``analyses.by_class``: classes in order of their certified accuracy.
        ink: colours.
    """
    measure = certified_column(table)
    with_sizes = "object_share" in table.columns
    rank = np.arange(1, len(table) + 1)
    named = len(table) <= _NAMED_CLASSES
    with style(ink):
        width = min(9.0, max(4.8, 0.32 * len(table) + 1.5)) if named else 9.0
        figure = Figure(figsize=(width, 5.2 if with_sizes else 3.4), layout="constrained")
        panels = figure.subplots(2 if with_sizes else 1, 1, sharex=True, squeeze=False)[:, 0]
        axes = panels[0]
        axes.errorbar(
            rank,
            table[measure],
            yerr=interval_bars(_interval(table, measure)) if named else None,
            fmt="o" if named else ".",
            color=color_of(ink, 0),
            capsize=3 if named else 0,
            markersize=6 if named else 3,
            linewidth=1.4,
        )
        accuracy_axis(axes, f"{measure.replace('_', ' ')} accuracy")
        if with_sizes:
            if named:
                panels[1].bar(rank, table["object_share"], color=color_of(ink, 1), width=0.7)
            else:
                panels[1].plot(
                    rank, table["object_share"], ".", color=color_of(ink, 1), markersize=3
                )
            accuracy_axis(panels[1], "mean size of the objects\n(share of the pixels)")
            panels[1].set_ylim(0, 1)
        if named:
            panels[-1].set_xticks(rank, table["name"])
            if max(map(len, table["name"])) > 3:
                panels[-1].tick_params(axis="x", labelrotation=45)
                for tick in panels[-1].get_xticklabels():
                    tick.set(ha="right", rotation_mode="anchor")
            panels[-1].set_xlabel("class, most certified first")
        else:
            panels[-1].set_xlabel("rank of the class, most certified first")
    return figure


@dataclass(frozen=True, eq=False)
class _Series:
    """One line of a figure: an inference algorithm over the budgets of one family of masks.

    Attributes:
        name: for the legend; None for the second line of a colour.
        place: of its colour and marker.
        line: the style of the line.
        rows: of the table, by masks per side.
    """

    name: str | None
    place: int
    line: LineStyle
    rows: pd.DataFrame


def _series(table: pd.DataFrame) -> list[_Series]:
    """Return the lines: a colour each, or where masks are made in several ways one for each way."""
    how = [name for name in ("layout", "multiplicity") if table[name].nunique() > 1]
    ways = list(dict.fromkeys(zip(*(table[name] for name in how), strict=True))) if how else [()]
    series = []
    for place, way in enumerate(ways):
        same = table
        for name, value in zip(how, way, strict=True):
            same = same[same[name] == value]
        words = [f"{name} {value}" for name, value in zip(how, way, strict=True)]
        for number, (algorithm, line) in enumerate(_LINES.items()):
            rows = same[same["inference"] == algorithm]
            rows = rows.loc[_per_side(rows).sort_values().index]
            if not how:
                series.append(_Series(_ALGORITHMS[algorithm], number, line, rows))
            else:
                series.append(_Series(None if number else ", ".join(words), place, line, rows))
    return series


def _has_ways(table: pd.DataFrame) -> bool:
    """Tell whether masks are made in more than one way."""
    return bool(table["layout"].nunique() > 1 or table["multiplicity"].nunique() > 1)


def _styles(table: pd.DataFrame) -> dict[str, LineStyle]:
    """Return the inference algorithms by line style, where colours stand for something else."""
    return {_ALGORITHMS[name]: line for name, line in _LINES.items()} if _has_ways(table) else {}


def _per_side(rows: pd.DataFrame) -> pd.Series[float]:
    """Return the masks per side as one number: of rows and columns, the geometric mean."""
    sides = rows["masks_per_side"].map(lambda text: [int(side) for side in str(text).split("x")])
    return sides.map(lambda pair: math.sqrt(pair[0] * pair[-1])).astype(float)


def _over_masks(axes: Axes, table: pd.DataFrame, measure: str, ink: Ink) -> None:
    """Draw a measure over the masks per side, intervals beside each other."""
    series = _series(table)
    step = 0.09 if f"{measure}_low" in table else 0.0
    for number, one in enumerate(series):
        x = _per_side(one.rows) + step * (number - (len(series) - 1) / 2)
        draw_line(axes, x, one.rows, measure, one.place, ink, one.name, one.line)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(_per_side(table).round(2)))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_xlabel("masks per side")


def draw_line(
    axes: Axes,
    x: pd.Series[Any],
    rows: pd.DataFrame,
    measure: str,
    place: int,
    ink: Ink,
    label: str | None,
    line: LineStyle = "-",
) -> None:
    """Draw a measure over ``x``, with its interval if it has one and a label."""
    has_interval = f"{measure}_low" in rows.columns
    axes.errorbar(
        x,
        rows[measure],
        yerr=interval_bars(_interval(rows, measure)) if has_interval and label else None,
        marker=MARKERS[place % len(MARKERS)],
        linestyle=line,
        color=color_of(ink, place),
        markersize=5,
        capsize=3,
        linewidth=1.6,
        elinewidth=1.0,
        label=label,
    )


def _interval(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return value, low and high of a measure, as ``interval_bars`` takes them."""
    names = {measure: "value", f"{measure}_low": "low", f"{measure}_high": "high"}
    return rows[list(names)].rename(columns=names)


def _annotate(
    axes: Axes, x: pd.Series[Any], y: pd.Series[Any], texts: pd.Series[Any], points: int
) -> None:
    """Write texts so many typographic points above some points."""
    for across, up, text in zip(x, y, texts, strict=True):
        axes.annotate(
            str(text),
            (across, up),
            xytext=(0, points),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )


def _reference(axes: Axes, table: pd.DataFrame, ink: Ink) -> None:
    """Draw the accuracy of the undefended model on clean images as a line across."""
    axes.axhline(
        float(table["vanilla"].iloc[0]),
        color=ink.series[4],
        linestyle=(0, (1, 1.5)),
        linewidth=1.6,
        label="undefended, clean",
    )


def accuracy_axis(axes: Axes, label: str, whole: bool = True) -> None:
    """Show shares as percentages, from 0 to 100% if ``whole``."""
    if whole:
        axes.set_ylim(-0.025, 1.025)
        axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    axes.set_ylabel(label)
    axes.grid(axis="y")


def _forwards_axis(axes: Axes, table: pd.DataFrame) -> None:
    """Name the axis of forwards, with the time that they take on the right."""
    each = float(table["milliseconds"].iloc[0] / table["forwards"].iloc[0])
    axes.set_ylabel("model forwards per image")
    axes.grid(axis="y")
    right = axes.secondary_yaxis(
        "right",
        functions=(lambda count: np.multiply(count, each), lambda time: np.divide(time, each)),
    )
    right.set_ylabel("milliseconds per image")
    if axes.get_yscale() == "log":
        _plain_ticks(right.yaxis)


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10, 20, ..."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def add_legend(figure: Figure, axes: Axes, styles: Mapping[str, LineStyle] | None = None) -> None:
    """Put the legend of some axes above the figure, which grows by its rows.

    Args:
        figure: of the axes.
        axes: whose lines are named.
        styles: what line styles stand for, to be named too.
    """
    styles = styles or {}
    handles, labels = axes.get_legend_handles_labels()
    handles += [
        Line2D([], [], color=axes.xaxis.label.get_color(), linestyle=line)
        for line in styles.values()
    ]
    labels += styles
    widest = 6 + max(map(len, labels))
    columns = min(len(labels), max(1, int(figure.get_figwidth() * _CHARACTERS // widest)))
    figure.set_figheight(figure.get_figheight() + 0.22 * ((len(labels) - 1) // columns))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def color_of(ink: Ink, place: int) -> str:
    """Return the colour of a series by its place in the legend."""
    return ink.series[place % len(ink.series)]
