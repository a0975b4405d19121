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
_SHAPE = re.compile(
    r"(?P<sparse>\d+) pixels?|(?P<pixels>\d+)-pixel (?P<kind>rectangle|line|diamond|parallelogram)"
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
    """Return the certified figures for the same data set and a comparable patch.

    A square allowed anywhere is comparable if its share of the image's pixels is within a tenth of
    the run's: papers round the side, so that 2.4% of 32x32 means 5x5 (2.44%). Sparse pixels, lines,
    diamonds, parallelograms and rectangles are if there are as many pixels of an image of the same
    size; of rectangles a few more, where the number has no such sides.

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
    space = f"{image_size[0]}x{image_size[1]}"
    rows = table[(table["dataset"] == dataset) & table["certified_accuracy"].notna()]
    alike = [
        _of_the_same_share(share, _published_share(patch, of))
        or (of == space and _of_the_same_shape(threat, patch))
        for patch, of in zip(rows["patch"], rows["space"], strict=True)
    ]
    rows = rows[pd.Series(alike, index=rows.index, dtype=bool)]
    rows = rows.sort_values("certified_accuracy", ascending=False, kind="stable")
    # The rows of a promise other than recovery are each a headline of their own kind.
    first = ~rows.duplicated(["source", "system", "promise"])
    return rows.assign(headline=first & (rows["promise"] != "top-5 recovery"))


def _of_the_same_share(share: float | None, published: float | None) -> bool:
    """Tell whether two squares take about the same share of the image's pixels."""
    if share is None or published is None:
        return False
    return math.isclose(published, share, rel_tol=_SHARE_TOLERANCE)


def _of_the_same_shape(threat: dict[str, Any], patch: str) -> bool:
    """Tell whether a threat is of the pixels and of the shape, other than a square, of a patch."""
    match = _SHAPE.fullmatch(patch)
    if match is None or threat.get("locations", "anywhere") != "anywhere":
        return False
    if match["sparse"]:
        return threat["type"] == "sparse" and int(threat["count"]) == int(match["sparse"])
    pixels, kind = int(match["pixels"]), match["kind"]
    match threat:
        case {"type": "stencil", "name": str(name), "rows": [*rows]}:
            return kind in re.findall(r"[a-z]+", name) and sum(map(_pixels, rows)) == pixels
        case {"type": "rectangle", "height": int(height), "width": int(width)}:
            return _is_rectangle(kind, pixels, height, width)
        case {"type": "rectangles", "sizes": [*sizes]}:
            return all(_is_rectangle(kind, pixels, *size) for size in sizes)
    return False


def _pixels(row: str) -> int:
    return row.count("#")


def _is_rectangle(kind: str, pixels: int, height: int, width: int) -> bool:
    """Tell whether a rectangle has so many pixels, or no fewer than that take whole sides."""
    if kind == "line":
        return min(height, width) == 1 and height * width == pixels
    fits = height == math.ceil(pixels / width) and width == math.ceil(pixels / height)
    return kind == "rectangle" and fits and 1 < min(height, width) < max(height, width)


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
