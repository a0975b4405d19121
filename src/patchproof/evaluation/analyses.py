"""The analyses of the PatchCleanser paper (Section 4.3, Appendices C and D): tables of recordings.

Each is a function from recordings, or from the examples of a results folder, to a table with one
row for each setup. An accuracy ``x`` comes with the ends of its 95% Wilson interval, ``x_low`` and
``x_high``, and is a share of the ``count`` images of its row. The accuracies are those of
``Summary``: vanilla, clean, certified, and paper (the paper's condition).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from patchproof.defenses.patchcleanser import Inference
from patchproof.errors import PatchproofError
from patchproof.evaluation.recording import Recording
from patchproof.evaluation.replay import RecordedViews, Replay
from patchproof.evaluation.store import CERTIFIED
from patchproof.evaluation.summary import Proportion
from patchproof.threat import MaskSet, SquarePatch, Threat
from patchproof.threat.masks import Layout
from patchproof.threat.regions import ImageSize
from patchproof.views import MaskPairViews

BOX_COLUMNS = ("index", "top", "left", "height", "width")
"""What a table of object boxes holds: the row of the split, and a half-open box of its pixels."""

_INFERENCES: tuple[Inference, ...] = ("double", "challenger")


@dataclass(frozen=True)
class Setup:
    """How the masks of one row are made, as ``MaskSet.for_threat`` takes it.

    Attributes:
        masks_per_side: the budget, (rows, columns).
        multiplicity: the least number of masks per axis that cover each place of the patch.
        layout: ``"paper"`` or ``"balanced"``.
        shapes: for ``AnyRectangle``, how many covering rectangles the masks are made for.
    """

    masks_per_side: tuple[int, int]
    multiplicity: tuple[int, int] = (1, 1)
    layout: Layout = "paper"
    shapes: int | None = None

    def mask_set(self, threat: Threat, image_size: ImageSize) -> MaskSet:
        """Return the masks for a threat."""
        return MaskSet.for_threat(
            threat, image_size, self.masks_per_side, self.multiplicity, self.layout, self.shapes
        )

    def describe(self) -> str:
        """Say the setup in short."""
        words = [f"{_pair(self.masks_per_side)} masks per side", f"{self.layout} layout"]
        if max(self.multiplicity) > 1:
            words.append(f"multiplicity {_pair(self.multiplicity)}")
        if self.shapes is not None:
            words.append(f"{self.shapes} shapes")
        return ", ".join(words)

    def columns(self) -> dict[str, str]:
        """Return the setup as the first columns of a row."""
        return {
            "masks_per_side": _pair(self.masks_per_side),
            "multiplicity": _pair(self.multiplicity),
            "layout": self.layout,
        }


@dataclass(frozen=True)
class Study:
    """What the rows of an analysis have in common.

    Attributes:
        record: returns the recording of a mask set, which makes it if need be.
        image_size: (H, W) in pixels.
        fill: the value that masked pixels took in the recordings.
        tolerance: a view whose margin (logits) is not larger counts as corrupted.
    """

    record: Callable[[MaskSet], Recording]
    image_size: ImageSize
    fill: float
    tolerance: float

    def views(self, mask_set: MaskSet) -> RecordedViews:
        """Return what is recorded of the views of a mask set."""
        return RecordedViews(self.record(mask_set), MaskPairViews(mask_set, self.fill))


def budget(study: Study, threat: Threat, setups: Sequence[Setup]) -> pd.DataFrame:
    """Tell what mask sets achieve, and at which cost (Figures 4 and 5).

    Returns:
        A row for each setup and inference algorithm: the setup, its masks, the accuracies,
        ``forwards`` (mean of ``predict``), ``forwards_most``, ``milliseconds`` an image, and
        ``efficient``: no other row certifies as many images for fewer forwards, or more for as
        many.
    """
    table = inference(study, threat, setups).drop(
        columns=["agreement", "agreement_low", "agreement_high"]
    )
    cost, gain = table["forwards"].to_numpy(), table["certified"].to_numpy()
    no_worse = (cost[None, :] <= cost[:, None]) & (gain[None, :] >= gain[:, None])
    better = no_worse & ((cost[None, :] < cost[:, None]) | (gain[None, :] > gain[:, None]))
    table["efficient"] = pd.Series(~np.any(better, axis=1), index=table.index)
    return table


def inference(study: Study, threat: Threat, setups: Sequence[Setup]) -> pd.DataFrame:
    """Compare the challenger game with double masking (Figure 10).

    Returns:
        A row for each setup and inference algorithm, as ``budget`` has it, with ``agreement``: on
        how many images both return the same label.
    """
    rows = _Rows()
    for setup in setups:
        mask_set = setup.mask_set(threat, study.image_size)
        views = study.views(mask_set)
        rows.measure(views.recording)
        outcomes = {name: Outcome.of(study, views, threat, name) for name in _INFERENCES}
        same = outcomes["double"].prediction == outcomes["challenger"].prediction
        for name, outcome in outcomes.items():
            rows.add(
                setup.columns()
                | {"inference": name}
                | _describe(mask_set, views)
                | outcome.columns()
                | _accuracies(agreement=same)
            )
    return rows.table()


def sizes(
    study: Study, sides: Sequence[int], setup: Setup, algorithm: Inference = "double"
) -> pd.DataFrame:
    """Tell how far the defense goes as the patch grows (Figures 7 and 8).

    Args:
        study: what the rows have in common.
        sides: of the square patches, in pixels.
        setup: how the masks are made, for every size.
        algorithm: which inference algorithm.

    Returns:
        A row for each size: ``patch`` (its side in pixels), ``patch_share`` (of the image's
        pixels), the masks, the accuracies and the cost.
    """
    rows = _Rows()
    for side in sides:
        threat = SquarePatch(side)
        mask_set = setup.mask_set(threat, study.image_size)
        views = study.views(mask_set)
        rows.measure(views.recording)
        rows.add(
            {"patch": side, "patch_share": side**2 / (study.image_size[0] * study.image_size[1])}
            | _describe(mask_set, views)
            | Outcome.of(study, views, threat, algorithm).columns()
        )
    return rows.table()


def overestimate(
    study: Study,
    side: int,
    estimates: Sequence[int],
    setup: Setup,
    algorithm: Inference = "double",
) -> pd.DataFrame:
    """Tell what it costs to take the patch for larger than it is (Figure 6).

    Args:
        study: what the rows have in common.
        side: of the actual square patch, in pixels.
        estimates: of that side, at least as large; the masks are made for them.
        setup: how the masks are made, for every estimate.
        algorithm: which inference algorithm.

    Returns:
        A row for each estimate: ``estimate`` (pixels), ``area_ratio`` (estimated over actual
        area), the masks, the accuracies against the actual patch, ``certified_estimate`` (against
        a patch as large as estimated) and the cost.

    Raises:
        PatchproofError: an estimate smaller than the patch.
    """
    check_estimates(side, estimates)
    rows = _Rows()
    for estimate in estimates:
        estimated = SquarePatch(estimate)
        mask_set = setup.mask_set(estimated, study.image_size)
        views = study.views(mask_set)
        rows.measure(views.recording)
        against_estimate = Outcome.of(study, views, estimated, algorithm)
        rows.add(
            {"estimate": estimate, "area_ratio": estimate**2 / side**2}
            | _describe(mask_set, views)
            | Outcome.of(study, views, SquarePatch(side), algorithm).columns()
            | _accuracies(certified_estimate=against_estimate.certified)
        )
    return rows.table()


def check_estimates(side: int, estimates: Sequence[int]) -> None:
    """Raise ``PatchproofError`` if an estimate of a patch's side is smaller than it is."""
    small = [estimate for estimate in estimates if estimate < side]
    if small:
        raise PatchproofError(
            f"estimates: expected at least the {side} pixels of the patch's side, got {small[0]}"
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """What PatchCleanser does with the N images of a recording.

    Attributes:
        vanilla: (N,) bool, the undefended model is right.
        right: (N,) bool, the defense is right on the clean image.
        certified: (N,) bool, it stays right whatever the patch shows.
        paper_condition: (N,) bool, two-mask correctness.
        prediction: (N,) int64, the labels.
        forwards: (N,) int64, model forward passes of ``predict``.
    """

    vanilla: Tensor
    right: Tensor
    certified: Tensor
    paper_condition: Tensor
    prediction: Tensor
    forwards: Tensor

    @classmethod
    def of(
        cls, study: Study, views: RecordedViews, threat: Threat, algorithm: Inference
    ) -> Outcome:
        """Replay one inference algorithm against one threat."""
        replay = Replay(views, threat, algorithm, study.tolerance)
        prediction = replay.infer()
        certified, paper = replay.certify(prediction.label)
        recording = views.recording
        return cls(
            vanilla=recording.labels[:, 0].long() == recording.right,
            right=prediction.label == recording.right,
            certified=certified,
            paper_condition=paper,
            prediction=prediction.label,
            forwards=prediction.forwards,
        )

    def columns(self) -> dict[str, Any]:
        """Return the accuracies with their intervals, and the forwards."""
        return {
            "count": len(self.right),
            **_accuracies(
                vanilla=self.vanilla,
                clean=self.right,
                certified=self.certified,
                paper=self.paper_condition,
            ),
            "forwards": float(self.forwards.double().mean()),
            "forwards_most": int(self.forwards.amax()),
        }


class _Rows:
    """Collects the rows of a table, and the time that a forward pass took in its recordings."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._forwards = 0
        self._seconds = 0.0

    def measure(self, recording: Recording) -> None:
        """Count the time of a recording: all that the model is asked takes the same time."""
        self._forwards += recording.forwards
        self._seconds += recording.seconds

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def table(self) -> pd.DataFrame:
        """Return the rows, with the milliseconds that ``predict`` spends in the model."""
        table = pd.DataFrame(self._rows)
        table["milliseconds"] = 1000 * table["forwards"] * (self._seconds / self._forwards)
        return table


def read_boxes(path: Path | str, image_size: ImageSize) -> pd.DataFrame:
    """Read the boxes of objects from a CSV file with the columns ``BOX_COLUMNS``.

    An image may have several rows. A box is in pixels of the images as they are classified.

    Raises:
        PatchproofError: no such file, no CSV, a missing column, no rows, numbers that are not
            whole, or a box that is not inside the image.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise PatchproofError(f"expected a CSV file of boxes, got {path}: {error}") from error
    missing = [name for name in BOX_COLUMNS if name not in table.columns]
    if missing:
        raise PatchproofError(
            f"{path}: expected the columns {', '.join(BOX_COLUMNS)}, got none named "
            f"{' or '.join(missing)}"
        )
    table = table[list(BOX_COLUMNS)]
    if table.empty:
        raise PatchproofError(f"{path}: expected boxes, got no rows")
    numbers = pd.DataFrame({name: pd.to_numeric(table[name], "coerce") for name in BOX_COLUMNS})
    height, width = image_size
    checks = (
        (numbers.notna() & (numbers % 1 == 0)).all(axis=1),
        (numbers["index"] >= 0)
        & (numbers[["top", "left"]] >= 0).all(axis=1)
        & (numbers[["height", "width"]] >= 1).all(axis=1)
        & (numbers["top"] + numbers["height"] <= height)
        & (numbers["left"] + numbers["width"] <= width),
    )
    expected = (
        "whole numbers",
        f"an index from 0 and a box inside the {height}x{width} image",
    )
    for right, what in zip(checks, expected, strict=True):
        if not right.all():
            row = int((~right).to_numpy().argmax())
            values = ", ".join(f"{name} {table.iloc[row][name]}" for name in BOX_COLUMNS)
            raise PatchproofError(f"{path}: expected {what}, got {values} in line {row + 2}")
    return numbers.astype("int64")


def object_pixels(boxes: pd.DataFrame, image_size: ImageSize) -> pd.Series[int]:
    """Return the number of pixels in the union of each image's boxes, by index (Appendix D)."""
    pixels = {}
    for index, rows in boxes.groupby("index"):
        inside = np.zeros(image_size, dtype=bool)
        for top, left, height, width in rows[list(BOX_COLUMNS[1:])].to_numpy():
            inside[top : top + height, left : left + width] = True
        pixels[index] = int(inside.sum())
    return pd.Series(pixels, dtype="int64", name="object_pixels").rename_axis("index")


def by_object_size(
    examples: pd.DataFrame, pixels: pd.Series[int], image_size: ImageSize, bins: int
) -> pd.DataFrame:
    """Tell how many images are certified by the size of their objects (Figure 11).

    Args:
        examples: the examples of a results folder whose images could be read.
        pixels: of the objects in each image, by index; images without are left out.
        image_size: (H, W) in pixels.
        bins: into how many parts of equal width the shares from 0 to 1 are cut. A part contains
            its upper end.

    Returns:
        A row for each part that has images: ``size_low`` and ``size_high`` (shares of the image's
        pixels), ``count`` and the accuracies.

    Raises:
        PatchproofError: fewer than one bin, or no image with an object.
    """
    if bins < 1:
        raise PatchproofError(f"bins: expected at least 1, got {bins}")
    known = examples[examples["index"].isin(pixels.index)]
    if known.empty:
        raise PatchproofError(
            f"expected boxes of images of the run, got none of its {len(examples):,} images"
        )
    area = image_size[0] * image_size[1]
    part = -(-pixels.loc[known["index"]].to_numpy() * bins // area) - 1
    return pd.DataFrame(
        {"size_low": number / bins, "size_high": (number + 1) / bins}
        | _of_examples(known[part == number])
        for number in sorted(set(part.tolist()))
    )


def by_class(
    examples: pd.DataFrame,
    class_name: Callable[[int], str],
    pixels: pd.Series[int] | None,
    image_size: ImageSize,
) -> pd.DataFrame:
    """Tell how many images of each class are certified, most first (Figure 13).

    Args:
        examples: the examples of a results folder whose images could be read.
        class_name: of a label.
        pixels: of the objects in each image, by index; or None.
        image_size: (H, W) in pixels.

    Returns:
        A row for each class that has images: ``label``, ``name``, ``count``, the accuracies and,
        with ``pixels``, ``object_share`` (mean share of the image's pixels) and ``objects`` (the
        number of images that it is the mean of).
    """
    rows = []
    for label, images in examples.groupby("label"):
        number = int(str(label))
        row: dict[str, Any] = {"label": number, "name": class_name(number)} | _of_examples(images)
        if pixels is not None:
            known = pixels[pixels.index.isin(images["index"])]
            row["object_share"] = float(known.mean()) / (image_size[0] * image_size[1])
            row["objects"] = len(known)
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.sort_values([certified_column(table), "label"], ascending=[False, True])


def _of_examples(examples: pd.DataFrame) -> dict[str, Any]:
    """Return count and accuracies of some examples of a results folder."""
    right = examples["prediction"] == examples["label"]
    promised = {certified_column(examples): examples[certified_column(examples)]}
    return {"count": len(examples), **_accuracies(clean=right, **promised)}


def certified_column(table: pd.DataFrame) -> str:
    """Return the name of the certificates in a table: of recovery, or of detection."""
    return next(name for name in CERTIFIED.values() if name in table.columns)


def _describe(mask_set: MaskSet, views: RecordedViews) -> dict[str, int]:
    """Return the number of masks, the pixels that the largest hides, and the number of views."""
    hidden = mask_set.masked().flatten(1).sum(1)
    return {"masks": len(mask_set), "mask_pixels": int(hidden.amax()), "views": views.count}


def _accuracies(**hits: Tensor | pd.Series[bool]) -> dict[str, float]:
    """Return the share of True of each, with the ends of its interval."""
    columns: dict[str, float] = {}
    for name, values in hits.items():
        share = Proportion.of(int(values.sum()), len(values))
        columns |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
    return columns


def _pair(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"
