"""Certify a data set: one call from a defense and images to a results folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchproof.aggregation.base import Stop
from patchproof.datasets import CorruptImageError, ImageDataset
from patchproof.errors import RunError
from patchproof.evaluation.certifier import AnyCertification, Certifier
from patchproof.evaluation.gallery import choose_images, make_gallery
from patchproof.evaluation.provenance import check_fit, how_made, identity, logits
from patchproof.evaluation.store import (
    CERTIFIED,
    FORMAT,
    Row,
    RunFolder,
    empty_row,
    read_gallery,
)
from patchproof.evaluation.summary import AnySummary, summarize
from patchproof.models import ModelSpec
from patchproof.results import Case

SHARD_IMAGES = 512
SHARD_SECONDS = 30.0
"""A shard is written after so many images or seconds, whichever comes first."""

_BLOCK = 32
"""Images that share one forward pass of the undefended model."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How a run goes. Images come as they are decided: those that are not certified come early.

    Attributes:
        done: images with a result, those of earlier sessions included.
        total: images of the data set.
        corrupt: images that could not be read, among ``done``.
        images_per_second: in this session.
        clean_accuracy: so far; NaN before the first image.
        certified_share: of the images so far, those with a certificate of the run's kind; NaN
            before the first image.
    """

    done: int
    total: int
    corrupt: int
    images_per_second: float
    clean_accuracy: float
    certified_share: float

    @property
    def seconds_left(self) -> float:
        """At the rate of this session; infinite before its first image."""
        left = self.total - self.done
        return left / self.images_per_second if self.images_per_second else float("inf")


def certify_dataset(
    defense: Certifier,
    dataset: ImageDataset,
    out: Path | str,
    *,
    stop: Stop = "first_lost_region",
    gallery: int = 9,
    spec: ModelSpec | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> AnySummary:
    """Certify every image of a data set and write a results folder.

    Finished images are written every half minute. A run that was stopped, whatever stopped it, goes
    on when it is called again with the same arguments, and ends with the same table of examples. An
    image that cannot be decoded is logged, recorded as ``"corrupt"``, and in no accuracy.

    Args:
        defense: such as ``PatchCleanser``, ``PatchGuard`` or ``MinorityReports``.
        dataset: N labelled images of the defense's size.
        out: the results folder; it is made, must be empty, or hold the same run.
        stop: ``"first_lost_region"`` for accuracies, ``"never"`` to settle every patch region.
        gallery: how many images to keep with their vulnerability maps.
        spec: what the model was built from; with it the run names the model exactly.
        about: more for the manifest's record of how the run was made, such as the command.
        progress: called at the start and after every few images.

    Returns:
        The accuracies, their intervals and the cost.

    Raises:
        PatchproofError: the data set does not fit the defense, or the folder holds something else.
        RunError: the folder cannot be written (no space left, say), or no image could be read.
    """
    check_fit(defense, dataset)
    if defense.batch_size is None:
        image = torch.zeros(dataset.channels, *dataset.image_size)
        defense.tune_batch_size(image, len(dataset))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "identity": {"kind": defense.kind, **identity(defense, dataset, spec), "stop": stop},
        "about": {**how_made(defense, dataset), "paper": defense.paper, **dict(about or {})},
    }
    with RunFolder.open(Path(out), manifest) as folder:
        recorder = _Recorder(folder, dataset, progress)
        recorder.tell()
        try:
            waiting = _waiting_images(defense, dataset, recorder)
            for positions, certification in defense.certify_stream(waiting, stop=stop):
                recorder.add_certified(positions, certification)
        finally:
            recorder.flush()
        examples, timing = folder.tables()
        if len(examples) != len(dataset):
            raise RunError(f"expected results of {len(dataset)} images, got {len(examples)}")
        summary = summarize(
            examples, timing, manifest["about"]["batch_size"], defense.kind, defense.paper
        )
        chosen = choose_images(examples, gallery, defense.kind)
        kept = read_gallery(folder.path)
        if chosen and (kept is None or kept.index.tolist() != chosen):
            folder.write_gallery(make_gallery(defense, dataset, chosen))
        folder.write_summary(summary)
    return summary


class _Recorder:
    """Collects finished images, writes them in shards, and tells how the run goes."""

    def __init__(
        self,
        folder: RunFolder,
        dataset: ImageDataset,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        earlier, _ = folder.tables()
        read = earlier[earlier["status"] == "ok"]
        self._empty = empty_row(folder.kind)
        self.finished = set(earlier["index"].tolist())
        self.vanilla: dict[int, int] = {}
        self._folder = folder
        self._dataset = dataset
        self._progress = progress
        self._rows: list[Row] = []
        self._read = len(read)
        self._right = int((read["prediction"] == read["label"]).sum())
        self._certificates = CERTIFIED[folder.kind]
        self._certified = int(read[self._certificates].sum())
        self._earlier = len(earlier)
        self._started = self._flushed = time.perf_counter()

    def add_certified(self, positions: list[int], certification: AnyCertification) -> None:
        """Record the images at these positions of the data set."""
        names = [field.name for field in fields(certification) if field.name in self._empty]
        columns = [getattr(certification, name).tolist() for name in names]
        for position, *values in zip(positions, *columns, strict=True):
            row = self._row(position) | dict(zip(names, values, strict=True))
            row |= {"vanilla": self.vanilla.pop(position), "case": Case(row["case"]).name.lower()}
            self._rows.append(row)
            self._read += 1
            self._right += row["prediction"] == row["label"]
            self._certified += row[self._certificates]
        self._after_adding()

    def add_corrupt(self, position: int, error: CorruptImageError) -> None:
        """Record that the image at this position cannot be read."""
        _log.warning("%s", error)
        self._rows.append(self._row(position) | {"status": "corrupt", "message": str(error)})
        self._after_adding()

    def flush(self) -> None:
        """Write what is finished; images share the time since the last shard by their forwards."""
        if not self._rows:
            return
        now = time.perf_counter()
        per_forward = (now - self._flushed) / max(1, sum(row["forwards"] for row in self._rows))
        self._folder.append(
            [row | {"seconds": row["forwards"] * per_forward} for row in self._rows]
        )
        self.finished.update(row["index"] for row in self._rows)
        self._rows, self._flushed = [], now

    def tell(self) -> None:
        """Call ``progress`` with how the run goes."""
        if self._progress is None:
            return
        done = len(self.finished) + len(self._rows)
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        self._progress(
            Progress(
                done=done,
                total=len(self._dataset),
                corrupt=done - self._read,
                images_per_second=(done - self._earlier) / elapsed,
                clean_accuracy=self._right / self._read if self._read else float("nan"),
                certified_share=self._certified / self._read if self._read else float("nan"),
            )
        )

    def is_finished(self, position: int) -> bool:
        """Tell whether the image at this position has a result on disk."""
        return int(self._dataset.indices[position]) in self.finished

    def _row(self, position: int) -> Row:
        return self._empty | {
            "status": "ok",
            "index": int(self._dataset.indices[position]),
            "label": int(self._dataset.labels[position]),
        }

    def _after_adding(self) -> None:
        since_flush = time.perf_counter() - self._flushed
        if len(self._rows) >= SHARD_IMAGES or since_flush >= SHARD_SECONDS:
            self.flush()
        self.tell()


def _waiting_images(
    defense: Certifier, dataset: ImageDataset, recorder: _Recorder
) -> Iterator[tuple[int, Tensor, int]]:
    """Yield the position, image and label of each image without a result.

    The undefended model sees the same blocks of images wherever an earlier session stopped, so that
    rounding cannot make its predictions depend on it.
    """
    for start in range(0, len(dataset), _BLOCK):
        block = range(start, min(start + _BLOCK, len(dataset)))
        waiting = {position for position in block if not recorder.is_finished(position)}
        if not waiting:
            continue
        images: dict[int, Tensor] = {}
        for position in block:
            try:
                images[position] = dataset.image(position)
            except CorruptImageError as error:
                if position in waiting:
                    recorder.add_corrupt(position, error)
        if not images:
            continue
        labels = logits(defense, torch.stack(list(images.values()))).argmax(1).tolist()
        recorder.vanilla.update(
            (position, label)
            for position, label in zip(images, labels, strict=True)
            if position in waiting
        )
        for position in waiting & images.keys():
            yield position, images[position], int(dataset.labels[position])
