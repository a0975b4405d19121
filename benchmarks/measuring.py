"""What the benchmarks measure with: medians of repeated pairs, one right after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Clock = Callable[[], float]


def seconds(work: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Return how long some work takes."""
    start = clock()
    work()
    return clock() - start


def pairs(
    repeats: int,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Return the medians of seconds of both and of their ratio, theirs over ours."""
    ours(), theirs()
    measured = [(seconds(ours, clock), seconds(theirs, clock)) for _ in range(repeats)]
    return {
        "ours": statistics.median(ours for ours, _ in measured),
        "theirs": statistics.median(theirs for _, theirs in measured),
        "ratio": statistics.median(theirs / ours for ours, theirs in measured),
    }
