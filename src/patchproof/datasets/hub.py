"""Data sets of the Hugging Face hub, and folders that the library ``datasets`` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import torch
from torch import Tensor

from patchproof.datasets.images import EncodedPictures
from patchproof.errors import PatchproofError, RunError

_CHOICES = ("config", "image", "label", "revision")


@dataclass(frozen=True)
class HubDataset:
    """Which data set, and which of its columns.

    Attributes:
        name: a repository of the hub such as ``ylecun/mnist``, or the path of a folder.
        cache: where the library keeps its copies; None for its own place.
        config: which of several configurations.
        revision: branch, tag or commit of the repository.
        image: the column of images, where there are several.
        label: the column of labels, where there are several.
    """

    name: str
    cache: Path | None = None
    config: str | None = None
    revision: str | None = None
    image: str | None = None
    label: str | None = None

    @classmethod
    def parse(cls, text: str, cache: Path | None = None) -> HubDataset:
        """Return ``NAME`` or ``NAME?config=C&revision=R&image=COLUMN&label=COLUMN``.

        Raises:
            PatchproofError: no name, something else after the ``?``, or no such folder.
        """
        name, _, query = text.partition("?")
        choices = dict(parse_qsl(query, keep_blank_values=True))
        unknown = sorted(choices.keys() - set(_CHOICES))
        if not name or unknown or not all(choices.values()) or (query and not choices):
            raise PatchproofError(
                f"expected hf:NAME or hf:NAME?{'=...&'.join(_CHOICES)}=..., got 'hf:{text}'"
            )
        folder = Path(name).expanduser()
        if folder.is_dir():
            name = str(folder)
        elif name.startswith((".", "/", "~")):
            raise PatchproofError(f"expected an existing folder, got {name!r}")
        return cls(name, cache, **choices)

    def splits(self) -> list[str]:
        """Return the names of its splits.

        Raises:
            PatchproofError: the library is not installed, or does not know such a data set.
            RunError: the hub cannot be reached, or the files not read.
        """
        datasets = _import_datasets()
        if self._is_saved() and not self._index.is_file():
            return ["all"]
        try:
            if self._is_saved():
                return [str(split) for split in json.loads(self._index.read_text())["splits"]]
            names: list[str] = datasets.get_dataset_split_names(
                self.name, config_name=self.config, revision=self.revision
            )
        except (OSError, datasets.inspect.SplitsNotFoundError) as error:
            reason = error if isinstance(error, OSError) else error.__cause__ or error
            raise RunError(f"cannot get the data set hf:{self.name}: {_line(reason)}") from error
        except (ValueError, RuntimeError) as error:
            raise PatchproofError(
                f"expected a data set of images, got hf:{self.name}: {_line(error)}"
            ) from error
        return names

    def rows(self, split: str) -> tuple[EncodedPictures, Tensor, tuple[str, ...]]:
        """Return the images of a split, their labels (N,) int64, and the names of the classes.

        Raises:
            PatchproofError: no column, or several, of images or of labels; or labels missing.
            RunError: the files cannot be fetched or read.
        """
        datasets = _import_datasets()
        data = self._load(split)
        kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        integers = [
            name
            for name, feature in data.features.items()
            if str(getattr(feature, "dtype", "")).startswith(("int", "uint"))
        ]
        usual = [name for name in ("label", "labels") if name in integers]
        image = _column("image", self.image, images, images, kinds)
        label = _column("label", self.label, integers, classes or usual, kinds)
        encoded = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))

        def content(index: int) -> bytes:
            stored = encoded[index][image] or {}
            if stored.get("bytes") is not None:
                return bytes(stored["bytes"])
            return Path(stored["path"]).read_bytes() if stored.get("path") else b""

        pictures = EncodedPictures(content, lambda index: f"row {index} of hf:{self.name} {split}")
        labels = self._labels(data, label)
        if label in classes:
            return pictures, labels, tuple(data.features[label].names)
        every = (self._labels(self._load(other), label) for other in self.splits())
        highest = max((int(some.max()) for some in every if len(some)), default=0)
        return pictures, labels, tuple(str(number) for number in range(highest + 1))

    @property
    def _index(self) -> Path:
        """Where ``save_to_disk`` of the library lists the splits, if there are several."""
        return Path(self.name) / "dataset_dict.json"

    def _is_saved(self) -> bool:
        """Tell whether this is a folder that ``save_to_disk`` of the library wrote."""
        return self._index.is_file() or self._index.with_name("state.json").is_file()

    def _load(self, split: str) -> Any:
        datasets = _import_datasets()
        try:
            if self._is_saved():
                saved = datasets.load_from_disk(self.name)
                return saved[split] if isinstance(saved, dict) else saved
            return datasets.load_dataset(
                self.name,
                self.config,
                split=split,
                revision=self.revision,
                cache_dir=None if self.cache is None else str(self.cache),
            )
        except Exception as error:  # the library passes on those of all that it reads with
            raise RunError(
                f"cannot read split {split} of hf:{self.name}: {_line(error)}"
            ) from error

    def _labels(self, data: Any, label: str) -> Tensor:
        column = data.select_columns([label]).with_format("arrow")[:][label]
        if column.null_count:
            raise PatchproofError(
                f"expected a label in every row of hf:{self.name}, got {column.null_count} without"
            )
        return torch.from_numpy(column.to_numpy().astype(np.int64))


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise PatchproofError(
            "expected the extra hf for hf: data sets (pip install 'patchproof[hf]'), got none: "
            f"{error}"
        ) from error
    return datasets


def _column(
    role: str,
    asked: str | None,
    possible: Sequence[str],
    likely: Sequence[str],
    kinds: Mapping[str, str],
) -> str:
    """Return the column that is asked for; else the likely one, or the one called ``role``."""
    if asked is not None:
        chosen = [asked] if asked in possible else []
    else:
        chosen = [role] if role in likely else list(likely)
    if len(chosen) != 1:
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise PatchproofError(
            f"expected one column of {role}s, got {asked or ' or '.join(likely) or 'none'} of "
            f"the columns {columns}; hf:NAME?{role}=COLUMN says which"
        )
    return chosen[0]


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
