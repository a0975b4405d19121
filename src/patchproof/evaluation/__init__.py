"""Certify and attack data sets: run, resume, store, summarize."""

from patchproof.evaluation.attack import AttackProgress, attack_dataset
from patchproof.evaluation.certify import Progress, certify_dataset
from patchproof.evaluation.store import Gallery, Result, read_result
from patchproof.evaluation.summary import (
    AttackSummary,
    DetectionSummary,
    ProbableSummary,
    Proportion,
    Summary,
    summarize,
    trade_off_table,
)

__all__ = [
    "AttackProgress",
    "AttackSummary",
    "DetectionSummary",
    "Gallery",
    "ProbableSummary",
    "Progress",
    "Proportion",
    "Result",
    "Summary",
    "attack_dataset",
    "certify_dataset",
    "read_result",
    "summarize",
    "trade_off_table",
]
