"""Options that several commands share, and the values that they take."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from patchproof.models.ablation import Ablation
    from patchproof.threat import StencilPatch, Threat
    from patchproof.threat.patches import Locations as Place

_DATA = "Images"
_MODEL = "Model"
_THREAT = "Attacker"
_DEFENSE = "Defense"
_MACHINE = "Machine"

Data = Annotated[
    str,
    typer.Option(
        help="digits (comes with patchproof), mnist, cifar10, imagenette, imagenet (under --root), "
        "hf:NAME (a data set of the Hugging Face hub), or a folder: one folder of images a class, "
        "or Parquet files.",
        rich_help_panel=_DATA,
    ),
]
Root = Annotated[
    Path | None,
    typer.Option(help="Folder with torchvision's data sets, for names.", rich_help_panel=_DATA),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download",
        help="Fetch the data set if it is not under --root.",
        rich_help_panel=_DATA,
    ),
]
Split = Annotated[
    str,
    typer.Option(
        help="train, validation or test; all for a folder without splits.", rich_help_panel=_DATA
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        help="Take this many images, drawn with --seed; by default all.", rich_help_panel=_DATA
    ),
]
Seed = Annotated[
    int, typer.Option(help="Seed of the sample that --count draws.", rich_help_panel=_DATA)
]
Indices = Annotated[
    Path | None,
    typer.Option(
        help="Take these rows of the split: a text file of row numbers from 0, or the column index "
        "of a .csv.",
        rich_help_panel=_DATA,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Classifier file made by `patchproof train`; with --model, a state dictionary "
        "(.safetensors, or a PyTorch file that holds weights only).",
        rich_help_panel=_MODEL,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="What to load the weights into: small-resnet, tiny-resnet, bagnet, band-resnet, "
        "ablation-resnet, crop-resnet9, ibp-mlp, ibp-conv2, ibp-conv4, ibp-conv5-wide, "
        "token-drop:NAME, timm:NAME, torchvision:NAME, hf:NAME (a transformers model of the "
        "Hugging Face hub, or its folder) or python:package.module:factory (installed, or on "
        "PYTHONPATH); or onnx:FILE, which holds its own. Its resize and normalisation are inside, "
        "so that the patch stays in the pixels of your images.",
        rich_help_panel=_MODEL,
    ),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=JSON",
        help="An option of --model, such as widths=[16,32,64] of small-resnet, or mean=[0.5] of "
        "onnx:FILE. May be given several times.",
        rich_help_panel=_MODEL,
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of classes of --model; by default those of the data. predict needs it.",
        rich_help_panel=_MODEL,
    ),
]
Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained",
        help="Use the published weights of a timm:, torchvision: or hf: model.",
        rich_help_panel=_MODEL,
    ),
]
Defense = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="The right label, whatever the patch shows, from masked images: patchcleanser; from "
        "small parts of the image: patchguard, clipped-bagnet, derandomized-smoothing, bagcert, "
        "median, trimmed-mean or top-masking; from bounds of the network's outputs: "
        "interval-bounds; from crops: randomized-cropping, by default all of them. The right label "
        "or an alert: minority-reports or patchguard++. Without a certificate, to be attacked: "
        "undefended, local-gradient-smoothing or digital-watermarking. Or a file saved by "
        "`defense.save` in Python: model, defense and patch in one, which replaces the options for "
        "them.",
        rich_help_panel=_DEFENSE,
    ),
]
DefenseOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=JSON",
        help="An option of a defense other than those over masks, such as "
        "feature=confidence, ablation=column:4 or window=8 of patchguard, method=backward or "
        "screen=3 of interval-bounds, or mode=random-crops and crops=128 of randomized-cropping. "
        "May be given several times; another name lists those that the defense takes.",
        rich_help_panel=_DEFENSE,
    ),
]
Tau = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="minority-reports, patchguard++: the least confidence, from 0 to 1, with which a "
        "masked image raises an alert; by default 0.8. A run tells the figures at every other tau "
        "as well.",
        rich_help_panel=_DEFENSE,
    ),
]
Patch = Annotated[
    str | None,
    typer.Option(
        metavar="PATCH",
        help="Patch in pixels of your images: 5 (a 5x5 square), 5x7 (height x width), 3x8,8x3 (any "
        "of these), any:10 or any:1% (any rectangle of at most that area), line:12x2@30 (length x "
        "thickness @ degrees), square:5@45, rectangle:12x2@45, diamond:7, parallelogram:4x6@20, "
        "stencil:FILE (the pixels of a picture that are not black), or a share as papers name it, "
        "such as 2.4%. aspect:25@2.7:1: a rectangle of about 25 pixels, 2.7 times as high as wide. "
        "bounds:square:5@45: the upright rectangle around a shape. 5+8x3+square:5@45: one patch, "
        "any of these. transformed:5: one patch, a 5x5 square as it is, stretched to 2.7 or 6 "
        "times its other side, or turned by 45 degrees. 2*5: two patches of 5x5 at once. "
        "sparse:4: any 4 pixels, for interval-bounds.",
        rich_help_panel=_THREAT,
    ),
]
Covering = Annotated[
    float | None,
    typer.Option(
        metavar="FRACTION",
        help="Instead of --patch: a square of at least this fraction of the image's pixels, its "
        "side rounded up. 0.02 means 2%.",
        rich_help_panel=_THREAT,
    ),
]
Locations = Annotated[
    str,
    typer.Option(
        metavar="WHERE",
        help="Where the patch may be: anywhere, corners, or a box of pixels top,left,height,width "
        "that it stays in.",
        rich_help_panel=_THREAT,
    ),
]
Masks = Annotated[
    str,
    typer.Option(
        metavar="COUNT",
        help="Masks per side: 6, or 6x4 (down x across). More masks are smaller, which certifies "
        "more images and takes longer.",
        rich_help_panel=_DEFENSE,
    ),
]
Multiplicity = Annotated[
    str,
    typer.Option(
        metavar="COUNT",
        help="Least number of masks per side that cover each place of the patch: 1, or 2x1.",
        rich_help_panel=_DEFENSE,
    ),
]
Layout = Annotated[
    Literal["paper", "balanced"],
    typer.Option(
        help="Which masks: those of the paper, or balanced: as many as --masks allows, each as "
        "small as still covers.",
        rich_help_panel=_DEFENSE,
    ),
]
Shapes = Annotated[
    int | None,
    typer.Option(
        metavar="COUNT",
        help="For --patch any:AREA: how many rectangles cover all others; by default 6. Fewer "
        "need fewer masks, which are larger.",
        rich_help_panel=_DEFENSE,
    ),
]
Inference = Annotated[
    Literal["double", "challenger"],
    typer.Option(
        help="patchcleanser: double: double masking (the paper's Algorithm 1); challenger: fewer "
        "forward passes, slightly lower clean accuracy (Appendix C).",
        rich_help_panel=_DEFENSE,
    ),
]
Fill = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Grey level of masked pixels, from 0 to 1. By default the one that the weights were "
        "trained with, else 0.5.",
        rich_help_panel=_DEFENSE,
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Logits: a masked image whose two best classes are no further apart counts as lost, "
        "because rounding may swap them. By default a measured bound; 0 for interval-bounds, whose "
        "bounds allow for rounding themselves.",
        rich_help_panel=_DEFENSE,
    ),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Resize and crop images to this many pixels: 224, or 224x224 (height x width). "
        "By default images keep their size. The patch is measured after it.",
    ),
]
Stop = Annotated[
    Literal["first_lost_region", "never"],
    typer.Option(
        help="first_lost_region: leave an image once it cannot be certified any more (quick, "
        "enough for accuracies); never: settle every place of the patch."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images per forward pass; by default chosen by the size of the images.",
        rich_help_panel=_MACHINE,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that a forward pass may take, such as 2GiB or 500MB.",
        rich_help_panel=_MACHINE,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps.", rich_help_panel=_MACHINE
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processor threads; by default PyTorch's choice.", rich_help_panel=_MACHINE
    ),
]

_DECIMAL = r"\d{1,6}(?:\.\d{1,9})?"
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_option(option: str, text: str) -> tuple[str, Any]:
    """Return ``widths=[16,32]`` as ("widths", [16, 32]); what is not JSON is a string.

    Args:
        option: the option that takes it, for the message.
        text: NAME=JSON.

    Raises:
        PatchproofError: no name or no ``=``.
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise _misuse(option, "NAME=JSON", text)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parse_model_options(texts: list[str] | None) -> dict[str, Any]:
    """Return the values of ``--model-option`` by their names.

    Raises:
        PatchproofError: no name or no ``=``.
    """
    return dict(parse_option("--model-option", text) for text in texts or [])


