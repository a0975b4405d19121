"""Recordings: what a classifier says about every view of every image, for any number of analyses.

A recording is made once for each classifier, slice of a data set, mask set and fill, and kept in a
folder that is named by a digest of that content. Analyses only read it, so that a second analysis
with the same masks needs no forward pass.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchproof.datasets import CorruptImageError, ImageDataset
from patchproof.defenses.checks import check_label_range, check_model
from patchproof.defenses.inference import (
    check_batch_size,
    default_batch_size,
    fastest_batch_size,
    in_fitting_batches,
    model_device,
)
from patchproof.errors import PatchproofError, RunError
from patchproof.evaluation.provenance import describe_device
from patchproof.models import ModelSpec, model_digest, write_atomically
from patchproof.precision import exact_inference
from patchproof.results import Outputs
from patchproof.threat import MaskSet
from patchproof.views import MaskPairViews

FORMAT = "patchproof-recording/1"

SHARD_SECONDS = 30.0
"""What is recorded is written after so many seconds, and at the end,"""
_SHARD_BYTES = 2**28
"""or when it takes so much memory."""

_BLOCK_BATCHES = 8
"""Images are read in blocks whose views fill about so many batches, so that few are not full."""

_VALUES_AT_ONCE = 2**22

_OF_SHARD = ("corrupt", "forwards", "seconds", "machines")
"""What a shard holds beside the columns of its images."""

Columns = dict[str, NDArray[Any]]
"""What is recorded of n images, by name, (n, ...) each."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Recording:
    """What a classifier says about N images, and about V views of each.

    Column 0 of the tables is the unmasked image, column 1 + v is view v of ``MaskPairViews``.

    Attributes:
        index: (N,) int64, the rows of the data set's split; images that cannot be read are absent.
        right: (N,) int64, the right classes.
        labels: (N, 1 + V) integers, the class of the highest score, as ``Outputs`` has it.
        margins: (N, 1 + V) float32, highest score minus second highest, as ``Outputs`` has it.
        confidences: (N, 1 + V) float32, the softmax probability of the label; 0 where a score is
            not finite.
        classes: number of classes.
        corrupt: how many images cannot be read.
        forwards: model forward passes behind the recording.
        seconds: what they took, all sessions together.
        machines: what they ran on, in words.
    """

    index: Tensor
    right: Tensor
    labels: Tensor
    margins: Tensor
    confidences: Tensor
    classes: int
    corrupt: int
    forwards: int
    seconds: float
    machines: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.index)

    def outputs(self, images: slice = slice(None)) -> Outputs:
        """Return what is said about the views of some images, all of it known."""
        labels = self.labels[images, 1:].long()
        known = torch.ones_like(labels, dtype=torch.bool)
        return Outputs(labels, self.margins[images, 1:], known, self.classes)

    def chunks(self, values_per_image: int) -> Iterator[slice]:
        """Yield slices of the images, so many that their values fit easily into memory."""
        step = max(1, _VALUES_AT_ONCE // values_per_image)
        for start in range(0, len(self), step):
            yield slice(start, start + step)


@dataclass(frozen=True)
class RecordingProgress:
    """How a recording goes.

    Attributes:
        done: images recorded, those of earlier sessions included.
        total: images of the data set.
        forwards_per_second: in this session; 0 before its first image.
    """

    done: int
    total: int
    forwards_per_second: float


class ShardedArchive:
    """Recordings of one classifier on one slice of a data set, whatever is recorded.

    Args:
        folder: where recordings are; any number of archives may share it.
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        dataset: N labelled images.
        spec: what the model was built from; with it a recording names the model exactly.
        batch_size: views in one forward pass; None measures which is fastest when the first
            recording is made.

    Attributes:
        forwards: the forward passes that this archive has spent.

    Raises:
        PatchproofError: a model in training mode or that does not fit the images, an empty data
            set, labels outside the classes, or an image more than once.
    """

    def __init__(
        self,
        folder: Path | str,
        model: nn.Module,
        dataset: ImageDataset,
        *,
        spec: ModelSpec | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.model = check_model(model)
        self.dataset = dataset
        self.batch_size = check_batch_size(batch_size)
        self.forwards = 0
        self._classes = _classes(model, dataset)
        self.model_identity = {
            "spec": None if spec is None else spec.to_dict(),
            "architecture": hashlib.sha256(repr(model).encode()).hexdigest(),
            "digest": model_digest(model),
        }
        self.dataset_identity = {
            "digest": dataset.digest(),
            "count": len(dataset),
            "indices_digest": hashlib.sha256(dataset.indices.numpy().tobytes()).hexdigest(),
        }

    def _complete(
        self,
        identity: Mapping[str, Any],
        forwards: int,
        tables: Callable[[Columns, Tensor], Columns],
        progress: Callable[[RecordingProgress], None] | None,
    ) -> Path:
        """Evaluate the images that are not recorded yet, and return the recording's folder.

        What is finished is written every half minute and when the recording is stopped, whatever
        stops it; the next call goes on from there. An image that cannot be decoded is logged and
        left out.

        Args:
            identity: all that decides the content, as JSON values.
            forwards: model forward passes for each image.
            tables: from position, index and right of n images, and the images (n, C, H, W), to
                what is recorded of them.
            progress: called at the start and after every few images.

        Raises:
            RunError: the folder cannot be written or is damaged.
        """
        folder = self.folder / digest_of(identity)
        done = {
            position
            for shard in read_shards(folder, ("position",))
            for position in shard.positions()
        }
        session = _Session(folder, len(self.dataset), len(done), progress)
        session.tell()
        waiting = [position for position in range(len(self.dataset)) if position not in done]
        if waiting:
            for unfinished in folder.glob(".*-*"):
                unfinished.unlink(missing_ok=True)
            write_atomically(folder / "recording.json", _json({"identity": dict(identity)}))
            try:
                self._evaluate(forwards, tables, waiting, session)
            finally:
                session.flush()
        return folder

    def _evaluate(
        self,
        forwards: int,
        tables: Callable[[Columns, Tensor], Columns],
        waiting: list[int],
        session: _Session,
    ) -> None:
        """Record the images at some positions, block by block."""
        device = model_device(self.model)
        block = max(1, _BLOCK_BATCHES * self._tuned_batch_size(device) // forwards)
        for start in range(0, len(waiting), block):
            images: dict[int, Tensor] = {}
            corrupt = []
            for position in waiting[start : start + block]:
                try:
                    images[position] = self.dataset.image(position)
                except CorruptImageError as error:
                    _log.warning("%s", error)
                    corrupt.append(position)
            started = time.perf_counter()
            positions = list(images)
            columns: Columns = {
                "position": np.array(positions, dtype=np.int64),
                "index": self.dataset.indices[positions].numpy(),
                "right": self.dataset.labels[positions].numpy(),
            }
            if images:
                columns |= tables(columns, torch.stack(list(images.values())).to(device))
            spent = len(images) * forwards
            self.forwards += spent
            seconds = time.perf_counter() - started
            machine = f"{describe_device(device)}, batches of {self.batch_size}"
            session.add(Shard(columns if images else {}, corrupt, spent, seconds, (machine,)))

    def _tuned_batch_size(self, device: torch.device) -> int:
        """Return the batch size, measured if none is chosen yet."""
        if self.batch_size is None:
            image = torch.zeros(self.dataset.channels, *self.dataset.image_size, device=device)
            largest = 2 * default_batch_size(image, device)
            batch = image.expand(largest, -1, -1, -1)
            with exact_inference(device):
                self.batch_size = fastest_batch_size(
                    lambda size: self.model(batch[:size].clone()), largest, device
                )
        return self.batch_size


class Archive(ShardedArchive):
    """The recordings of one classifier under masks.

    Args:
        folder: where recordings are; any number of archives may share it.
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        dataset: N labelled images.
        fill: the value in [0, 1] that masked pixels take in every channel.
        spec: what the model was built from; with it a recording names the model exactly.
        batch_size: views in one forward pass; None measures which is fastest when the first
            recording is made.

    Raises:
        PatchproofError: as ``ShardedArchive`` does.
    """

    def __init__(
        self,
        folder: Path | str,
        model: nn.Module,
        dataset: ImageDataset,
        *,
        fill: float,
        spec: ModelSpec | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(folder, model, dataset, spec=spec, batch_size=batch_size)
        self.fill = fill

    def record(
        self, mask_set: MaskSet, progress: Callable[[RecordingProgress], None] | None = None
    ) -> Recording:
        """Evaluate every view of every image that is not recorded yet, and return the recording.

        What is finished is written every half minute and when the recording is stopped, whatever
        stops it; the next call goes on from there. An image that cannot be decoded is logged and
        left out.

        Args:
            mask_set: M masks; the views are the distinct unions of two.
            progress: called at the start and after every few images.

        Raises:
            PatchproofError: masks for images of another size.
            RunError: the folder cannot be written or is damaged, or no image can be read.
        """
        if mask_set.image_size != self.dataset.image_size:
            raise PatchproofError(
                f"expected masks for the data set's images of {self.dataset.image_size} pixels, "
                f"got masks for {mask_set.image_size}"
            )
        views = MaskPairViews(mask_set, self.fill)
        folder = self._complete(
            self._identity(mask_set, views),
            1 + views.count,
            lambda _, images: self._tables(views, images),
            progress,
        )
        return self._join(folder)

    def _identity(self, mask_set: MaskSet, views: MaskPairViews) -> dict[str, Any]:
        """Return all that decides the content of a recording, as JSON values."""
        return {
            "format": FORMAT,
            "model": self.model_identity,
            "dataset": self.dataset_identity,
            "masks": {
                "image_size": list(mask_set.image_size),
                "count": len(mask_set),
                "digest": _digest(mask_set.masked()),
                "numbering": _digest(views.pair_to_view),
            },
            "fill": self.fill,
            "precision": "float32",
            "patchproof": version("patchproof"),
        }

    def _tables(self, views: MaskPairViews, images: Tensor) -> Columns:
        """Return labels, margins and confidences, (n, 1 + V) each, of n images."""
        batch_size = self._tuned_batch_size(images.device)
        said = Outputs.empty(len(images), 1 + views.count, self._classes)
        confidences = torch.zeros(len(images), 1 + views.count)

        def enter(image: Tensor, column: Tensor, scores: Tensor) -> None:
            scores = scores.cpu().float()
            said.record(image, column, scores)
            finite = scores.isfinite().all(-1)
            highest = scores.double().softmax(-1).amax(-1).float()
            confidences[image, column] = torch.where(finite, highest, 0.0)

        pairs = torch.cartesian_prod(torch.arange(len(images)), torch.arange(views.count))
        with exact_inference(images.device):
            for start in range(0, len(images), batch_size):
                some = images[start : start + batch_size]
                image = torch.arange(start, start + len(some))
                scores, _ = in_fitting_batches(lambda i, _: self.model(i.clone()), some, image)
                enter(image, torch.zeros_like(image), scores)
            for start in range(0, len(pairs), batch_size):
                image, view = pairs[start : start + batch_size].unbind(1)
                scores, fitting = in_fitting_batches(
                    lambda i, v: views.evaluate(self.model, i, v),
                    images[image.to(images.device)],
                    view.to(images.device),
                )
                if fitting < len(image):
                    self.batch_size = fitting
                enter(image, 1 + view, scores[:, 0])
        small = torch.int16 if self._classes < 2**15 else torch.int32
        return {
            "labels": said.labels.to(small).numpy(),
            "margins": said.margins.numpy(),
            "confidences": confidences.numpy(),
        }

    def _join(self, folder: Path) -> Recording:
        """Return the shards of a complete recording as one, in the order of the data set."""
        joined = Shard.joined(list(read_shards(folder)))
        joined.check(folder, len(self.dataset))
        _, order = np.unique(joined.columns["position"], return_index=True)
        return Recording(
            **{
                name: torch.from_numpy(column[order])
                for name, column in joined.columns.items()
                if name != "position"
            },
            classes=self._classes,
            corrupt=len(set(joined.corrupt)),
            forwards=joined.forwards,
            seconds=joined.seconds,
            machines=joined.machines,
        )


@dataclass(frozen=True, eq=False)
class Shard:
    """Some images of a recording.

    Attributes:
        columns: the n images that can be read: position (in the data set), index, right (n,), and
            what is recorded of them, (n, ...). Empty where there are none.
        corrupt: the positions of images that cannot be read.
        forwards: model forward passes.
        seconds: what they took.
        machines: what they ran on, in words.
    """

    columns: Columns
    corrupt: list[int]
    forwards: int
    seconds: float
    machines: tuple[str, ...]

    def positions(self) -> list[int]:
        """Return the positions of all its images."""
        read = self.columns["position"].tolist() if self.columns else []
        return [*read, *self.corrupt]

    def check(self, folder: Path, count: int) -> None:
        """Raise ``RunError`` unless it has all of ``count`` images, and one that can be read."""
        recorded = len(set(self.positions()))
        if recorded != count:
            raise RunError(f"{folder}: expected {count} images, got {recorded}; run it again")
        if not self.columns:
            corrupt = len(set(self.corrupt))
            raise RunError(f"expected images that can be read, got none ({corrupt} corrupt)")

    def memory(self) -> int:
        """Return the bytes that its columns take."""
        return sum(column.nbytes for column in self.columns.values())

    @classmethod
    def joined(cls, shards: list[Shard]) -> Shard:
        """Return the images of several shards as one."""
        columns = [shard.columns for shard in shards if shard.columns]
        names = columns[0] if columns else ()
        return cls(
            {name: np.concatenate([some[name] for some in columns]) for name in names},
            [position for shard in shards for position in shard.corrupt],
            sum(shard.forwards for shard in shards),
            sum(shard.seconds for shard in shards),
            tuple(sorted({machine for shard in shards for machine in shard.machines})),
        )

    def write(self, folder: Path) -> None:
        """Write the shard whole or not at all, under a name that no other shard has."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {
            **self.columns,
            "corrupt": np.array(self.corrupt, dtype=np.int64),
            "forwards": np.int64(self.forwards),
            "seconds": np.float64(self.seconds),
            "machines": np.array(self.machines, dtype=np.str_),
        }
        np.savez(buffer, **arrays)
        positions = self.positions()
        name = f"views-{min(positions):07}-{len(positions):07}.npz"
        write_atomically(folder / name, buffer.getvalue())

    @classmethod
    def read(cls, path: Path, columns: Collection[str] | None = None) -> Shard:
        """Return what ``write`` wrote, all columns or some of them, or raise ``RunError``."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(
                    {
                        name: arrays[name]
                        for name in arrays
                        if name not in _OF_SHARD and (columns is None or name in columns)
                    },
                    arrays["corrupt"].tolist(),
                    int(arrays["forwards"]),
                    float(arrays["seconds"]),
                    tuple(arrays["machines"].tolist()),
                )
        except Exception as error:
            raise RunError(f"{path}: damaged ({error}); delete it and run again") from error


class _Session:
    """Collects what is recorded, writes it in shards, and tells how the recording goes."""

    def __init__(
        self,
        folder: Path,
        total: int,
        done: int,
        progress: Callable[[RecordingProgress], None] | None,
    ) -> None:
        self._folder = folder
        self._total = total
        self._done = done
        self._progress = progress
        self._shards: list[Shard] = []
        self._forwards = 0
        self._bytes = 0
        self._started = self._flushed = time.perf_counter()

    def add(self, shard: Shard) -> None:
        """Take what is finished; write it if it is time."""
        self._shards.append(shard)
        self._done += len(shard.positions())
        self._forwards += shard.forwards
        self._bytes += shard.memory()
        if time.perf_counter() - self._flushed >= SHARD_SECONDS or self._bytes >= _SHARD_BYTES:
            self.flush()
        self.tell()

    def flush(self) -> None:
        """Write what is finished."""
        if self._shards:
            Shard.joined(self._shards).write(self._folder)
        self._shards, self._bytes, self._flushed = [], 0, time.perf_counter()

    def tell(self) -> None:
        """Call ``progress`` with how the recording goes."""
        if self._progress is not None:
            elapsed = max(time.perf_counter() - self._started, 1e-9)
            self._progress(RecordingProgress(self._done, self._total, self._forwards / elapsed))


def digest_of(values: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that name JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_shards(folder: Path, columns: Collection[str] | None = None) -> Iterator[Shard]:
    """Yield the shards of a recording in order, with all columns or some of them."""
    for path in sorted(folder.glob("views-*.npz")):
        yield Shard.read(path, columns)


def _classes(model: nn.Module, dataset: ImageDataset) -> int:
    """Return how many classes a model has, or raise unless it can classify the data set."""
    if not len(dataset):
        raise PatchproofError(f"expected images in {dataset.name} {dataset.split}, got none")
    if len(set(dataset.indices.tolist())) != len(dataset):
        raise PatchproofError("expected each image once, got an index more than once")
    device = model_device(model)
    shape = (dataset.channels, *dataset.image_size)
    try:
        with exact_inference(device):
            scores = model(torch.zeros(1, *shape, device=device))
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        raise PatchproofError(
            f"expected a model for images of shape {shape}, got one that fails: {first_line}"
        ) from error
    if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < 2:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PatchproofError(f"model: expected logits of shape (1, classes >= 2), got {got}")
    check_label_range(dataset.labels, scores.shape[1])
    return int(scores.shape[1])


def _digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
    digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
