"""Figures that papers published, for the same data set and a comparable patch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

SOURCE_NOTES = {
    "IBP": "small networks trained from scratch, verified at every place of the patch.",
    "PatchCleanser": "large networks pre-trained on ImageNet and fine-tuned on the data set.",
    "Randomized cropping": "a certificate holds with the stated probability over random crops.",
}
"""What sets the figures of a source apart, for the reader who compares."""

_SQUARE = re.compile(
    r"(?P<height>\d+)x(?P<width>\d+) square|(?P<pixels>\d+)-pixel square|(?P<share>[\d.]+)% square"
)
_SHARE_TOLERANCE = 0.1


def load_published() -> pd.DataFrame:
    """Return the published figures shipped with the package, accuracies in percent.

    The columns: source, table, system, variant, dataset, patch, clean_accuracy,
    certified_accuracy, empirical_accuracy, note; promise (``recovery``, ``top-5 recovery``,
    ``detection`` or ``probabilistic``; empty without a certified figure); space, the size of the
    image whose pixels the patch covers (empty where the source does not say).
    """
    table = pd.read_csv(Path(__file__).with_name("published_results.csv"))
    text = ["variant", "note", "promise", "space"]
    return table.fillna(dict.fromkeys(text, ""))


def comparable(
    dataset: str, threat: dict[str, Any], image_size: tuple[int, int], table: pd.DataFrame
) -> pd.DataFrame:
    """Return the certified figures for the same data set and a square of about the same share.

    A patch is comparable if it is one square allowed anywhere, and its share of the image's pixels
    is within a tenth of the run's: papers round the side, so that 2.4% of 32x32 means 5x5 (2.44%).

    Args:
        dataset: the run's data set, such as ``"cifar10"``.
        threat: the run's threat as ``Threat.to_dict`` writes it.
        image_size: (H, W) of the run's images.
        table: what ``load_published`` returns.

    Returns:
        The rows, highest certified accuracy first, with a new column ``headline``: the highest
        deterministic recovery of its source and system.
    """
    share = _run_share(threat, image_size)
    rows = table[(table["dataset"] == dataset) & table["certified_accuracy"].notna()]
    alike = [
        share is not None
        and published is not None
        and math.isclose(published, share, rel_tol=_SHARE_TOLERANCE)
        for published in map(_published_share, rows["patch"], rows["space"])
    ]
    rows = rows[pd.Series(alike, index=rows.index, dtype=bool)]
    rows = rows.sort_values("certified_accuracy", ascending=False, kind="stable")
    # The rows of a promise other than recovery are each a headline of their own kind.
    first = ~rows.duplicated(["source", "system", "promise"])
    return rows.assign(headline=first & (rows["promise"] != "top-5 recovery"))


def _run_share(threat: dict[str, Any], image_size: tuple[int, int]) -> float | None:
    """Return the square's share of the image's pixels; None for other threats."""
    match threat:
        case {"type": "rectangle", "height": int(side), "width": int(width), "locations": place}:
            if side == width and place == "anywhere":
                return side * side / math.prod(image_size)
    return None


def _published_share(patch: str, space: str) -> float | None:
    """Return the published square's share of the image's pixels; None for other patches."""
    match = _SQUARE.fullmatch(patch)
    if match is None:
        return None
    if match["share"]:
        return float(match["share"]) / 100
    if not space:
        return None
    pixels = int(match["pixels"] or int(match["height"] or 0) * int(match["width"] or 0))
    return pixels / math.prod(int(side) for side in space.split("x"))
