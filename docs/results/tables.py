"""Print a Markdown table of results folders.

python docs/results/tables.py docs/results/mnist-*
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchproof.threat import threat_from_dict


def percent(figure: dict[str, Any]) -> str:
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def masks_in_words(masks: list[Any]) -> str:
    boxes = [box for mask in masks for box in ([mask] if isinstance(mask[0], int) else mask)]
    *_, height, width = max(boxes, key=lambda box: box[2] * box[3])
    unions = " unions" if any(not isinstance(mask[0], int) for mask in masks) else ""
    largest = "up to " if len({(*box[2:],) for box in boxes}) > 1 else ""
    return f"{len(masks)}{unions} of {largest}{height}x{width}"


def what_is_seen(manifest: dict[str, Any]) -> dict[str, str]:
    """Return the masks of a run, or in the defense's own words what else it looks at."""
    masks = manifest["identity"]["defense"].get("masks")
    if masks:
        return {"masks": masks_in_words(masks)}
    return {"views": manifest["about"]["defense_words"]}


def figures(summary: dict[str, Any]) -> dict[str, str]:
    """Return the accuracies of a run, by the heads of their columns."""
    sound = summary.get("paper", "sound") == "sound"
    paper = "paper condition" if sound else "paper condition (not sound)"
    names = {
        "vanilla_accuracy": "undefended, clean",
        "clean_accuracy": "defended, clean",
        "certified_accuracy": "certified",
        "paper_accuracy": paper,
        "certified_detection_accuracy": "certified detection",
        "alert_rate": "alerts on clean images",
    }
    return {head: percent(summary[name]) for name, head in names.items() if summary.get(name)}


def row(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    defense = manifest["identity"]["defense"]
    return {
        "run": folder.name,
        "patch": threat_from_dict(manifest["identity"]["threat"]).label(),
        **what_is_seen(manifest),
        **({"tau": f"{defense['tau']:g}"} if "tau" in defense else {}),
        **figures(summary),
        "forwards an image": f"{summary['forwards_per_image']:,.1f}",
        "images": f"{summary['count']:,}",
    }


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    head: list[str] = []
    for cells in [row(folder) for folder in folders if (folder / "summary.json").exists()]:
        if list(cells) != head:
            head = list(cells)
            print(f"{line(head)}\n{line(['---'] * len(head))}")
        print(line(cells.values()))
