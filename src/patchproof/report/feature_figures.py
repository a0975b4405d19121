"""Figures of the analyses of local features: pure functions from their tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from patchproof.report.figures import LineStyle, accuracy_axis, add_legend, color_of, draw_line
from patchproof.report.plots import ON_LIGHT, Ink, style

_STYLES: dict[str, LineStyle] = {"certified": "-", "clean": "--"}
_WINDOWS = {
    "masked_accuracy": "accuracy over all windows",
    "images_wrong": "images wrong under some window",
    "windows_changed": "windows that change the prediction",
}
_GAP = {"wspace": 0.06}
_PANEL = 4.2
"""Width of a panel in inches."""
_PER_ROW = 2


def clipping_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw what clipped logits cost undefended models (PatchGuard, Table 6).

    Args:
        table: of ``feature_analyses.clipping``.
        ink: colours.
    """
    names = [
        f"[{_number(low)}, {_number(high)}]"
        for low, high in zip(table["clipped_below"], table["clipped_above"], strict=True)
    ]
    with style(ink):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.subplots()
        places = _places(axes, names)
        for number, (model, rows) in enumerate(table.groupby("model", sort=False)):
            x = pd.Series(places, index=table.index)[rows.index]
            draw_line(axes, x, rows, "vanilla", number, ink, str(model))
        axes.set_xlabel("clipping bounds of local logits")
        accuracy_axis(axes, "undefended, clean accuracy", whole=False)
        add_legend(figure, axes)
    return figure


def windows_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw what leaving windows of features out does to undefended models (PatchGuard, Table 7).

    Args:
        table: of ``feature_analyses.masked_windows``.
        ink: colours.
    """
    with style(ink):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        panels = figure.subplots(1, 3, gridspec_kw=_GAP)
        for axes, (measure, title) in zip(panels, _WINDOWS.items(), strict=True):
            for number, (model, rows) in enumerate(table.groupby("model", sort=False)):
                draw_line(axes, rows["window_side"], rows, measure, number, ink, str(model))
            axes.set_xlabel("side of the window (features)")
            axes.xaxis.set_major_locator(FixedLocator(sorted(set(table["window_side"]))))
            accuracy_axis(axes, "", whole=False)
            axes.set_title(title, fontsize=9)
        for axes in panels[1:]:
            axes.set_ylim(bottom=0)
        add_legend(figure, panels[0])
    return figure


def receptive_field_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw accuracies over what a feature sees (PatchGuard, Table 8).

    Args:
        table: of ``feature_analyses.robustness``.
        ink: colours.
    """
    pixels = table["receptive_field"].map(lambda text: max(map(int, str(text).split("x"))))
    with style(ink):
        figure = Figure(figsize=(5.6, 3.8), layout="constrained")
        axes = figure.subplots()
        order = table.assign(pixels=pixels).sort_values("pixels", kind="stable")
        _families(axes, order, order["pixels"], "threat", ink)
        axes.xaxis.set_major_locator(FixedLocator(sorted(set(pixels))))
        axes.set_xlabel("receptive field of a feature (pixels, longest side)")
        accuracy_axis(axes, "accuracy")
        add_legend(figure, axes, _STYLES)
    return figure


def training_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw accuracies by how classifiers were trained (PatchGuard, Table 14).

    Args:
        table: of ``feature_analyses.robustness``.
        ink: colours.
    """
    models = list(dict.fromkeys(table["model"]))
    with style(ink):
        figure = Figure(figsize=(max(5.6, 1.5 * len(models) + 1.5), 3.8), layout="constrained")
        axes = figure.subplots()
        places = pd.Series(_places(axes, list(table["model"])), index=table.index)
        _families(axes, table, places, "threat", ink, joined=False)
        axes.set_xlim(-0.5, len(models) - 0.5)
        accuracy_axis(axes, "accuracy")
        add_legend(figure, axes)
        axes.set_title("filled: certified, hollow: clean", fontsize=9)
    return figure


def patch_size_figure(
    table: pd.DataFrame, image_size: tuple[int, int], ink: Ink = ON_LIGHT
) -> Figure:
    """Draw how far robust masking goes as the patch grows (PatchGuard, Figure 8).

    Args:
        table: of ``feature_analyses.robustness``.
        image_size: (H, W) in pixels.
        ink: colours.
    """
    height, width = image_size
    with style(ink):
        figure = Figure(figsize=(5.6, 3.8), layout="constrained")
        axes = figure.subplots()
        order = table.sort_values("patch_side", kind="stable")
        _families(axes, order, order["patch_side"], "model", ink)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"longest side of the patch (pixels of the {height}x{width} image)")
        accuracy_axis(axes, "accuracy")
        add_legend(figure, axes, _STYLES)
    return figure


def aggregation_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw secure aggregations of the same features side by side (PatchGuard, Table 4).

    Args:
        table: of ``feature_analyses.aggregations``.
        ink: colours.
    """
    models = list(table.groupby("model", sort=False))
    defenses = list(dict.fromkeys(table["defense"]))
    with style(ink):
        width = max(5.6, 1.15 * len(defenses) + 1.2)
        figure = Figure(figsize=(width, 3.0 * len(models) + 0.6), layout="constrained")
        panels = figure.subplots(len(models), 1, squeeze=False, sharex=True)[:, 0]
        places = pd.Series(_places(panels[-1], list(table["defense"])), index=table.index)
        for axes, (model, rows) in zip(panels, models, strict=True):
            _families(axes, rows, places, "threat", ink, joined=False)
            axes.set_title("" if len(models) == 1 else str(model), fontsize=9)
            axes.set_xlim(-0.5, len(defenses) - 0.5)
            accuracy_axis(axes, "accuracy")
        figure.supxlabel("filled: certified, hollow: clean", fontsize=9)
        add_legend(figure, panels[0])
    return figure


