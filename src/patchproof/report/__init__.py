"""Plots, published figures, and the report: one self-contained HTML page of one or more runs."""

from patchproof.report.page import write_report
from patchproof.report.plots import (
    ON_DARK,
    ON_LIGHT,
    Ink,
    accuracy_figure,
    budget_figure,
    heat,
)
from patchproof.report.published import comparable, load_published

__all__ = [
    "ON_DARK",
    "ON_LIGHT",
    "Ink",
    "accuracy_figure",
    "budget_figure",
    "comparable",
    "heat",
    "load_published",
    "write_report",
]
