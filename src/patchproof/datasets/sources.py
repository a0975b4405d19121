"""Find a data set by its name or path, and one of its splits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchproof.datasets.hub import HubDataset
from patchproof.datasets.images import (
    ArrayPictures,
    EncodedPictures,
    ImageDataset,
    Pictures,
    survey,
)
from patchproof.errors import PatchproofError, RunError

_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 5_000
_SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val"), "validation"
)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")
_SURVEYED = 64
"""How many headers are read to find the size and the channels of a data set."""


@dataclass(frozen=True)
class _Rows:
    """A split as its source has it: the labels are by index into the pictures."""

    pictures: Pictures
    labels: Tensor
    class_names: tuple[str, ...]


_Splits = Mapping[str, Callable[[], _Rows]]


def load_dataset(
    source: str | Path,
    split: str = "test",
    *,
    root: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    download: bool = False,
    name: str | None = None,
) -> ImageDataset:
    """Load one split of a data set.

    A source without a validation split gets one: ``validation`` is then 10% of its train split, at
    most 5,000 images, always the same ones, and ``train`` is the rest. For ImageNette and
    ImageNet, ``test`` is the public validation split, as in the papers.

    Args:
        source: ``digits`` (scikit-learn's 8x8 digits, embedded, grey levels 0 to 16 spread over 0
            to 255), ``mnist``, ``cifar10``, ``imagenette`` or ``imagenet`` (torchvision's, under
            ``root``); ``hf:NAME``, a data set of the Hugging Face hub, or a folder that its library
            reads, as ``hf:NAME?config=C&revision=R&image=COLUMN&label=COLUMN`` where there is a
            choice; or the path of a folder: Parquet files ``SPLIT-*.parquet`` with columns
            ``image`` (encoded bytes) and ``label`` (integers), or one folder of images for each
            class, possibly under one for each split. Without split folders, the split is ``all``.
        split: ``train``, ``validation``, ``test`` or ``all``.
        root: where torchvision's data sets are; for ``hf:``, where copies of the files are kept
            (by default where its library keeps them).
        image_size: (H, W) to resize and crop the images to. By default images keep their size,
            and ImageNette and ImageNet come at 224x224.
        download: fetch ``mnist``, ``cifar10`` or ``imagenette`` if it is not under ``root``;
            ``hf:`` data sets are fetched anyway.
        name: what to call the data set; by default ``source``, or the folder's name.

    Raises:
        PatchproofError: no such source or split, files missing, no images, missing columns, labels
            outside the classes, or images of unequal size without ``image_size``.
        RunError: files that are there and cannot be read.
    """
    source, folder = str(source), Path(source)
    if source == "digits":
        splits = _digits()
    elif source in _TORCHVISION:
        if root is None:
            raise PatchproofError(f"expected a root folder (--root) for {source}, got none")
        splits = _TORCHVISION[source](Path(root), download)
        if image_size is None and source in ("imagenette", "imagenet"):
            image_size = (224, 224)
    elif source.startswith("hf:"):
        cache = None if root is None else Path(root)
        splits = _hugging_face(HubDataset.parse(source.removeprefix("hf:"), cache))
    elif not folder.is_dir():
        raise PatchproofError(
            f"expected digits, {', '.join(_TORCHVISION)}, hf:NAME or an existing folder, "
            f"got {source!r}"
        )
    elif parquet := sorted(folder.glob("*.parquet")):
        splits = _parquet(parquet)
    else:
        splits = _image_folder(folder)
    if name is None:
        named = source == "digits" or source in _TORCHVISION or source.startswith("hf:")
        name = source if named else folder.name or folder.resolve().name
    split = _SPLIT_NAMES.get(split, split)
    rows, indices = _select(splits, split, name)
    return _dataset(rows, indices, name, split, image_size)


def _select(splits: _Splits, split: str, name: str) -> tuple[_Rows, Tensor]:
    """Return a split's rows and which of them belong to it, holding out validation images."""
    holds_out = "validation" not in splits and "train" in splits
    available = [*splits, "validation"] if holds_out else list(splits)
    if split not in available:
        hint = "; the folder has no Parquet files or splits" if available == ["all"] else ""
        raise PatchproofError(
            f"expected split {' or '.join(available)} of {name}, got {split!r}{hint}"
        )
    if split not in ("train", "validation") or not holds_out:
        rows = splits[split]()
        return rows, torch.arange(len(rows.labels))
    rows = splits["train"]()
    count = min(round(_HELD_OUT_SHARE * len(rows.labels)), _HELD_OUT_MOST)
    order = torch.randperm(len(rows.labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:count] if split == "validation" else order[count:]
    return rows, chosen.sort().values


def _dataset(
    rows: _Rows, indices: Tensor, name: str, split: str, image_size: tuple[int, int] | None
) -> ImageDataset:
    if len(indices) == 0:
        raise PatchproofError(f"expected images in {name} {split}, got none")
    labels = rows.labels[indices]
    if int(labels.min()) < 0 or int(labels.max()) >= len(rows.class_names):
        raise PatchproofError(
            f"expected labels from 0 to {len(rows.class_names) - 1} in {name} {split}, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
    surveyed = np.linspace(0, len(indices) - 1, min(_SURVEYED, len(indices))).astype(int)
    sizes, channels = survey(rows.pictures, indices[surveyed].tolist())
    if not sizes:
        raise PatchproofError(f"expected images in {name} {split}, got none that can be decoded")
    if image_size is None and len(sizes) > 1:
        raise PatchproofError(
            f"expected images of equal size in {name} {split}, got {sorted(sizes)[:3]} (height, "
            "width); give an image size to resize and crop to"
        )
    return ImageDataset(
        name=name,
        split=split,
        class_names=rows.class_names,
        image_size=image_size or sizes.pop(),
        channels=channels,
        labels=labels,
        indices=indices,
        pictures=rows.pictures,
        resized=image_size is not None,
    )


def _digits() -> _Splits:
    """Split the 1,797 digits 70 : 10 : 20 in a seeded order; indices are within the split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)

    def rows(start: float, end: float) -> _Rows:
        chosen = order[round(start * len(order)) : round(end * len(order))]
        labels = torch.from_numpy(data.target[chosen]).long()
        return _Rows(ArrayPictures(pixels[chosen], "digits"), labels, tuple("0123456789"))

    return {
        "train": partial(rows, 0.0, 0.7),
        "validation": partial(rows, 0.7, 0.8),
        "test": partial(rows, 0.8, 1.0),
    }


def _parquet(files: list[Path]) -> _Splits:
    splits: dict[str, list[Path]] = {}
    for file in files:
        prefix = file.stem.partition("-")[0]
        splits.setdefault(_SPLIT_NAMES.get(prefix, prefix), []).append(file)
    return {split: partial(_parquet_rows, chosen, files) for split, chosen in splits.items()}


def _parquet_rows(chosen: list[Path], every: list[Path]) -> _Rows:
    """Read some Parquet files; without class names, there are as many as labels in every file."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(chosen[0])
        if not {"image", "label"} <= set(schema.names):
            raise PatchproofError(
                f"expected columns image and label in {chosen[0]}, got {schema.names}"
            )
        table = pa.concat_tables(pq.read_table(f, columns=["image", "label"]) for f in chosen)
        all_labels = [pq.read_table(f, columns=["label"])["label"] for f in every]
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"cannot read {chosen[0].parent}: {error}") from error
    images, labels = table["image"], table["label"]
    if not pa.types.is_integer(labels.type) or labels.null_count:
        raise PatchproofError(
            f"expected an integer label in every row of {chosen[0]}, got {labels.type} with "
            f"{labels.null_count} missing"
        )
    if pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = pc.struct_field(images, "bytes")
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise PatchproofError(f"expected encoded images in {chosen[0]}, got {images.type}")
    pictures = EncodedPictures(
        content=lambda index: images[index].as_py() or b"",
        describe=lambda index: f"row {index} of {chosen[0].parent} ({chosen[0].name}, ...)",
    )
    class_names = _hugging_face_class_names(schema.metadata or {})
    if class_names is None:
        highest = max(pc.max(column).as_py() or 0 for column in all_labels)
        class_names = tuple(str(label) for label in range(highest + 1))
    return _Rows(pictures, torch.from_numpy(labels.to_numpy().astype(np.int64)), class_names)


def _hugging_face_class_names(metadata: Mapping[bytes, bytes]) -> tuple[str, ...] | None:
    try:
        features: Any = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(features["label"]["names"])
    except (KeyError, TypeError, json.JSONDecodeError):
        return None


def _image_folder(folder: Path) -> _Splits:
    folders = {_SPLIT_NAMES[f.name]: f for f in _folders(folder) if f.name in _SPLIT_NAMES}
    if folders:
        return {split: partial(_folder_rows, inner) for split, inner in folders.items()}
    _class_folders(folder)
    return {"all": partial(_folder_rows, folder)}


def _folder_rows(folder: Path, class_names: tuple[str, ...] | None = None) -> _Rows:
    """Collect the images of each class folder; classes are in the order of the folders' names."""
    classes = _class_folders(folder)
    files = [
        (file, label)
        for label, inner in enumerate(classes)
        for file in sorted(inner.rglob("*"))
        if file.suffix.lower() in _IMAGE_SUFFIXES
    ]
    paths = [file for file, _ in files]
    pictures = EncodedPictures(
        content=lambda index: paths[index].read_bytes(), describe=lambda index: str(paths[index])
    )
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return _Rows(pictures, labels, class_names or tuple(inner.name for inner in classes))


def _class_folders(folder: Path) -> list[Path]:
    """Return the folder of each class, or raise if there is none."""
    classes = _folders(folder)
    if not classes:
        raise PatchproofError(f"expected Parquet files or class folders in {folder}, got none")
    return classes


def _folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _hugging_face(hub: HubDataset) -> _Splits:
    def rows(split: str) -> _Rows:
        return _Rows(*hub.rows(split))

    return {_SPLIT_NAMES.get(split, split): partial(rows, split) for split in hub.splits()}


def _arrays(class_name: str, root: Path, download: bool) -> _Splits:
    """Read torchvision's MNIST or CIFAR10, which are arrays in memory."""

    def rows(train: bool) -> _Rows:
        from torchvision import datasets

        data = _open(getattr(datasets, class_name), root, train, download)
        pictures = ArrayPictures(np.asarray(data.data), class_name)
        return _Rows(pictures, torch.as_tensor(data.targets), tuple(map(str, data.classes)))

    return {"train": partial(rows, True), "test": partial(rows, False)}


def _imagenette(root: Path, download: bool) -> _Splits:
    def rows(split: str) -> _Rows:
        from torchvision.datasets import Imagenette

        folder = root / "imagenette2" / split
        data = _open(Imagenette, root, split, download and not folder.is_dir())
        return _folder_rows(folder, tuple(names[0] for names in data.classes))

    return {"train": partial(rows, "train"), "test": partial(rows, "val")}


def _imagenet(root: Path, download: bool) -> _Splits:
    if download:
        raise PatchproofError("expected download=False: ImageNet needs an account at image-net.org")

    def rows(split: str) -> _Rows:
        from torchvision.datasets import ImageNet

        data = _open(ImageNet, root, split, False)
        return _folder_rows(root / split, tuple(names[0] for names in data.classes))

    return {"train": partial(rows, "train"), "test": partial(rows, "val")}


def _open(kind: Callable[..., Any], root: Path, split: str | bool, download: bool) -> Any:
    """Open one of torchvision's data sets; missing files are misuse, a failed download is not."""
    try:
        return kind(str(root), split, **({"download": True} if download else {}))
    except (RuntimeError, OSError) as error:
        first_line = str(error).partition("\n")[0].replace("download=True", "--download")
        message = f"cannot open the data set under the root folder {root}: {first_line}"
        raise (RunError if download else PatchproofError)(message) from error


_TORCHVISION: Mapping[str, Callable[[Path, bool], _Splits]] = {
    "mnist": partial(_arrays, "MNIST"),
    "cifar10": partial(_arrays, "CIFAR10"),
    "imagenette": _imagenette,
    "imagenet": _imagenet,
}