def threshold_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw what a detection threshold does (PatchGuard, Table 9).

    Args:
        table: of ``feature_analyses.thresholds``.
        ink: colours.
    """

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        order = rows.sort_values("threshold")
        x = order["threshold"]
        draw_line(axes, x, order, "clean", 2, ink, "clean")
        draw_line(axes, x, order, "certified", 0, ink, "certified")
        draw_line(axes, x, order, "paper", 3, ink, "paper condition (unsound for T > 0)", ":")
        draw_line(axes, x, order, "false_positives", 1, ink, "false positives of detection", "--")
        axes.set_xlabel("threshold T")
        accuracy_axis(axes, "share of the images")

    return _panels(table, ["model", "threat"], draw, ink)


def feature_type_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw accuracies by feature type (PatchGuard, Tables 10 and 11).

    Args:
        table: of ``feature_analyses.feature_types``.
        ink: colours.
    """

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        places = pd.Series(_places(axes, list(rows["threat"])), index=rows.index)
        _families(axes, rows, places, "feature", ink, joined=False)
        axes.set_xlim(-0.5, places.max() + 0.5)
        accuracy_axis(axes, "accuracy")

    return _panels(table, ["model"], draw, ink, note="filled: certified, hollow: clean")


def overlarge_mask_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw what windows for a larger patch achieve (PatchGuard, Table 12).

    Args:
        table: of ``feature_analyses.overlarge_masks``.
        ink: colours.
    """

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        order = rows.sort_values("mask_side", kind="stable")
        _families(axes, order, order["mask_side"], "threat", ink)
        axes.xaxis.set_major_locator(FixedLocator(sorted(set(table["mask_side"]))))
        axes.set_xlabel("side of the patch that the windows are for (pixels)")
        accuracy_axis(axes, "accuracy")

    return _panels(table, ["model"], draw, ink, _STYLES)


def top_k_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw accuracies among the k best classes (PatchGuard, Table 15).

    Args:
        table: of ``feature_analyses.top_classes``.
        ink: colours.
    """

    def draw(axes: Axes, rows: pd.DataFrame) -> None:
        order = rows.sort_values("k", kind="stable")
        _families(axes, order, order["k"], "threat", ink)
        axes.xaxis.set_major_locator(FixedLocator(sorted(set(table["k"]))))
        axes.set_xlabel("k: the right class is among so many")
        accuracy_axis(axes, "accuracy")

    return _panels(table, ["model"], draw, ink, _STYLES)


