"""Print a Markdown table of results folders.

python docs/results/tables.py docs/results/mnist-*
"""

from __future__ import annotations

import json
import sys
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


def row(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    threat = threat_from_dict(manifest["identity"]["threat"])
    cells = [
        folder.name,
        threat.label(),
        masks_in_words(manifest["identity"]["defense"]["masks"]),
        *(
            percent(summary[f"{name}_accuracy"])
            for name in ("vanilla", "clean", "certified", "paper")
        ),
        f"{summary['forwards_per_image']:,.1f}",
        f"{summary['count']:,}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = (
    "run",
    "patch",
    "masks",
    "undefended, clean",
    "defended, clean",
    "certified",
    "paper condition",
    "forwards an image",
    "images",
)

if __name__ == "__main__":
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}")
    for argument in sys.argv[1:]:
        if (Path(argument) / "summary.json").exists():
            print(row(Path(argument)))
