"""The folder of an analysis: how it was made, its tables and its figures."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from patchproof.errors import PatchproofError
from patchproof.evaluation.store import check_same_run
from patchproof.models import write_atomically

FORMAT = "patchproof-analysis/1"

_FILE = "analysis.json"
_HEADINGS = {
    "masks_per_side": "masks per side",
    "mask_pixels": "largest mask (pixels)",
    "forwards": "forwards per image",
    "forwards_most": "most forwards",
    "milliseconds": "ms per image",
    "paper": "paper condition",
    "certified_estimate": "certified against the estimate",
    "patch": "patch side (pixels)",
    "patch_share": "patch (share of the image)",
    "estimate": "estimated side (pixels)",
    "area_ratio": "estimated / actual area",
    "size_low": "objects from (share of the image)",
    "size_high": "to",
    "object_share": "objects (mean share of the image)",
    "objects": "images with objects",
    "threat": "patch",
    "receptive_field": "sees (pixels)",
    "patch_side": "longest side of the patch (pixels)",
    "mask_side": "windows for a patch of (pixels)",
    "window_side": "side of the window (features)",
    "threshold": "T",
    "false_positives": "detection on clean images",
    "images_wrong": "images wrong under some window",
    "windows_changed": "windows that change the prediction",
    "wrong_features": "wrong local predictions",
    "largest_true": "largest logit of the true class",
    "largest_malicious": "of the malicious class",
    "positions": "told where",
    "turn_interval": "votes to turn: interval",
    "turn_variance": "variance",
    "chance_interval": "p_c: interval",
    "chance_variance": "variance of p_c",
    "vanilla_attacked": "undefended, attacked",
    "wrong_attacked": "wrong local, attacked",
    "wrong_original": "original",
    "wrong_more": "difference",
    "wrong_global": "wrong global, attacked",
    "wrong_global_original": "wrong global, original",
}
_SHARES = {
    *("vanilla", "clean", "certified", "certified_detection", "paper"),
    *("certified_estimate", "agreement"),
    *("patch_share", "area_ratio", "size_low", "size_high", "object_share"),
    *("certified_with_probability", "chance_interval"),
    *("attacked", "vanilla_attacked"),
    *("masked_accuracy", "images_wrong", "windows_changed", "false_positives", "wrong_features"),
    *("wrong_attacked", "wrong_original", "wrong_more", "wrong_global", "wrong_global_original"),
    *("empirical", "gap"),
}
"""Columns that are written as percentages."""
_PLAIN = {
    *("clipped_below", "clipped_above", "threshold", "probability", "chance_variance"),
    *("smoothing", "fill"),
}
"""Columns that are written as they were given."""


@dataclass(frozen=True)
class AnalysisFolder:
    """Where the tables and figures of one analysis go.

    Attributes:
        path: the folder; it is made when something is written.
        identity: all that decides the tables, as JSON values.
    """

    path: Path
    identity: Mapping[str, Any]

    def check(self) -> None:
        """Raise ``PatchproofError`` if the folder holds anything but this analysis."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise PatchproofError(f"{self.path}: expected a folder for the analysis, got a file")
        file = self.path / _FILE
        if not file.is_file():
            if others := sorted(entry.name for entry in self.path.iterdir()):
                raise PatchproofError(
                    f"{self.path}: expected an empty folder or the same analysis, got a folder "
                    f"that holds {', '.join(others[:3])}"
                )
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PatchproofError(f"{file}: expected JSON, got {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise PatchproofError(f"{file}: expected the format {FORMAT}, got another")
        check_same_run(self.path, found, {"identity": self.identity})

    def write(
        self,
        tables: Mapping[str, pd.DataFrame],
        figures: Mapping[str, Figure],
        about: Mapping[str, Any],
    ) -> list[Path]:
        """Write ``analysis.json``, each table as CSV and Markdown, each figure as PNG and SVG.

        Args:
            tables: by the name of their files.
            figures: by the name of their files.
            about: how the analysis was made, as JSON values.

        Returns:
            The files.

        Raises:
            RunError: a file cannot be written.
        """
        content = {"format": FORMAT, "identity": dict(self.identity), "about": dict(about)}
        files = {_FILE: (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()}
        for name, table in tables.items():
            files[f"{name}.csv"] = table.to_csv(index=False, float_format="%.6g").encode()
            files[f"{name}.md"] = markdown(table).encode()
        for name, figure in figures.items():
            files[f"{name}.png"] = _drawn(figure, "png")
            files[f"{name}.svg"] = _drawn(figure, "svg")
        for name, file in files.items():
            write_atomically(self.path / name, file)
        return [self.path / name for name in files]


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown: an accuracy and its interval in one column."""
    columns = cells(table)
    numeric = [
        all(cell[:1].isdigit() or not cell for cell in column) for column in columns.values()
    ]
    rows = [
        list(columns),
        ["---:" if right else "---" for right in numeric],
        *map(list, zip(*columns.values(), strict=True)),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cells(table: pd.DataFrame, intervals: bool = True) -> dict[str, list[str]]:
    """Return a table of an analysis as texts, by the heading of each column.

    Args:
        table: an accuracy ``x`` may have the ends of its interval in ``x_low`` and ``x_high``.
        intervals: write them into the column of the accuracy.
    """
    names = list(map(str, table.columns))
    ends = {f"{name}{end}" for name in names for end in ("_low", "_high")}
    columns = {}
    for name in names:
        if name in ends:
            continue
        texts = [_cell(name, value) for value in table[name]]
        if intervals and f"{name}_low" in names:
            interval = zip(table[f"{name}_low"], table[f"{name}_high"], strict=True)
            texts = [
                f"{text} ({low:.1%} to {high:.1%})" if text else ""
                for text, (low, high) in zip(texts, interval, strict=True)
            ]
        columns[_HEADINGS.get(name, name.replace("_", " "))] = texts
    return columns


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool) or str(value) in ("True", "False"):
        return "yes" if value else ""
    if isinstance(value, float):
        if value != value:
            return ""
        if name in _PLAIN:
            return f"{value:g}"
        return f"{value:.1%}" if name in _SHARES else f"{value:,.2f}"
    return str(value).replace("|", "\\|")


def _drawn(figure: Figure, kind: str) -> bytes:
    """Return a figure as a file on a white ground, the same bytes each time."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    with mpl.rc_context({"svg.hashsalt": "patchproof"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=200, facecolor="white", metadata=metadata)
    return buffer.getvalue()