def parse_defense_options(texts: list[str] | None) -> dict[str, Any]:
    """Return the values of ``--defense-option`` by their names.

    Raises:
        PatchproofError: no name or no ``=``.
    """
    return dict(parse_option("--defense-option", text) for text in texts or [])


def parse_attack_options(texts: list[str] | None) -> dict[str, Any]:
    """Return the values of ``--attack-option`` by their names.

    Raises:
        PatchproofError: no name or no ``=``.
    """
    return dict(parse_option("--attack-option", text) for text in texts or [])


def parse_pair(option: str, text: str) -> tuple[int, int]:
    """Return ``6`` as (6, 6) and ``6x4`` as (6, 4); at least 1 each."""
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", text.strip().lower())
    if match is not None:
        first = int(match[1])
        second = first if match[2] is None else int(match[2])
        if min(first, second) >= 1:
            return first, second
    raise _misuse(option, "a number such as 6, or two such as 6x4, from 1", text)


def parse_ablation(option: str, text: str) -> Ablation:
    """Return ``column:4``, ``row:4`` or ``block:8`` as what is kept of an image.

    Raises:
        PatchproofError: something else.
    """
    from patchproof.models.ablation import Ablation, AblationKind

    match = re.fullmatch(r"([a-z]+):(\d{1,9})", text.strip().lower())
    if match is None:
        raise _misuse(option, "column:4, row:4 or block:8 (pixels)", text)
    if match[1] not in (kinds := get_args(AblationKind)):
        raise _misuse(option, f"one of {kinds}", match[1])
    return Ablation(cast("AblationKind", match[1]), int(match[2]))


