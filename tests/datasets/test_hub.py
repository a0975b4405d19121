"""Data sets of the Hugging Face library: equal images and labels, columns found by their type."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from patchproof.datasets import CorruptImageError, ImageDataset, load_dataset
from patchproof.errors import PatchproofError, RunError

hugging_face = pytest.importorskip("datasets")

Load = Callable[..., ImageDataset]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Return ``load_dataset`` of the folder ``data``, with the library's copies in ``copies``."""

    def load(split: str = "test", query: str = "", **options: Any) -> ImageDataset:
        source = f"hf:{tmp_path / 'data'}{query}"
        return load_dataset(source, split, root=tmp_path / "copies", **options)

    return load


def encoded(value: int, size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("L", size, value).save(file, "PNG")
    return file.getvalue()


def table(labels: list[Any], feature: Any = None, **more: tuple[list[Any], Any]) -> Any:
    """Return a data set whose image i is of grey level i."""
    columns = {
        "image": [{"bytes": encoded(i), "path": None} for i in range(len(labels))],
        "label": labels,
    }
    kinds = {
        "image": hugging_face.Image(),
        "label": feature or hugging_face.ClassLabel(names=["cat", "dog"]),
    }
    columns |= {name: values for name, (values, _) in more.items()}
    kinds |= {name: kind for name, (_, kind) in more.items()}
    return hugging_face.Dataset.from_dict(columns, features=hugging_face.Features(kinds))


def write(data: Any, tmp_path: Path, split: str = "test") -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    data.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")


def test_a_folder_gives_what_the_parquet_loader_gives(load: Load, tmp_path: Path) -> None:
    write(table([0, 1, 1]), tmp_path)
    ours, parquet = load(), load_dataset(tmp_path / "data")
    assert ours.class_names == parquet.class_names == ("cat", "dog")
    assert torch.equal(ours.labels, parquet.labels)
    assert ours.indices.tolist() == [0, 1, 2]
    assert torch.equal(ours.tensors()[0], parquet.tensors()[0])
    assert int(ours.image(2)[0, 0, 0] * 255) == 2
    assert ours.digest() == parquet.digest()
    assert ours.name == f"hf:{tmp_path / 'data'}"


def test_validation_is_held_out_of_train_where_there_is_none(load: Load, tmp_path: Path) -> None:
    write(table([0, 1] * 10), tmp_path, "train")
    train, validation = load("train"), load("val")
    assert (len(train), len(validation)) == (18, 2)
    chosen = int(validation.indices[1])
    assert torch.equal(validation.image(1), torch.full((1, 4, 6), chosen / 255))
    with pytest.raises(PatchproofError, match="expected split train or validation of hf:"):
        load("test")


def test_columns_are_found_by_their_type_or_named(load: Load, tmp_path: Path) -> None:
    fine = ([1, 0, 2], hugging_face.ClassLabel(names=["a", "b", "c"]))
    data = table([0, 1, 0], fine=fine, id=([7, 8, 9], hugging_face.Value("int64")))
    write(data.rename_columns({"image": "img", "label": "coarse"}), tmp_path)
    with pytest.raises(PatchproofError, match=r"one column of labels, got coarse or fine of .*id"):
        load()
    assert load(query="?label=fine").class_names == ("a", "b", "c")
    assert load(query="?label=fine&image=img").labels.tolist() == [1, 0, 2]
    assert load(query="?label=coarse").class_names == ("cat", "dog")
    with pytest.raises(PatchproofError, match=r"got none|got img2 of the columns img \(Image\)"):
        load(query="?label=fine&image=img2")


def test_integers_are_numbered_classes_over_all_splits(load: Load, tmp_path: Path) -> None:
    write(table([1, 0], hugging_face.Value("int32")), tmp_path)
    write(table([3, 2], hugging_face.Value("int32")), tmp_path, "train")
    data = load()
    assert data.class_names == ("0", "1", "2", "3")
    assert data.labels.tolist() == [1, 0]


def test_missing_labels_are_refused(load: Load, tmp_path: Path) -> None:
    write(table([1, None, 0]), tmp_path)
    with pytest.raises(PatchproofError, match=r"expected a label in every row .* got 1 without"):
        load()


def test_data_without_images_are_refused(load: Load, tmp_path: Path) -> None:
    write(table([0, 1]).remove_columns("image"), tmp_path)
    with pytest.raises(PatchproofError, match=r"one column of images, got none of .*ClassLabel"):
        load()


def test_a_damaged_image_is_named_and_leaves_the_others(load: Load, tmp_path: Path) -> None:
    data = table([0, 1, 0], hugging_face.ClassLabel(names=["cat", "dog"]))
    pictures = [{"bytes": b"?", "path": None}, {"bytes": encoded(5), "path": None}, None]
    kinds = data.features
    write(
        hugging_face.Dataset.from_dict({"image": pictures, "label": [0, 1, 0]}, features=kinds),
        tmp_path,
    )
    loaded = load()
    assert loaded.image(1).shape == (1, 4, 6)
    for row in (0, 2):
        with pytest.raises(CorruptImageError, match=rf"row {row} of hf:.* test"):
            loaded.image(row)
    assert len(loaded.digest()) == 64


def test_a_damaged_file_is_a_failure(load: Load, tmp_path: Path) -> None:
    write(table([0, 1]), tmp_path)
    (tmp_path / "data" / "test-00000-of-00001.parquet").write_bytes(b"not Parquet")
    with pytest.raises(RunError, match=r"cannot get the data set hf:.* Parquet"):
        load()


def test_a_file_with_damaged_rows_is_a_failure(load: Load, tmp_path: Path) -> None:
    write(table([0, 1]), tmp_path)
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[4:200] = bytes(196)  # the footer stays
    file.write_bytes(content)
    with pytest.raises(RunError, match="cannot read split test of hf:"):
        load()


def test_image_folders_of_the_library(load: Load, tmp_path: Path) -> None:
    for name in ("test/cat/1.png", "test/dog/2.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(encoded(9, (3, 3)))
    data = load(image_size=(2, 2))
    assert data.class_names == ("cat", "dog")
    assert sorted(data.labels.tolist()) == [0, 1]
    assert int(data.image(0)[0, 0, 0] * 255) == 9


def test_what_the_library_saved_to_disk(load: Load, tmp_path: Path) -> None:
    data = table([0, 1, 1])
    splits = {"test": data, "validation": data.select([2, 0])}
    hugging_face.DatasetDict(splits).save_to_disk(tmp_path / "data")
    assert load().labels.tolist() == [0, 1, 1]
    validation = load("validation")
    assert validation.labels.tolist() == [1, 0]
    assert torch.equal(validation.image(0), torch.full((1, 4, 6), 2 / 255))


def test_one_split_saved_to_disk_is_all(load: Load, tmp_path: Path) -> None:
    table([0, 1, 1]).save_to_disk(tmp_path / "data")
    assert load("all").labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:", "expected hf:NAME or hf:NAME.config="),
        ("hf:a/b?colour=red", "got 'hf:a/b.colour=red'"),
        ("hf:a/b?label", "expected hf:NAME or"),
        ("hf:./nowhere", "expected an existing folder, got './nowhere'"),
        ("hf:not a name", "expected a data set of images, got hf:not a name"),
    ],
)
def test_mistakes_are_named(source: str, message: str) -> None:
    with pytest.raises(PatchproofError, match=message) as caught:
        load_dataset(source)
    assert caught.value.exit_code == 2


def test_the_hub_is_asked_for_what_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def split_names(*name: object, **options: object) -> list[str]:
        asked.append((*name, options))
        return ["train", "valid"]

    def loaded(*name: object, **options: object) -> Any:
        asked.append((*name, options))
        return table([0, 1])

    monkeypatch.setattr("datasets.get_dataset_split_names", split_names)
    monkeypatch.setattr("datasets.load_dataset", loaded)
    data = load_dataset("hf:someone/pets?config=small&revision=v1", "validation", root=tmp_path)
    assert len(data) == 2
    assert data.name == "hf:someone/pets?config=small&revision=v1"
    assert asked == [
        ("someone/pets", {"config_name": "small", "revision": "v1"}),
        (
            "someone/pets",
            "small",
            {"split": "valid", "revision": "v1", "cache_dir": str(tmp_path)},
        ),
    ]


def test_a_hub_out_of_reach_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("datasets.get_dataset_split_names", unreachable)
    with pytest.raises(RunError, match="cannot get the data set hf:someone/pets: no route to host"):
        load_dataset("hf:someone/pets")


def test_the_extra_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PatchproofError, match=r"pip install 'patchproof\[hf\]'"):
        load_dataset("hf:someone/pets")
