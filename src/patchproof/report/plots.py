"""Figures: pure functions from tables to Matplotlib figures, legible and colour-blind safe."""

from __future__ import annotations

import io
import textwrap
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

COLORMAP = "inferno"
"""Of the vulnerability maps: perceptually uniform, dark where every region holds."""


@dataclass(frozen=True)
class Ink:
    """The colours of a figure on a transparent ground.

    Attributes:
        text: labels and axes.
        ground: of the page; behind labels on grid lines.
        grid: grid lines.
        series: colours told apart by readers with any colour vision, in order of use.
    """

    text: str
    ground: str
    grid: str
    series: tuple[str, ...]


ON_LIGHT = Ink(
    "#1b1f24", "#ffffff", "#d5d9de", ("#0062a3", "#b34700", "#007a5a", "#8f4579", "#5c5c5c")
)
ON_DARK = Ink(
    "#e8eaed", "#14171b", "#3d444d", ("#62b5f0", "#f09a4a", "#35c79a", "#e29ac8", "#b8b8b8")
)

_LABEL_WIDTH = 60
_LEGEND = 45
"""Characters of the names in one row of a legend."""
MARKERS = ("o", "s", "^", "D", "v")
_SHOWN_TAUS = (0.5, 0.7, 0.9, 0.99)
"""Confidences that are marked on a curve over tau."""