def parse_memory(text: str) -> int:
    """Return ``2GiB``, ``500 MB`` or a number as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is not None and match[2] in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2]])
        if size >= 1:
            return size
    raise _misuse("--memory", "a size such as 2GiB or 500MB", text)


_PLUS = re.compile(
    r"\+(?=\s*(?:\d|(?:any|sparse|aspect|transformed|bounds|line|square|rectangle|diamond|"
    r"parallelogram|stencil)\s*:))",
    re.IGNORECASE,
)
"""Between the patches of ``5+square:5@45``; not in the name of a picture."""


def parse_threat(
    patch: str | None, covering: float | None, locations: str, image_size: tuple[int, int]
) -> Threat:
    """Return what the attacker may do on images of (height, width) pixels.

    Args:
        patch: as the help of ``--patch`` says; or None.
        covering: a fraction of the image's pixels; or None.
        locations: ``anywhere``, ``corners`` or ``top,left,height,width``.
        image_size: (H, W) in pixels.

    Raises:
        PatchproofError: not exactly one of ``patch`` and ``covering``, a value that cannot be read,
            or a patch that does not fit.
    """
    from patchproof.threat import AnyPatch, MultiplePatches, SquarePatch

    if (patch is None) == (covering is None):
        raise _misuse(
            "--patch or --covering", "exactly one of them", "none" if patch is None else "both"
        )
    place = _parse_locations(locations)
    if patch is None:
        assert covering is not None
        return SquarePatch(SquarePatch.covering(covering, image_size).height, place)
    count, times, one = patch.rpartition("*")
    if times and not re.fullmatch(r"\d{1,6}", count.strip()):
        raise _misuse("--patch", "a number of patches before *, such as 2*5", patch)
    kinds = [_parse_patch(kind, patch, place, image_size) for kind in _PLUS.split(one)]
    threat = kinds[0] if len(kinds) == 1 else AnyPatch(kinds)
    if times:
        threat = MultiplePatches(int(count), threat)
    threat.regions(image_size)
    return threat


def _parse_patch(text: str, patch: str, place: Place, image_size: tuple[int, int]) -> Threat:
    """Return one patch, from a part of ``--patch`` without a number of patches or ``+``."""
    from patchproof.threat import (
        AnyRectangle,
        RectanglePatch,
        RectanglePatches,
        SparsePixels,
        SquarePatch,
        transformations,
    )

    kind, colon, rest = text.partition(":")
    kind, size = kind.strip().lower(), rest.strip().lower()
    if kind == "any":
        if size.endswith("%"):
            _number(size[:-1], patch)
            share = AnyRectangle.of_share(Decimal(size[:-1].strip()) / 100, image_size)
            return AnyRectangle(share.max_pixels, place)
        if not re.fullmatch(r"\d{1,9}", size):
            raise _misuse("--patch", "any:10 (pixels) or any:1%", patch)
        return AnyRectangle(int(size), place)
    if kind == "sparse":
        if place != "anywhere":
            got = "corners" if place == "corners" else "a box"
            raise _misuse("--locations", f"anywhere for {patch}", got)
        if not re.fullmatch(r"\d{1,9}", size):
            raise _misuse("--patch", "sparse:4 (pixels)", patch)
        return SparsePixels(int(size))
    if kind == "aspect":
        match = re.fullmatch(rf"(\d{{1,9}})@({_DECIMAL}):({_DECIMAL})", size.replace(" ", ""))
        if match is None or not float(match[3]):
            raise _misuse("--patch", "aspect:25@2.7:1 (pixels @ height:width)", patch)
        return RectanglePatch.of_aspect(int(match[1]), float(match[2]) / float(match[3]), place)
    if kind == "transformed":
        if not re.fullmatch(r"\d{1,4}", size):
            raise _misuse("--patch", "transformed:5 (the side of a square in pixels)", patch)
        return transformations(int(size), place)["worst case"]
    if kind == "bounds":
        return _parse_shape(rest, patch, place).bounding_rectangle()
    if colon:
        return _parse_shape(text, patch, place)
    size = text.strip().lower()
    if "," in size:
        return RectanglePatches([parse_pair("--patch", pair) for pair in size.split(",")], place)
    if size.endswith("%"):
        return SquarePatch(SquarePatch.published(size, image_size).height, place)
    if not re.fullmatch(r"0*[1-9]\d{0,8}(x0*[1-9]\d{0,8})?", size):
        raise _misuse(
            "--patch", f"a size of at least 1 such as 5, 4x7 or 2.4%, or {_SHAPES}", patch
        )
    height, width = parse_pair("--patch", size)
    return SquarePatch(height, place) if height == width else RectanglePatch(height, width, place)


_SHAPES = (
    "line:12x2@30, square:5@45, rectangle:12x2@45, diamond:7, parallelogram:4x6@20 or "
    "stencil:FILE, or bounds: and one of these, or any:10, aspect:25@2.7:1, transformed:5 or "
    "sparse:4"
)


def _parse_shape(text: str, patch: str, place: Place) -> StencilPatch:
    """Return a shape that is drawn, such as ``square:5@45``, or read from a picture."""
    from patchproof.threat import StencilPatch

    kind, _, rest = text.partition(":")
    kind = kind.strip().lower()
    if kind == "stencil":
        return StencilPatch(_read_stencil(Path(rest.strip())), locations=place)
    if kind in ("line", "square", "rectangle", "diamond", "parallelogram"):
        lengths, at, angle = rest.lower().partition("@")
        numbers = [_number(length, patch) for length in lengths.split("x")]
        degrees = _number(angle, patch) if at else 0.0
        match kind, numbers:
            case "line", [length]:
                return StencilPatch.line(length, degrees=degrees).at(place)
            case "line", [length, thickness]:
                return StencilPatch.line(length, thickness, degrees).at(place)
            case "square", [side]:
                return StencilPatch.square(side, degrees).at(place)
            case "rectangle", [height, width]:
                return StencilPatch.rectangle(height, width, degrees).at(place)
            case "diamond", [diagonal] if not at:
                return StencilPatch.diamond(diagonal).at(place)
            case "parallelogram", [height, width]:
                return StencilPatch.parallelogram(height, width, degrees).at(place)
    raise _misuse(
        "--patch",
        _SHAPES,
        patch,
    )


def _number(text: str, patch: str) -> float:
    if re.fullmatch(rf"-?{_DECIMAL}", text.strip()) is None:
        raise _misuse("--patch", "numbers such as line:12x2@30", patch)
    return float(text)


def _read_stencil(path: Path) -> Tensor:
    """Return the pixels of an 8-bit picture that are neither black nor transparent, (h, w) bool."""
    import numpy as np
    import torch
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise ValueError(f"a picture of mode {picture.mode}")
            pixels = np.array(picture.convert("RGBA"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _misuse(
            "--patch", "stencil:FILE with a grey or colour picture", f"{path}: {error}"
        ) from error
    return torch.from_numpy((pixels[..., :3] > 0).any(2) & (pixels[..., 3] > 0))


def _parse_locations(text: str) -> Place:
    from patchproof.threat import Box

    if text == "anywhere":
        return "anywhere"
    if text == "corners":
        return "corners"
    numbers = re.fullmatch(r"(\d+),(\d+),(\d+),(\d+)", text.replace(" ", ""))
    if numbers is None:
        raise _misuse("--locations", "anywhere, corners or top,left,height,width", text)
    return Box(*(int(number) for number in numbers.groups()))


def _misuse(option: str, expected: str, got: str) -> Exception:
    from patchproof.errors import PatchproofError

    return PatchproofError(f"{option}: expected {expected}, got {got!r}")
