"""Values of options: what is understood, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchproof import (
    AnyPatch,
    AnyRectangle,
    Box,
    MultiplePatches,
    PatchproofError,
    RectanglePatch,
    RectanglePatches,
    SparsePixels,
    SquarePatch,
    StencilPatch,
    transformations,
)
from patchproof.cli.building import choose_slice, pick_device, read_rows
from patchproof.cli.options import parse_memory, parse_option, parse_pair, parse_threat
from patchproof.datasets import load_dataset


@pytest.mark.parametrize(("text", "pair"), [("6", (6, 6)), ("6x4", (6, 4)), (" 5X7 ", (5, 7))])
def test_pairs(text: str, pair: tuple[int, int]) -> None:
    assert parse_pair("--masks", text) == pair


@pytest.mark.parametrize("text", ["0", "6x0", "", "x", "-1", "1.5", "6x4x2", "six"])
def test_what_is_no_pair_is_named_with_its_option(text: str) -> None:
    with pytest.raises(PatchproofError, match=r"^--masks: expected"):
        parse_pair("--masks", text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2**31), ("500MB", 5 * 10**8), ("1.5 kib", 1536), ("4096", 4096)],
)
def test_memory_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "0", "2 bananas", "-1GiB", "GiB"])
def test_what_is_no_memory_size_is_refused(text: str) -> None:
    with pytest.raises(PatchproofError, match="--memory: expected a size"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("patch", "covering", "locations", "threat"),
    [
        ("5", None, "anywhere", SquarePatch(5)),
        ("5x7", None, "anywhere", RectanglePatch(5, 7)),
        ("2.4%", None, "anywhere", SquarePatch(5)),
        ("0.4%", None, "corners", SquarePatch(2, "corners")),
        (None, 0.02, "anywhere", SquarePatch(5)),  # 20.48 pixels: 4x4 would be too small
        ("3", None, "1,2,10,12", SquarePatch(3, Box(1, 2, 10, 12))),
        ("3x8,8x3", None, "anywhere", RectanglePatches([(3, 8), (8, 3)])),
        ("any:10", None, "corners", AnyRectangle(10, "corners")),
        ("any:1%", None, "anywhere", AnyRectangle(10)),
        ("line:12x2@30", None, "anywhere", StencilPatch.line(12, 2, 30)),
        ("line:4", None, "anywhere", StencilPatch.line(4)),
        ("square:5@45", None, "anywhere", StencilPatch.square(5, 45)),
        ("rectangle:12x2@45", None, "corners", StencilPatch.rectangle(12, 2, 45).at("corners")),
        ("rectangle:3.5x2", None, "anywhere", StencilPatch.rectangle(3.5, 2, 0)),
        ("bounds:square:5@45", None, "anywhere", SquarePatch(8)),
        ("Bounds: line:12x2@0", None, "corners", RectanglePatch(2, 12, "corners")),
        ("aspect:25@2.7:1", None, "anywhere", RectanglePatch(8, 3)),
        ("aspect: 25 @ 1 : 6", None, "corners", RectanglePatch(2, 12, "corners")),
        ("aspect:25@1:1", None, "anywhere", SquarePatch(5)),
        ("5+3x8", None, "anywhere", AnyPatch([SquarePatch(5), RectanglePatch(3, 8)])),
        (
            "2.4% + any:1% + square:5@45",
            None,
            "anywhere",
            AnyPatch([SquarePatch(5), AnyRectangle(10), StencilPatch.square(5, 45)]),
        ),
        (
            "3x8,8x3+diamond:5",
            None,
            "corners",
            AnyPatch(
                [
                    RectanglePatches([(3, 8), (8, 3)], "corners"),
                    StencilPatch.diamond(5).at("corners"),
                ]
            ),
        ),
        ("transformed:5", None, "anywhere", transformations(5)["worst case"]),
        (
            "transformed:5+any:4",
            None,
            "0,0,16,16",
            AnyPatch(
                [
                    transformations(5, Box(0, 0, 16, 16))["worst case"],
                    AnyRectangle(4, Box(0, 0, 16, 16)),
                ]
            ),
        ),
        (
            "2*5+3x8",
            None,
            "anywhere",
            MultiplePatches(2, AnyPatch([SquarePatch(5), RectanglePatch(3, 8)])),
        ),
        ("diamond:7.5", None, "anywhere", StencilPatch.diamond(7.5)),
        ("parallelogram:4x6@-20", None, "anywhere", StencilPatch.parallelogram(4, 6, -20)),
        ("2*5", None, "anywhere", MultiplePatches(2, SquarePatch(5))),
        ("3 * any:4", None, "corners", MultiplePatches(3, AnyRectangle(4, "corners"))),
        ("sparse:4", None, "anywhere", SparsePixels(4)),
    ],
)
def test_threats(patch: str, covering: float, locations: str, threat: Any) -> None:
    assert parse_threat(patch, covering, locations, (32, 32)) == threat


def test_a_share_of_the_pixels_is_read_as_its_digits_say() -> None:
    """In binary 0.35 / 100 is a little less, and 34 pixels would be certified in place of 35."""
    assert parse_threat("any:0.35%", None, "anywhere", (100, 100)) == AnyRectangle(35)


def test_a_stencil_is_every_pixel_of_a_picture_that_is_not_black(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[1, 1], pixels[1, 2], pixels[2, 1] = (255, 255, 255), (0, 0, 4), (1, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "Shape.png")
    threat = parse_threat(f"stencil:{tmp_path / 'Shape.png'}", None, "anywhere", (32, 32))
    assert threat == StencilPatch(["##", "#."])
    text = f"2*4+bounds:stencil:{tmp_path / 'Shape.png'}"
    either = MultiplePatches(2, AnyPatch([SquarePatch(4), SquarePatch(2)]))
    assert parse_threat(text, None, "anywhere", (32, 32)) == either
    Image.fromarray(pixels[..., 0].astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(PatchproofError, match="mode F"):
        parse_threat(f"stencil:{tmp_path / 'float.tiff'}", None, "anywhere", (32, 32))


@pytest.mark.parametrize(
    ("patch", "covering", "locations", "message"),
    [
        (None, None, "anywhere", "exactly one"),
        ("5", 0.02, "anywhere", "exactly one"),
        ("3.7%", None, "anywhere", "published patch size"),
        ("33", None, "anywhere", "no larger than the 32x32 image"),
        ("5", None, "middle", "--locations: expected anywhere"),
        ("5", None, "0,0,4,4", "holds a 5x5 patch"),
        ("5", None, "30,0,9,9", "inside the 32x32 image"),
        (None, 1.5, "anywhere", "fraction of pixels"),
        ("0*5", None, "anywhere", "at least 1, got 0"),
        ("2*3*5", None, "anywhere", "number of patches before"),
        ("any:0", None, "anywhere", "max_pixels"),
        ("any:200%", None, "anywhere", "fraction of pixels"),
        ("any:9999999999", None, "anywhere", "any:10"),
        ("any:99999999", None, "0,0,99999999,99999999", "inside the 32x32 image"),
        ("blob:3", None, "anywhere", "diamond:7"),
        ("diamond:3@4", None, "anywhere", "diamond:7"),
        ("line:a", None, "anywhere", "numbers such as"),
        ("line:" + "9" * 400, None, "anywhere", "numbers such as"),
        ("diamond:99999", None, "anywhere", "within 4,096 pixels"),
        ("line:-5", None, "anywhere", "positive lengths"),
        ("parallelogram:4x6@90", None, "anywhere", "degrees"),
        ("stencil:nowhere.png", None, "anywhere", "nowhere.png"),
        ("sparse:0", None, "anywhere", "number of pixels: expected at least 1, got 0"),
        ("sparse:1025", None, "anywhere", "at most the 1024 of a 32x32 image"),
        ("sparse:few", None, "anywhere", "sparse:4"),
        ("sparse:4", None, "corners", "--locations: expected anywhere for sparse:4"),
        ("2*sparse:4", None, "anywhere", "expected a threat of one patch"),
        ("5+sparse:4", None, "anywhere", "expected a threat of one patch"),
        ("5+2*4", None, "anywhere", "number of patches before"),
        ("5+", None, "anywhere", "--patch: expected a size of at least 1 such as 5"),
        ("5+33", None, "anywhere", "no larger than the 32x32 image"),
        ("5+12x2", None, "0,0,9,9", "holds a 12x2 patch"),
        ("rectangle:5@45", None, "anywhere", "rectangle:12x2@45"),
        ("rectangle:0x5@45", None, "anywhere", "positive lengths"),
        ("bounds:5", None, "anywhere", "bounds: and one of these"),
        ("bounds:" * 2000 + "square:5", None, "anywhere", "bounds: and one of these"),
        ("aspect:25", None, "anywhere", "aspect:25@2.7:1"),
        ("aspect:25@6", None, "anywhere", "aspect:25@2.7:1"),
        ("aspect:25@1:0", None, "anywhere", "aspect:25@2.7:1"),
        ("aspect:25@-6:-1", None, "anywhere", "aspect:25@2.7:1"),
        ("aspect:25@0:1", None, "anywhere", "aspect ratio"),
        ("aspect:0@1:1", None, "anywhere", "pixels: expected at least 1"),
        ("aspect:4@99:1", None, "anywhere", "half a pixel"),
        ("transformed:5@30", None, "anywhere", "transformed:5"),
        ("transformed:1", None, "anywhere", "half a pixel"),
        ("transformed:20", None, "anywhere", "no larger than the 32x32 image, got 33x12"),
    ],
)
def test_impossible_threats(patch: str, covering: float, locations: str, message: str) -> None:
    with pytest.raises(PatchproofError, match=message):
        parse_threat(patch, covering, locations, (32, 32))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.txt", "4 0\n17\n"),
        ("rows.txt", "4, 0, 17"),
        ("rows.csv", "4\n0\n17\n"),
        ("rows.csv", "label,index\n1,4\n0,0\n1,17\n"),
        ("rows.csv", "row,label\n4,1\n0,2\n17,3\n"),
    ],
)
def test_row_numbers(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_rows(tmp_path / name) == [4, 0, 17]


@pytest.mark.parametrize("text", ["", "1 two", "-1"])
def test_what_are_no_row_numbers_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(PatchproofError, match="expected row numbers"):
        read_rows(tmp_path / "rows.txt")


def test_rows_are_chosen_by_their_number_in_the_split(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("8 3")
    test = load_dataset("digits", "test")
    chosen = choose_slice(test, None, 0, tmp_path / "rows.txt")
    assert chosen.indices.tolist() == [8, 3]
    assert chosen.labels.tolist() == [int(test.labels[8]), int(test.labels[3])]
    (tmp_path / "rows.txt").write_text("8 99999")
    with pytest.raises(PatchproofError, match="got 99999"):
        choose_slice(test, None, 0, tmp_path / "rows.txt")
    with pytest.raises(PatchproofError, match="one of --count and --indices"):
        choose_slice(test, 3, 0, tmp_path / "rows.txt")


def test_the_sample_is_the_seeds() -> None:
    test = load_dataset("digits", "test")
    first, second = (choose_slice(test, 5, seed, None).indices.tolist() for seed in (1, 2))
    assert first == choose_slice(test, 5, 1, None).indices.tolist()
    assert first != second


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(PatchproofError, match=r"--device: expected .* got 'abacus'"):
        pick_device("abacus")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("widths=[16,32]", ("widths", [16, 32])),
        ("stem_stride=2", ("stem_stride", 2)),
        ("img=a=b", ("img", "a=b")),
    ],
)
def test_model_options_are_json_or_text(text: str, expected: tuple[str, object]) -> None:
    assert parse_option("--model-option", text) == expected


@pytest.mark.parametrize("text", ["widths", "=3"])
def test_model_options_need_a_name_and_a_value(text: str) -> None:
    with pytest.raises(PatchproofError, match="expected NAME=JSON"):
        parse_option("--model-option", text)