def local_logit_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw histograms of local logits on clean and attacked images (PatchGuard, Figure 3).

    Args:
        table: the histogram of ``feature_analyses.attacked_logits``.
        ink: colours.
    """
    models = list(dict.fromkeys(table["model"]))
    with style(ink):
        figure = Figure(figsize=(2 * _PANEL, 2.9 * len(models) + 0.3), layout="constrained")
        panels = figure.subplots(len(models), 2, sharey="row", sharex="row", squeeze=False)
        for row, (model, of_model) in enumerate(table.groupby("model", sort=False)):
            for axes, (image, rows) in zip(
                panels[row], of_model.groupby("image", sort=False), strict=True
            ):
                for place, (evidence, series) in enumerate(rows.groupby("evidence", sort=False)):
                    edges = [*series["bin_low"], float(series["bin_high"].iloc[-1])]
                    _outline(axes, series["features"], edges, color_of(ink, place), str(evidence))
                title = f"{image} images"
                axes.set_title(title if len(models) == 1 else f"{model}, {title}", fontsize=9)
                axes.set_yscale("log")
                axes.set_xlabel("local logit")
                axes.grid(axis="y")
            panels[row][0].set_ylim(bottom=0.7)
            panels[row][0].set_ylabel("number of features")
        add_legend(figure, panels[0][0])
    return figure


def large_logit_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw how large local logits of attacked images are (PatchGuard, Figure 3).

    Only positive ones are drawn. Networks have other numbers of features, hence shares.

    Args:
        table: the histogram of ``feature_analyses.attacked_logits``.
        ink: colours.
    """
    models = list(table[table["image"] == "attacked"].groupby("model", sort=False))
    with style(ink):
        figure = Figure(figsize=(3.2 * len(models) + 0.8, 3.2), layout="constrained")
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, (model, rows) in zip(panels, models, strict=True):
            for place, (evidence, series) in enumerate(rows.groupby("evidence", sort=False)):
                positive = series["bin_low"] >= 0
                edges = [*series["bin_low"][positive], float(series["bin_high"].iloc[-1])]
                shares = series["features"][positive] / series["features"].sum()
                _outline(axes, shares, edges, color_of(ink, place), str(evidence))
            axes.set_title(str(model), fontsize=9)
            axes.set_yscale("log")
            axes.set_xlabel("local logit, positive ones")
            axes.grid(axis="y")
        panels[0].set_ylabel("share of the features\nof attacked images")
        add_legend(figure, panels[0])
    return figure


def _outline(
    axes: Axes, heights: pd.Series[Any], edges: list[float], color: str, label: str
) -> None:
    """Draw a histogram as its outline, lightly filled."""
    axes.stairs(heights, edges, fill=True, alpha=0.25, color=color, linewidth=1.4)
    axes.stairs(heights, edges, color=color, linewidth=1.4, label=label)


def _families(
    axes: Axes, table: pd.DataFrame, x: pd.Series[Any], by: str, ink: Ink, joined: bool = True
) -> None:
    """Draw certified and clean accuracy over ``x``, in a colour for each value of a column.

    Args:
        axes: to draw in.
        table: with both accuracies.
        x: of each row.
        by: the column.
        ink: colours.
        joined: as lines, clean accuracy dashed; otherwise as points beside each other, those of
            clean accuracy hollow.
    """
    groups = list(table.groupby(by, sort=False))
    for place, (name, rows) in enumerate(groups):
        at = x[rows.index]
        if joined:
            draw_line(axes, at, rows, "certified", place, ink, str(name))
            draw_line(axes, at, rows, "clean", place, ink, None, "--")
            continue
        beside = at + 0.16 * (place - (len(groups) - 1) / 2)
        draw_line(axes, beside, rows, "certified", place, ink, str(name), "")
        lines_before = len(axes.lines)
        draw_line(axes, beside, rows, "clean", place, ink, None, "")
        for line in axes.lines[lines_before:]:
            line.set_markerfacecolor(ink.ground)


def _panels(
    table: pd.DataFrame,
    by: list[str],
    draw: Callable[[Axes, pd.DataFrame], None],
    ink: Ink,
    styles: dict[str, LineStyle] | None = None,
    note: str = "",
) -> Figure:
    """Draw a panel for each value of some columns, with one legend.

    Args:
        table: of an analysis.
        by: the columns; those with one value are not named.
        draw: a panel from its rows.
        ink: colours.
        styles: what line styles stand for.
        note: below all panels.
    """
    groups = list(table.groupby(by, sort=False))
    named = [column for column in by if table[column].nunique() > 1]
    rows, columns = -(-len(groups) // _PER_ROW), min(_PER_ROW, len(groups))
    with style(ink):
        width = 5.6 if columns == 1 else _PANEL * columns
        figure = Figure(figsize=(width, 3.4 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        for number, (axes, (_, group)) in enumerate(zip(panels, groups, strict=False)):
            draw(axes, group)
            if number % columns:
                axes.set_ylabel("")
            axes.set_title(", ".join(str(group[name].iloc[0]) for name in named), fontsize=9)
        for axes in panels[len(groups) :]:
            axes.set_axis_off()
        if note:
            figure.supxlabel(note, fontsize=9)
        add_legend(figure, panels[0], styles)
    return figure


def _places(axes: Axes, names: list[str]) -> list[int]:
    """Name places on the axis by the distinct names in their order, and return each one's."""
    distinct = list(dict.fromkeys(names))
    axes.set_xticks(range(len(distinct)), distinct)
    if sum(map(len, distinct)) > 50:
        axes.tick_params(axis="x", labelrotation=20)
        for tick in axes.get_xticklabels():
            tick.set(ha="right", rotation_mode="anchor")
    return [distinct.index(name) for name in names]


def _number(value: float) -> str:
    if np.isinf(value):
        return "\N{MINUS SIGN}\N{INFINITY}" if value < 0 else "\N{INFINITY}"
    return f"{value:g}"
