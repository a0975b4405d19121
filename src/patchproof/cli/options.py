"""Options that several commands share, and the values that they take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from patchproof.threat import Threat
    from patchproof.threat.patches import Locations as Place

_MODEL = "Model"
_THREAT = "Attacker"
_DEFENSE = "Defense (PatchCleanser)"
_MACHINE = "Machine"

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
        help="What to load the weights into: small-resnet, tiny-resnet, timm:NAME, "
        "torchvision:NAME or python:package.module:factory (installed, or on PYTHONPATH). Its "
        "resize and normalisation are inside, so that the patch stays in the pixels of your "
        "images.",
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
        help="Use the published weights of a timm: or torchvision: model.",
        rich_help_panel=_MODEL,
    ),
]
Defense = Annotated[
    Path | None,
    typer.Option(
        help="Defense file, saved by `defense.save` in Python: model, masks and patch in one. "
        "Replaces the options for model, attacker and defense.",
        rich_help_panel=_MODEL,
    ),
]
Patch = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Patch in pixels of your images: 5 (a 5x5 square), 5x7 (height x width), or a share "
        "as papers name it, such as 2.4%.",
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
Inference = Annotated[
    Literal["double", "challenger"],
    typer.Option(
        help="double: double masking (the paper's Algorithm 1); challenger: fewer forward passes, "
        "slightly lower clean accuracy (Appendix C).",
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
        "because rounding may swap them. By default a measured bound.",
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

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_pair(option: str, text: str) -> tuple[int, int]:
    """Return ``6`` as (6, 6) and ``6x4`` as (6, 4); at least 1 each."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is not None:
        first = int(match[1])
        second = first if match[2] is None else int(match[2])
        if min(first, second) >= 1:
            return first, second
    raise _misuse(option, "a number such as 6, or two such as 6x4, from 1", text)


def parse_memory(text: str) -> int:
    """Return ``2GiB``, ``500 MB`` or a number as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is not None and match[2] in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2]])
        if size >= 1:
            return size
    raise _misuse("--memory", "a size such as 2GiB or 500MB", text)


def parse_threat(
    patch: str | None, covering: float | None, locations: str, image_size: tuple[int, int]
) -> Threat:
    """Return what the attacker may do on images of (height, width) pixels.

    Args:
        patch: ``5``, ``5x7`` or a published share such as ``2.4%``; or None.
        covering: a fraction of the image's pixels; or None.
        locations: ``anywhere``, ``corners`` or ``top,left,height,width``.
        image_size: (H, W) in pixels.

    Raises:
        PatchproofError: not exactly one of ``patch`` and ``covering``, a value that cannot be read,
            or a patch that does not fit.
    """
    from patchproof.threat import RectanglePatch, SquarePatch

    if (patch is None) == (covering is None):
        raise _misuse(
            "--patch or --covering", "exactly one of them", "none" if patch is None else "both"
        )
    if covering is not None:
        size = SquarePatch.covering(covering, image_size).extent()
    elif patch is not None and patch.strip().endswith("%"):
        size = SquarePatch.published(patch.strip(), image_size).extent()
    else:
        size = parse_pair("--patch", str(patch))
    place = _parse_locations(locations)
    threat = SquarePatch(size[0], place) if size[0] == size[1] else RectanglePatch(*size, place)
    threat.regions(image_size)
    return threat


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
    from patchproof.results import PatchproofError

    return PatchproofError(f"{option}: expected {expected}, got {got!r}")
