"""Plots, published figures, and the report: one self-contained HTML page of one or more runs."""

from patchproof.report.page import write_report
from patchproof.report.plots import (
    ON_DARK,
    ON_LIGHT,
    Ink,
    accuracy_figure,
    budget_figure,
    heat,
    trade_off_figure,
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
    "trade_off_figure",
    "write_report",
]
