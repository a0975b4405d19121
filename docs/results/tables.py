"""Print a Markdown table of results folders.

python docs/results/tables.py docs/results/mnist-*
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def percent(figure: dict[str, Any]) -> str:
    return f"{100 * figure['value']:.1f} ({100 * figure['low']:.1f} to {100 * figure['high']:.1f})"


def row(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    masks = manifest["identity"]["defense"]["masks"]
    *_, height, width = max(masks, key=lambda box: box[2] * box[3])
    threat = manifest["identity"]["threat"]
    cells = [
        folder.name,
        f"{threat['height']}x{threat['width']}",
        f"{len(masks)} of {height}x{width}",
        *(
            percent(summary[f"{name}_accuracy"])
            for name in ("vanilla", "clean", "certified", "paper")
        ),
        f"{summary['forwards_per_image']:.1f}",
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
