"""The results folder of a run: every file is written whole or not at all, and read back.

A finished image is one row in ``examples-NNNNN.parquet`` and one in ``timing-NNNNN.parquet``. The
timing shard is written first: the examples shard is what makes its images count as done.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from patchproof.errors import PatchproofError, RunError
from patchproof.evaluation.summary import (
    AnySummary,
    AttackSummary,
    summarize,
    summarize_attack,
)
from patchproof.models.weights import write_atomically
from patchproof.results import Case, Kind, Paper

FORMAT = "patchproof-result/1"

RunKind = Kind | Literal["attack"]
"""What a run is: one that certifies, by what its certificates promise, or one that attacks."""


def _examples(columns: dict[str, pa.DataType]) -> pa.Schema:
    """Return the schema of a kind of run, with the columns that all have."""
    labels = dict.fromkeys(("index", "label", "vanilla", "prediction"), pa.int64())
    return pa.schema(labels | columns | dict.fromkeys(("case", "status", "message"), pa.string()))


EXAMPLES: dict[RunKind, pa.Schema] = {
    "recovery": _examples({"certified": pa.bool_(), "paper_condition": pa.bool_()}),
    "detection": _examples(
        {
            "certified_detection": pa.bool_(),
            "unmasked": pa.int64(),
            "alert_threshold": pa.float64(),
            "certified_above": pa.float64(),
            "certified_threshold": pa.float64(),
        }
    ),
    "probable": _examples(
        {
            "certified_with_probability": pa.bool_(),
            "success_probability": pa.float64(),
            "clean_probability": pa.float64(),
            "paper_condition": pa.bool_(),
        }
    ),
    "attack": _examples(
        {
            "attacked_prediction": pa.int64(),
            "broken": pa.bool_(),
            "target": pa.int64(),
            "hit_target": pa.bool_(),
            "right_share": pa.float64(),
            "regions": pa.string(),
            "objective": pa.float64(),
            "tries": pa.int64(),
        }
    ),
}
CERTIFIED: dict[RunKind, str] = {
    "recovery": "certified",
    "detection": "certified_detection",
    "probable": "certified_with_probability",
}
"""The column that holds the certificates of a kind of run."""

TIMING = pa.schema(
    {
        "index": pa.int64(),
        "forwards": pa.int64(),
        "seconds": pa.float64(),
        "smallest_margin": pa.float64(),
    }
)

Row = dict[str, Any]
"""The values of one image: the columns of ``EXAMPLES[kind]`` and of ``TIMING``."""


_NOTHING: dict[pa.DataType, Any] = {
    pa.int64(): -1,
    pa.bool_(): False,
    pa.float64(): float("nan"),
    pa.string(): "",
}


def empty_row(kind: RunKind) -> Row:
    """Return the values of an image that no model has seen."""
    columns = [*EXAMPLES[kind], *TIMING]
    row = {column.name: _NOTHING[column.type] for column in columns}
    return row | {"case": Case.NONE.name.lower(), "forwards": 0}


@dataclass(frozen=True, eq=False)
class Gallery:
    """Images to look at, with where a patch could still win.

    Attributes:
        index: (G,) int64, the rows of the data set.
        image: (G, C, H, W) uint8.
        vulnerability: (G, H, W) float32 in [0, 1]: at a pixel, the share of the patch regions
            containing it that do not hold.
    """

    index: np.ndarray[Any, np.dtype[np.int64]]
    image: np.ndarray[Any, np.dtype[np.uint8]]
    vulnerability: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, eq=False)
class AttackedGallery:
    """Attacked images to look at.

    Attributes:
        index: (G,) int64, the rows of the data set.
        image: (G, C, H, W) uint8, clean.
        attacked: (G, C, H, W) uint8, rounded from what was attacked.
        broken: (G,) bool, whether the attack succeeded.
    """

    index: np.ndarray[Any, np.dtype[np.int64]]
    image: np.ndarray[Any, np.dtype[np.uint8]]
    attacked: np.ndarray[Any, np.dtype[np.uint8]]
    broken: np.ndarray[Any, np.dtype[np.bool_]]

    def joined(self, other: AttackedGallery) -> AttackedGallery:
        """Return these images and then the others."""
        return AttackedGallery(
            *(
                np.concatenate([getattr(self, entry.name), getattr(other, entry.name)])
                for entry in fields(self)
            )
        )


@dataclass(frozen=True, eq=False)
class Result:
    """What a results folder holds.

    Attributes:
        folder: where it is.
        manifest: everything needed to run it again.
        examples: one row an image, by ascending index.
        timing: one row an image, by ascending index.
        summary: the figures over the images in ``examples``.
        gallery: images with vulnerability maps, or None.
        finished: False where the run stopped before its last image.
    """

    folder: Path
    manifest: dict[str, Any]
    examples: pd.DataFrame
    timing: pd.DataFrame
    summary: AnySummary | AttackSummary
    gallery: Gallery | None
    finished: bool

    @property
    def kind(self) -> RunKind:
        """What the run's certificates promise, or that it attacks."""
        return run_kind(self.manifest)


