"""Certify data sets: run, resume, store, summarize."""

from patchproof.evaluation.certify import Progress, certify_dataset
from patchproof.evaluation.store import Gallery, Result, read_result
from patchproof.evaluation.summary import Proportion, Summary, summarize

__all__ = [
    "Gallery",
    "Progress",
    "Proportion",
    "Result",
    "Summary",
    "certify_dataset",
    "read_result",
    "summarize",
]
