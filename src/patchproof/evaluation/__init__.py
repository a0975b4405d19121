"""Certify data sets: run, resume, store, summarize."""

from patchproof.evaluation.certify import Progress, certify_dataset
from patchproof.evaluation.store import Gallery, Result, read_result
from patchproof.evaluation.summary import (
    DetectionSummary,
    ProbableSummary,
    Proportion,
    Summary,
    summarize,
    trade_off_table,
)

__all__ = [
    "DetectionSummary",
    "Gallery",
    "ProbableSummary",
    "Progress",
    "Proportion",
    "Result",
    "Summary",
    "certify_dataset",
    "read_result",
    "summarize",
    "trade_off_table",
]