class RunFolder:
    """A results folder that one run writes to."""

    def __init__(self, path: Path, kind: RunKind) -> None:
        self.path = path
        self.kind = kind
        self._next_shard = 1 + max((_number(shard) for shard in _shards(path)), default=-1)

    @classmethod
    @contextmanager
    def open(cls, path: Path, manifest: dict[str, Any]) -> Iterator[RunFolder]:
        """Create the folder, or go on with the same run in it; no other process may meanwhile.

        Raises:
            PatchproofError: the folder holds another run, or something else.
            RunError: another process writes to it, or it cannot be written.
        """
        if path.exists() and not path.is_dir():
            raise PatchproofError(f"{path}: expected a folder for the results, got a file")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
        with _only_writer(path):
            for unfinished in path.glob(".*-*"):
                unfinished.unlink(missing_ok=True)
            if (path / "manifest.json").exists():
                check_same_run(path, read_manifest(path), manifest)
            elif others := sorted(entry.name for entry in path.iterdir()):
                raise PatchproofError(
                    f"{path}: expected an empty folder or the results of the same run, "
                    f"got a folder that holds {_some(others)}"
                )
            else:
                write_atomically(path / "manifest.json", _json(manifest))
            yield cls(path, run_kind(manifest))

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the examples and the timing written so far, by ascending index."""
        return _read_tables(self.path, self.kind)

    def append(self, rows: Sequence[Row]) -> None:
        """Write finished images as the next shard."""
        number = self._next_shard
        for name, schema in (("timing", TIMING), ("examples", EXAMPLES[self.kind])):
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
            write_atomically(self.path / f"{name}-{number:05}.parquet", buffer.getvalue())
        self._next_shard = number + 1

    def write_gallery(self, gallery: Gallery) -> None:
        """Write the images to look at."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            index=gallery.index,
            image=gallery.image,
            vulnerability=gallery.vulnerability,
        )
        write_atomically(self.path / "gallery.npz", buffer.getvalue())

    def write_attacked(self, attacked: AttackedGallery) -> None:
        """Write attacked images to look at."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            index=attacked.index,
            image=attacked.image,
            attacked=attacked.attacked,
            broken=attacked.broken,
        )
        write_atomically(self.path / "attacked.npz", buffer.getvalue())

    def write_summary(self, summary: AnySummary | AttackSummary) -> None:
        """Write the figures: the run is finished."""
        write_atomically(self.path / "summary.json", _json(summary.to_dict()))


def read_result(folder: Path | str) -> Result:
    """Read a results folder, finished or not.

    Raises:
        PatchproofError: no such folder, not a results folder, or no finished image in it yet.
        RunError: a file in it is damaged, or no image could be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    kind = run_kind(manifest)
    examples, timing = _read_tables(folder, kind)
    batch_size = manifest.get("about", {}).get("batch_size")
    if examples.empty:
        raise PatchproofError(f"{folder}: expected results, got a run without a finished image")
    return Result(
        folder=folder,
        manifest=manifest,
        examples=examples,
        timing=timing,
        summary=(
            summarize_attack(
                examples, timing, manifest["identity"].get("attack", {}).get("batch_size")
            )
            if kind == "attack"
            else summarize(examples, timing, batch_size, kind, run_paper(manifest))
        ),
        gallery=read_gallery(folder),
        finished=(folder / "summary.json").exists(),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a results folder, or raise ``PatchproofError``."""
    if not folder.is_dir():
        raise PatchproofError(f"{folder}: expected a results folder, got no such folder")
    path = folder / "manifest.json"
    if not path.is_file():
        raise PatchproofError(
            f"{folder}: expected a results folder of `patchproof certify` or `attack`, "
            "got one without manifest.json"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PatchproofError(f"{path}: expected JSON, got {error}") from error
    match manifest:
        case {"format": str(found), "identity": dict(identity)} if found == FORMAT:
            # Until there were others, every run was one of recovery.
            return dict(manifest) | {"identity": {"kind": "recovery"} | identity}
        case {"format": found}:
            raise PatchproofError(f"{path}: expected the format {FORMAT}, got {found!r}")
    raise PatchproofError(f"{path}: expected the format {FORMAT}, got no manifest of a run")


def run_kind(manifest: Mapping[str, Any]) -> RunKind:
    """Return what the certificates of a run promise, or that it attacks, by its manifest.

    Raises:
        PatchproofError: a kind that this version does not know.
    """
    kind = manifest["identity"]["kind"]
    if kind not in EXAMPLES:
        raise PatchproofError(
            f"manifest: expected a run of kind {' or '.join(EXAMPLES)}, got {kind!r}"
        )
    return cast(RunKind, kind)


def run_paper(manifest: Mapping[str, Any]) -> Paper | None:
    """Return whether the criterion of the paper of a run's defense is sound; None without one.

    Raises:
        PatchproofError: something that this version does not know.
    """
    # Until there were others, every run was one of PatchCleanser, whose criterion is sound.
    paper = manifest.get("about", {}).get("paper", "sound")
    if paper not in (None, *get_args(Paper)):
        raise PatchproofError(
            f"manifest: expected a paper's criterion that is {' or '.join(get_args(Paper))}, "
            f"got {paper!r}"
        )
    return cast(Paper | None, paper)


def read_gallery(folder: Path) -> Gallery | None:
    """Return the images to look at of a results folder, or None."""
    arrays = _read_arrays(folder / "gallery.npz", ("index", "image", "vulnerability"))
    return None if arrays is None else Gallery(*arrays)


def read_attacked(folder: Path) -> AttackedGallery | None:
    """Return the attacked images to look at of a results folder, or None."""
    arrays = _read_arrays(folder / "attacked.npz", ("index", "image", "attacked", "broken"))
    return None if arrays is None else AttackedGallery(*arrays)


def _read_arrays(path: Path, names: Sequence[str]) -> list[Any] | None:
    """Return the arrays of these names of a file, or None without the file."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except Exception as error:
        raise RunError(f"{path}: damaged ({error}); delete it and run again") from error


def check_same_run(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ``PatchproofError`` with the keys in which the identities of two manifests differ."""
    ours = _flat(json.loads(json.dumps(expected["identity"])))
    theirs = _flat(found["identity"])
    differences = [
        f"{key} is {_short(theirs, key)} there and {_short(ours, key)} here"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise PatchproofError(
            f"{folder}: holds the results of another run: {_some(differences, '; ')}. "
            "Choose another folder, or delete this one"
        )


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise RunError(f"{folder}: another patchproof process is writing to it") from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(handle)


def _read_tables(folder: Path, kind: RunKind) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the examples and timing of all shards, one row an image, by ascending index."""
    numbers = [_number(shard) for shard in _shards(folder)]
    examples = _read_shards(folder, "examples", numbers, EXAMPLES[kind])
    timing = _read_shards(folder, "timing", numbers, TIMING)
    if not examples["index"].equals(timing["index"]):
        raise RunError(f"{folder}: expected examples and timing of the same images, got others")
    return examples, timing


def _read_shards(
    folder: Path, name: str, numbers: Sequence[int], schema: pa.Schema
) -> pd.DataFrame:
    tables = [schema.empty_table()]
    for number in numbers:
        path = folder / f"{name}-{number:05}.parquet"
        try:
            tables.append(pq.read_table(path, partitioning=None).select(schema.names).cast(schema))
        except (OSError, KeyError, pa.ArrowException) as error:
            raise RunError(
                f"{path}: missing or damaged ({error}); delete the examples and timing shards "
                f"{number:05} and certify again"
            ) from error
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
    return frame.drop_duplicates("index").sort_values("index", ignore_index=True)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("examples-*.parquet"))


def _number(shard: Path) -> int:
    """Return the number of a shard by its name, or raise ``PatchproofError``."""
    digits = shard.stem.removeprefix("examples-")
    if not digits.isdecimal():
        raise PatchproofError(f"{shard}: expected examples-NNNNN.parquet, got another name")
    return int(digits)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested JSON objects as one, keys joined by dots."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        inner: value
        for key, entry in values.items()
        for inner, value in _flat(entry, f"{prefix}.{key}" if prefix else key).items()
    }


def _short(values: Mapping[str, Any], key: str, limit: int = 60) -> str:
    text = json.dumps(values[key]) if key in values else "absent"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _some(items: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    shown = separator.join(items[:limit])
    return shown if len(items) <= limit else f"{shown}{separator}and {len(items) - limit} more"


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()
