"""Print the table of a square stretched or turned (randomized cropping, Table 4) as Markdown.

python docs/results/transformations.py docs/results/transformations-*
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tables import line, percent

from patchproof.threat import threat_from_dict

KINDS = {
    "1to1": "1:1",
    "2.7to1": "2.7:1",
    "6to1": "6:1",
    "1to2.7": "1:2.7",
    "1to6": "1:6",
    "bounds": "turned 45 degrees, bounding",
    "rotated": "turned 45 degrees",
    "worst": "worst case of all but bounding",
    "all": "worst case of all",
}
"""Rows of Table 4, by the end of a run's name: transformations-DEFENSE-KIND."""

PUBLISHED = {
    "derandomized-smoothing": (57.1, 65.8, 71.1, 40.6, 17.5, 50.3, None, 17.5),
    "patchguard-band": (58.1, 67.2, 74.5, 42.4, 18.2, 52.1, None, 18.2),
    "patchguard-bagnet": (31.7, 30.4, 27.1, 30.4, 27.1, 28.1, None, 27.1),
    "randomized-cropping": (52.3, 50.7, 47.5, 50.7, 47.5, 48.0, None, 47.5),
}
"""Table 4, CIFAR-10 at 2.4%: of each row, by the beginning of DEFENSE."""


def cell(defense: str, kind: str, runs: dict[str, dict[str, Any]]) -> str:
    """Return what is certified, in brackets what the paper gives, and another number of images."""
    if kind not in runs:
        return ""
    summary, count = runs[kind], runs[kind]["count"]
    figures = [of for start, of in PUBLISHED.items() if defense.startswith(start)]
    published = [dict(zip(KINDS, of, strict=False)).get(kind) for of in figures]
    known = "".join(f" [{figure}]" for figure in published if figure)
    other = f", {count:,} images" if count != runs["1to1"]["count"] else ""
    return percent(summary["certified_accuracy"]) + known + other


if __name__ == "__main__":
    summaries: dict[str, dict[str, dict[str, Any]]] = {}
    patches: dict[str, str] = {}
    for folder in map(Path, sys.argv[1:]):
        defense, _, kind = folder.name.removeprefix("transformations-").rpartition("-")
        manifest = json.loads((folder / "manifest.json").read_text())
        patches[kind] = threat_from_dict(manifest["identity"]["threat"]).label()
        summary = json.loads((folder / "summary.json").read_text())
        summaries.setdefault(defense, {})[kind] = summary
    print(line(["height : width", "patch", *summaries]))
    print(line(["---"] * (2 + len(summaries))))
    for kind in filter(patches.get, KINDS):
        cells = (cell(defense, kind, runs) for defense, runs in summaries.items())
        print(line([KINDS[kind], patches[kind], *cells]))
    squares = [runs["1to1"] for runs in summaries.values()]
    print(line(["clean, at 1:1", "", *(percent(summary["clean_accuracy"]) for summary in squares)]))
    print(line(["images", "", *(f"{summary['count']:,}" for summary in squares)]))
