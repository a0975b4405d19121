"""Every source gives the same kind of data set, and says what is wrong with its files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from patchproof.datasets import CorruptImageError, load_dataset
from patchproof.errors import PatchproofError, RunError


def picture(value: int, size: tuple[int, int] = (6, 4), mode: str = "L") -> PIL.Image.Image:
    """An image of one colour; size is (width, height)."""
    return PIL.Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value))


def encoded(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_parquet(
    file: Path, labels: list[Any], images: list[Any] | None = None, names: list[str] | None = None
) -> None:
    images = images or [{"bytes": encoded(picture(i)), "path": None} for i in range(len(labels))]
    table = pa.table({"image": images, "label": labels})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    file.parent.mkdir(exist_ok=True)
    pq.write_table(table, file)


def write_image_folder(folder: Path, images: dict[str, PIL.Image.Image]) -> None:
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)


def test_digits_are_split_without_overlap() -> None:
    splits = [load_dataset("digits", split) for split in ("train", "validation", "test")]
    assert [len(data) for data in splits] == [1258, 180, 359]
    assert all(data.image_size == (8, 8) and data.channels == 1 for data in splits)
    pixels = {image.numpy().tobytes() for data in splits for image in data.tensors()[0]}
    assert len(pixels) > 1790  # scikit-learn's digits are nearly all different
    assert all(len(data.labels.unique()) == 10 for data in splits)
    values = splits[0].tensors()[0].unique()
    assert torch.equal(values, (torch.arange(17) * (255 / 16)).round().to(torch.uint8))


class TestParquet:
    def test_rows_of_all_files_of_a_split_in_order(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "test-00000-of-00002.parquet", [0, 1, 0], names=["cat", "dog"])
        write_parquet(tmp_path / "test-00001-of-00002.parquet", [1, 1], names=["cat", "dog"])
        data = load_dataset(str(tmp_path), "test")
        assert data.class_names == ("cat", "dog")
        assert data.name == tmp_path.name
        assert data.labels.tolist() == [0, 1, 0, 1, 1]
        assert data.image_size == (4, 6)
        assert [int(data.image(i)[0, 0, 0] * 255) for i in range(5)] == [0, 1, 2, 0, 1]

    def test_binary_images_and_numbered_classes(self, tmp_path: Path) -> None:
        colours = [encoded(picture(9, mode="RGB"))] * 2
        write_parquet(tmp_path / "test.parquet", [1, 0], images=colours)
        write_parquet(tmp_path / "train.parquet", [3, 2], images=colours)
        data = load_dataset(str(tmp_path))
        assert data.class_names == ("0", "1", "2", "3")
        assert data.channels == 3
        assert (data.image(0)[:, 0, 0] * 255).tolist() == [9, 0, 246]

    def test_validation_is_held_out_of_train_where_there_is_none(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "train-0.parquet", [0, 1] * 20)
        write_parquet(tmp_path / "test-0.parquet", [0, 1])
        train, validation = (load_dataset(str(tmp_path), s) for s in ("train", "validation"))
        assert (len(train), len(validation)) == (36, 4)
        assert sorted(train.indices.tolist() + validation.indices.tolist()) == list(range(40))
        assert load_dataset(str(tmp_path), "val").indices.equal(validation.indices)
        chosen = int(validation.indices[2])
        assert torch.equal(validation.image(2), torch.full((1, 4, 6), chosen / 255))

    def test_a_validation_split_of_its_own_is_taken_whole(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "train-0.parquet", [0, 1] * 20)
        write_parquet(tmp_path / "val-0.parquet", [0, 1, 1])
        assert len(load_dataset(str(tmp_path), "train")) == 40
        assert len(load_dataset(str(tmp_path), "validation")) == 3

    def test_an_unknown_split_lists_the_known_ones(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "validation-0.parquet", [0, 1])
        with pytest.raises(PatchproofError, match=r"expected split validation of .*, got 'test'"):
            load_dataset(str(tmp_path))

    def test_a_damaged_image_is_named_and_leaves_the_others(self, tmp_path: Path) -> None:
        whole = encoded(picture(5))
        write_parquet(tmp_path / "test-0.parquet", [0] * 4, images=[b"?", whole, whole[:45], None])
        data = load_dataset(str(tmp_path))
        assert data.image(1).shape == (1, 4, 6)
        for row in (0, 2, 3):
            with pytest.raises(CorruptImageError, match=rf"row {row} of .*test-0\.parquet"):
                data.image(row)
        assert len(data.digest()) == 64

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"image": [b"?"]}, "expected columns image and label"),
            ({"image": [b"?"], "label": ["cat"]}, "expected an integer label"),
            ({"image": [b"?"], "label": pa.array([None], pa.int64())}, "1 missing"),
            ({"image": [3], "label": [0]}, "expected encoded images"),
            ({"image": [b"?"], "label": [0]}, "none that can be decoded"),
            ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "got none"),
        ],
    )
    def test_other_tables_are_refused(
        self, tmp_path: Path, columns: dict[str, Any], message: str
    ) -> None:
        pq.write_table(pa.table(columns), tmp_path / "test.parquet")
        with pytest.raises(PatchproofError, match=message):
            load_dataset(str(tmp_path))

    @pytest.mark.parametrize("label", [-1, 2])
    def test_labels_outside_the_classes_are_refused(self, tmp_path: Path, label: int) -> None:
        write_parquet(tmp_path / "test.parquet", [0, label], names=["cat", "dog"])
        with pytest.raises(PatchproofError, match="expected labels from 0 to 1"):
            load_dataset(str(tmp_path))

    def test_a_damaged_file_is_a_failure_and_not_misuse(self, tmp_path: Path) -> None:
        (tmp_path / "test.parquet").write_bytes(b"not Parquet at all")
        with pytest.raises(RunError, match="cannot read"):
            load_dataset(str(tmp_path))


class TestImageFolder:
    def test_classes_are_the_folders_in_order(self, tmp_path: Path) -> None:
        images = {"test/dog/1.png": picture(1), "test/cat/2.png": picture(2)}
        write_image_folder(tmp_path, images | {"val/cat/3.png": picture(3)})
        (tmp_path / "test/cat/notes.txt").write_text("not an image")
        data = load_dataset(str(tmp_path))
        assert data.class_names == ("cat", "dog")
        assert data.labels.tolist() == [0, 1]
        assert int(data.image(0)[0, 0, 0] * 255) == 2
        assert len(load_dataset(str(tmp_path), "validation")) == 1

    def test_without_split_folders_the_split_is_all(self, tmp_path: Path) -> None:
        write_image_folder(tmp_path, {"dog/1.png": picture(1), "cat/2.png": picture(2)})
        assert len(load_dataset(str(tmp_path), "all")) == 2
        with pytest.raises(PatchproofError, match="expected split all"):
            load_dataset(str(tmp_path))

    def test_one_colour_image_makes_all_rgb(self, tmp_path: Path) -> None:
        write_image_folder(tmp_path, {"a/1.png": picture(7), "a/2.png": picture(7, mode="RGB")})
        images, _ = load_dataset(str(tmp_path), "all").tensors()
        assert images[:, :, 0, 0].tolist() == [[7, 7, 7], [7, 0, 248]]

    def test_images_of_unequal_size_need_an_image_size(self, tmp_path: Path) -> None:
        write_image_folder(tmp_path, {"a/1.png": picture(1), "a/2.png": picture(2, (9, 9))})
        with pytest.raises(PatchproofError, match="give an image size"):
            load_dataset(str(tmp_path), "all")
        images, _ = load_dataset(str(tmp_path), "all", image_size=(5, 7)).tensors()
        assert images.shape == (2, 1, 5, 7)

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        write_image_folder(tmp_path, {"a/1.png": picture(1)})
        (tmp_path / "a/2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        data = load_dataset(str(tmp_path), "all")
        with pytest.raises(CorruptImageError, match=r"a/2\.png"):
            data.image(1)

    def test_a_folder_without_images_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(PatchproofError, match="Parquet files or class folders"):
            load_dataset(str(tmp_path), "all")
        (tmp_path / "a").mkdir()
        with pytest.raises(PatchproofError, match=r"expected images in .*, got none"):
            load_dataset(str(tmp_path), "all")


class TestTorchvision:
    def test_cifar10_arrays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Downloaded:
            classes = ("cat", "dog")

            def __init__(self, root: str, train: bool, download: bool = False) -> None:
                assert (root, download) == (str(tmp_path), False)
                count = 20 if train else 2
                self.data = np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3)
                self.targets = [0, 1] * (count // 2)

        monkeypatch.setattr("torchvision.datasets.CIFAR10", Downloaded)
        data = load_dataset("cifar10", "train", root=tmp_path)
        assert (len(data), data.channels, data.class_names) == (18, 3, ("cat", "dog"))
        assert (data.image(0)[:, 0, 0] * 255).tolist() == [
            12 * int(data.indices[0]) + c for c in range(3)
        ]

    @pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenette", "imagenet"])
    def test_missing_files_are_misuse(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(PatchproofError, match="cannot open the data set under the root") as e:
            load_dataset(name, root=tmp_path)
        assert e.value.exit_code == 2

    def test_a_failed_download_is_a_failure(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*_: object, **__: object) -> None:
            raise OSError("no route to host")

        monkeypatch.setattr("torchvision.datasets.MNIST", unreachable)
        with pytest.raises(RunError, match="no route to host"):
            load_dataset("mnist", root=tmp_path, download=True)

    def test_a_root_folder_is_needed(self) -> None:
        with pytest.raises(PatchproofError, match="expected a root folder"):
            load_dataset("mnist")

    def test_imagenette_test_is_the_public_validation_split(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            for wnid in ("n01440764", "n02102040"):
                write_image_folder(
                    tmp_path / "imagenette2" / split / wnid,
                    {"1.JPEG": picture(3, (300, 250), "RGB")},
                )
        data = load_dataset("imagenette", root=tmp_path)
        assert len(data) == 2
        assert data.image_size == (224, 224)
        assert data.class_names[0] == "tench"
        assert data.image(0).shape == (3, 224, 224)


def test_an_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(PatchproofError, match=r"digits, mnist, cifar10, .* got 'no-such-folder'"):
        load_dataset("no-such-folder")