def accuracy_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw accuracies with their intervals, one row of the figure a run.

    Args:
        table: one row an accuracy: run (its label), measure (``"certified"``, ...), value, low,
            high (in [0, 1]; NaN is left out). Runs and measures keep their order.
        ink: colours.
    """
    runs = list(dict.fromkeys(table["run"]))
    measures = list(dict.fromkeys(table["measure"]))
    labels = [textwrap.fill(run, _LABEL_WIDTH) for run in runs]
    label_lines = 1 + max((label.count("\n") for label in labels), default=0)
    lines = len(measures) + label_lines + 0.4
    with style(ink):
        figure = Figure(figsize=(5.0, 0.9 + 0.24 * lines * len(runs)), layout="constrained")
        axes = figure.subplots()
        for place, measure in enumerate(measures):
            rows = table[(table["measure"] == measure) & table["value"].notna()]
            offset = (place + label_lines + 0.2) / lines
            heights = [runs.index(run) + offset for run in rows["run"]]
            color = ink.series[place % len(ink.series)]
            axes.errorbar(
                rows["value"],
                heights,
                xerr=interval_bars(rows),
                fmt=MARKERS[place % len(MARKERS)],
                color=color,
                markerfacecolor="none" if measure.startswith("paper") else color,
                markersize=6,
                capsize=3,
                linewidth=1.4,
                label=measure,
            )
            for value, height, high in zip(rows["value"], heights, rows["high"], strict=True):
                axes.annotate(
                    f"{100 * value:.1f}",
                    (high, height),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                    color=color,
                )
        for height, label in enumerate(labels):
            axes.annotate(
                label,
                (0, height + (label_lines - 0.2) / lines),
                xytext=(2, 0),
                textcoords="offset points",
                va="bottom",
                in_layout=False,
                bbox={"facecolor": ink.ground, "edgecolor": "none", "pad": 1.0},
            )
        axes.set_yticks([])
        axes.set_ylim(len(runs), -0.1)
        axes.set_xlim(0, 1.09)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("share of the images, with 95% interval")
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        figure.legend(
            loc="outside upper center",
            ncols=len(measures) if sum(map(len, measures)) < _LEGEND else 2,
            frameon=False,
            handletextpad=0.3,
            columnspacing=1.2,
        )
    return figure


def budget_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw certified accuracy over the budget of masks, one line a patch.

    Args:
        table: one row a run: patch (its label), budget (masks per side), value, low, high (in
            [0, 1]; NaN is left out).
        ink: colours.
    """
    with style(ink):
        figure = Figure(figsize=(5.0, 3.2), layout="constrained")
        axes = figure.subplots()
        for place, patch in enumerate(dict.fromkeys(table["patch"])):
            rows = table[(table["patch"] == patch) & table["value"].notna()].sort_values("budget")
            axes.errorbar(
                rows["budget"],
                rows["value"],
                yerr=interval_bars(rows),
                marker=MARKERS[place % len(MARKERS)],
                color=ink.series[place % len(ink.series)],
                capsize=3,
                linewidth=1.6,
                label=patch,
            )
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("budget: masks per side")
        axes.set_ylabel("certified accuracy")
        axes.grid(axis="y")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def trade_off_figure(table: pd.DataFrame, points: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw certified detection accuracy over clean accuracy as tau varies, and single runs.

    Args:
        table: the curves, in order of tau: curve (which), tau, clean_accuracy and
            certified_detection_accuracy (in [0, 1]).
        points: one row a run: run (its label), kind, clean and certified (in [0, 1]). Runs of
            another kind than detection are drawn hollow.
        ink: colours.
    """
    with style(ink):
        figure = Figure(figsize=(5.0, 4.0), layout="constrained")
        axes = figure.subplots()
        for place, (_, rows) in enumerate(table.groupby("curve", sort=True)):
            color = ink.series[place % len(ink.series)]
            axes.plot(
                rows["clean_accuracy"],
                rows["certified_detection_accuracy"],
                color=color,
                linewidth=1.6,
            )
            for tau in _SHOWN_TAUS:
                row = rows.iloc[int(np.searchsorted(rows["tau"], tau))]
                spot = (row["clean_accuracy"], row["certified_detection_accuracy"])
                axes.plot(*spot, ".", color=color)
                axes.annotate(
                    f"tau {tau:g}",
                    spot,
                    xytext=(-5, -3),
                    textcoords="offset points",
                    ha="right",
                    va="top",
                    fontsize=8,
                    color=color,
                )
        for place, point in enumerate(points.to_dict("records")):
            detects = point["kind"] == "detection"
            axes.plot(
                point["clean"],
                point["certified"],
                MARKERS[place % len(MARKERS)],
                markersize=8,
                markeredgecolor=ink.text,
                markerfacecolor=ink.text if detects else "none",
                label=f"{point['run']}: certified {point['kind']}",
                linestyle="none",
            )
        axes.margins(0.1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("clean accuracy: right, and no alert")
        others = [kind for kind in dict.fromkeys(points["kind"]) if kind != "detection"]
        axes.set_ylabel(
            "\n".join(["certified detection accuracy", *(f"hollow: certified {k}" for k in others)])
        )
        axes.grid()
        figure.legend(loc="outside upper center", frameon=False)
    return figure


def sandwich_figure(table: pd.DataFrame, ink: Ink = ON_LIGHT) -> Figure:
    """Draw one bar a defense: the images that are certified, in the gap, and broken by a patch.

    The upper end of the first part is the certified accuracy, that of the gap the accuracy under
    attack: the true one lies between them. What is missing to the right is wrong without a patch.

    Args:
        table: of ``sandwich.sandwich_table``, of runs that promise the same.
        ink: colours.
    """
    labels = [textwrap.fill(run, _LABEL_WIDTH) for run in table["run"]]
    label_lines = 1 + max(label.count("\n") for label in labels)
    lines = label_lines + 3.0
    places = np.arange(len(table)) + (label_lines + 0.9) / lines
    contradicted = table["certified_and_broken"] / table["count"]
    certified = table["certified"] - contradicted
    broken = (table["broken_images"] - table["certified_and_broken"]).clip(lower=0) / table["count"]
    fine, bad = ink.series[0], ink.series[1]
    parts: list[tuple[str, pd.Series[Any], dict[str, Any]]] = [
        ("certified", certified, {"color": fine}),
        ("certified and broken: a bug", contradicted, {"color": ink.text, "hatch": "xx"}),
        ("gap", table["gap"], {"facecolor": "none", "edgecolor": fine, "hatch": "////"}),
        ("broken by a patch", broken, {"color": bad}),
    ]
    with style(ink):
        figure = Figure(figsize=(5.0, 0.9 + 0.24 * lines * len(table)), layout="constrained")
        axes = figure.subplots()
        left = pd.Series(0.0, index=table.index)
        for name, width, look in parts:
            if width.any():
                axes.barh(places, width, 1.3 / lines, left, linewidth=0.8, label=name, **look)
            left = left + width
        for measure, below, face in (("certified", 1.0, ink.text), ("empirical", 1.5, ink.ground)):
            ends = {end: table[f"{measure}_{end}"] for end in ("low", "high")}
            axes.errorbar(
                table[measure],
                places + below / lines,
                xerr=interval_bars(pd.DataFrame({"value": table[measure], **ends})),
                fmt="o",
                markersize=4,
                markerfacecolor=face,
                color=ink.text,
                capsize=2,
                linewidth=1.2,
            )
        for row, (place, label) in enumerate(zip(places, labels, strict=True)):
            axes.annotate(
                label,
                (0, row + (label_lines + 0.1) / lines),
                xytext=(2, 0),
                textcoords="offset points",
                va="bottom",
                in_layout=False,
            )
            low, high = (100 * table[measure].iloc[row] for measure in ("certified", "empirical"))
            axes.annotate(
                f"{low:.1f} to {high:.1f}",
                (1, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                annotation_clip=False,
            )
        axes.set_yticks([])
        axes.set_ylim(len(table), -0.1)
        axes.set_xlim(0, 1)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel(
            "share of the attacked images\n"
            "95% intervals of certified (filled) and empirical accuracy"
        )
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        figure.legend(
            loc="outside upper center",
            ncols=3 if not contradicted.any() else 2,
            frameon=False,
            handletextpad=0.5,
            columnspacing=1.2,
        )
    return figure


def heat(vulnerability: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a vulnerability map (H, W) as colours (H, W, 4); 0 and 1 are the scale's ends."""
    colors = mpl.colormaps[COLORMAP](np.clip(vulnerability, 0.0, 1.0), bytes=True)
    return np.asarray(colors, dtype=np.uint8)


def heat_scale(stops: int = 9) -> list[str]:
    """Return the colours of the map's scale from 0 to 1, as ``#rrggbb``."""
    return [mpl.colors.to_hex(color) for color in mpl.colormaps[COLORMAP](np.linspace(0, 1, stops))]


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels (H, W, 3 or 4) as a PNG file."""
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()


def figure_png(figure: Figure, dpi: int = 200) -> bytes:
    """Return a figure as a PNG file with a transparent ground."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, transparent=True)
    return buffer.getvalue()


def data_uri(png_file: bytes) -> str:
    """Return a PNG file as a URI that carries it whole."""
    return "data:image/png;base64," + b64encode(png_file).decode("ascii")


def interval_bars(rows: pd.DataFrame) -> NDArray[Any]:
    """Return the interval's distances below and above the values, (2, rows)."""
    below, above = rows["value"] - rows["low"], rows["high"] - rows["value"]
    return np.asarray([below, above], dtype=np.float64).clip(min=0.0)


@contextmanager
def style(ink: Ink) -> Iterator[None]:
    """Set text sizes and colours for the figures made inside."""
    with mpl.rc_context(
        {
            "font.size": 10.0,
            "text.color": ink.text,
            "axes.labelcolor": ink.text,
            "axes.edgecolor": ink.grid,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "xtick.color": ink.text,
            "ytick.color": ink.text,
            "grid.color": ink.grid,
        }
    ):
        yield
