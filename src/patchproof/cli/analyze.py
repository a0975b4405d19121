"""``patchproof analyze``: the paper's analyses of one classifier, as tables and figures."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from patchproof.cli import analyze_crops, analyze_features, analyze_heuristics
from patchproof.cli import options as opt
from patchproof.cli.bench import Bench, Name, Out, check_out, made_now, on_bench, show

if TYPE_CHECKING:
    from patchproof.evaluation.analyses import Setup
    from patchproof.threat import Threat
    from patchproof.threat.masks import Layout

_SETUPS = "Setups"
_MASKS = "Masked images (PatchCleanser)"
_FEATURES = "Small parts of the image (PatchGuard)"
_CROPS = "Votes of crops (randomized cropping)"
_HEURISTICS = "Defenses without a certificate"
_LONGEST_RANGE = 1000
_SETUP = ("masks_per_side", "multiplicity", "layout")
"""The columns that say which row is which."""

MaskList = Annotated[
    str,
    typer.Option(
        metavar="COUNTS",
        help="Masks per side, one row of the table each: 2,3,4,6,8, a range such as 2-8, or down x "
        "across as in 6x4.",
        rich_help_panel=_SETUPS,
    ),
]
MultiplicityList = Annotated[
    str,
    typer.Option(
        metavar="COUNTS",
        help="Least numbers of masks per side that cover each place of the patch, such as 1,2; "
        "each with all --masks it is possible with.",
        rich_help_panel=_SETUPS,
    ),
]
LayoutList = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="paper, balanced or paper,balanced: the paper's masks, or as many as --masks allows, "
        "each as small as still covers.",
        rich_help_panel=_SETUPS,
    ),
]
Side = Annotated[
    int,
    typer.Option(
        min=1, metavar="PIXELS", help="Side of the actual square patch.", rich_help_panel=_SETUPS
    ),
]

app = typer.Typer(
    help="Analyse classifiers as the papers do: tables (CSV, Markdown) and figures (PNG, SVG).\n\n"
    "A classifier is asked once about every view of every image: the image with any two of the "
    "masks, or each small part of it. That is recorded in --out, and every analysis reads it "
    "there.",
)


@app.command(
    rich_help_panel=_MASKS,
    epilog="Example: patchproof analyze budget --data data/mnist --weights "
    "zoo/mnist-cutout.safetensors --count 500 --patch 5 --masks 2,3,4,6 --out runs/mnist",
)
@on_bench
def budget(
    bench: Bench,
    patch: opt.Patch = None,
    covering: opt.Covering = None,
    locations: opt.Locations = "anywhere",
    masks: MaskList = "2,3,4,6",
    multiplicity: MultiplicityList = "1",
    layout: LayoutList = "paper",
    shapes: opt.Shapes = None,
) -> None:
    """How many masks are worth their time: accuracies and forward passes (Figures 4 and 5).

    The table has a row for each set of masks and inference algorithm.
    A row is marked efficient if no other one certifies as many images in fewer forward passes.
    """
    from patchproof.evaluation import analyses
    from patchproof.report.figures import budget_figures

    threat = opt.parse_threat(patch, covering, locations, bench.image_size)
    setups = possible_setups(threat, bench.image_size, masks, multiplicity, layout, shapes)
    bench.run(
        "budget",
        {"threat": threat.to_dict(), "setups": [setup.describe() for setup in setups]},
        len(setups),
        lambda study: analyses.budget(study, threat, setups),
        budget_figures,
        (*_SETUP, "inference", "clean", "certified", "forwards"),
    )


@app.command(
    rich_help_panel=_MASKS,
    epilog="Example: patchproof analyze inference --data data/mnist --weights "
    "zoo/mnist-cutout.safetensors --count 500 --patch 5 --masks 2,3,4,6 --out runs/mnist",
)
@on_bench
def inference(
    bench: Bench,
    patch: opt.Patch = None,
    covering: opt.Covering = None,
    locations: opt.Locations = "anywhere",
    masks: MaskList = "2,3,4,6",
    multiplicity: MultiplicityList = "1",
    layout: LayoutList = "paper",
    shapes: opt.Shapes = None,
) -> None:
    """The challenger game against double masking (Figure 10).

    For each set of masks: the accuracies and forward passes of both, and how often they agree.
    """
    from patchproof.evaluation import analyses
    from patchproof.report.figures import inference_figures

    threat = opt.parse_threat(patch, covering, locations, bench.image_size)
    setups = possible_setups(threat, bench.image_size, masks, multiplicity, layout, shapes)
    shown = ("inference", "clean", "certified", "agreement", "forwards", "forwards_most")
    bench.run(
        "inference",
        {"threat": threat.to_dict(), "setups": [setup.describe() for setup in setups]},
        len(setups),
        lambda study: analyses.inference(study, threat, setups),
        inference_figures,
        (*_SETUP, *shown),
    )


@app.command(
    rich_help_panel=_MASKS,
    epilog="Example: patchproof analyze sizes --data data/mnist --weights "
    "zoo/mnist-cutout.safetensors --count 500 --patches 2-20 --masks 4 --out runs/mnist",
)
@on_bench
def sizes(
    bench: Bench,
    patches: Annotated[
        str,
        typer.Option(
            metavar="PIXELS",
            help="Sides of the square patches, one row of the table each: 2,5,8, or a range such "
            "as 2-20.",
            rich_help_panel=_SETUPS,
        ),
    ],
    masks: opt.Masks = "6",
    multiplicity: opt.Multiplicity = "1",
    layout: opt.Layout = "paper",
    inference: opt.Inference = "double",
) -> None:
    """How far the defense goes as the patch grows, up to most of the image (Figures 7 and 8).

    The number of masks stays; they grow with the patch.
    """
    from patchproof.evaluation import analyses
    from patchproof.report.figures import sizes_figures
    from patchproof.threat import SquarePatch

    sides = parse_list("--patches", patches)
    setup = _one_setup(masks, multiplicity, layout)
    for side in sides:
        setup.mask_set(SquarePatch(side), bench.image_size)
    bench.run(
        "sizes",
        {"patches": sides, "setup": setup.describe(), "inference": inference},
        len(sides),
        lambda study: analyses.sizes(study, sides, setup, inference),
        lambda table: sizes_figures(table, bench.image_size),
        ("patch", "patch_share", "masks", "vanilla", "clean", "certified", "forwards"),
    )


@app.command(
    rich_help_panel=_MASKS,
    epilog="Example: patchproof analyze overestimate --data data/mnist --weights "
    "zoo/mnist-cutout.safetensors --count 500 --patch 5 --estimates 5,6,8,10 --masks 4 "
    "--out runs/mnist",
)
@on_bench
def overestimate(
    bench: Bench,
    patch: Side,
    estimates: Annotated[
        str,
        typer.Option(
            metavar="PIXELS",
            help="Sides that the masks are made for, none smaller than --patch: 5,6,8,10.",
            rich_help_panel=_SETUPS,
        ),
    ],
    masks: opt.Masks = "6",
    multiplicity: opt.Multiplicity = "1",
    layout: opt.Layout = "paper",
    inference: opt.Inference = "double",
) -> None:
    """What it costs to take the patch for larger than it is (Figure 6).

    The masks are made for the estimate. Certified is against the actual patch.
    Beside it: certified against a patch as large as estimated.
    """
    from patchproof.evaluation import analyses
    from patchproof.report.figures import overestimate_figures
    from patchproof.threat import SquarePatch

    sides = parse_list("--estimates", estimates)
    analyses.check_estimates(patch, sides)
    setup = _one_setup(masks, multiplicity, layout)
    for side in sides:
        setup.mask_set(SquarePatch(side), bench.image_size)
    shown = ("estimate", "area_ratio", "masks", "clean", "certified", "certified_estimate")
    bench.run(
        "overestimate",
        {
            "patch": patch,
            "estimates": sides,
            "setup": setup.describe(),
            "inference": inference,
        },
        len(sides),
        lambda study: analyses.overestimate(study, patch, sides, setup, inference),
        overestimate_figures,
        (*shown, "forwards"),
    )


@app.command(
    rich_help_panel=_MASKS,
    epilog="Example: patchproof analyze objects runs/mnist-5x5 --boxes boxes.csv --out runs/mnist",
)
def objects(
    result: Annotated[
        Path, typer.Argument(metavar="RESULT", help="Results folder of `patchproof certify`.")
    ],
    out: Out,
    name: Name = None,
    boxes: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with columns index, top, left, height, width: the boxes of objects, in "
            "pixels of the images as they were certified. An image may have several rows.",
            rich_help_panel=_SETUPS,
        ),
    ] = None,
    bins: Annotated[
        int,
        typer.Option(
            min=1,
            help="Parts of equal width that the share of the object in the image is cut into.",
            rich_help_panel=_SETUPS,
        ),
    ] = 10,
) -> None:
    """Which images are certified: by object size (Figure 11) and by class (Figure 13).

    Reads a finished run of patchproof certify. Without --boxes, by class alone.
    The size of the objects in an image is the number of pixels in the union of its boxes.
    """
    from patchproof.errors import PatchproofError
    from patchproof.evaluation import analyses, read_result
    from patchproof.report.analysis import AnalysisFolder
    from patchproof.report.figures import class_figure, object_size_figure
    from patchproof.report.runs import Run

    run = Run(read_result(result))
    if not run.result.finished:
        raise PatchproofError(f"{result}: expected a finished run, got one that is not; certify on")
    pixels = None
    if boxes is not None:
        pixels = analyses.object_pixels(analyses.read_boxes(boxes, run.image_size), run.image_size)
    examples = run.result.examples
    identity = {
        "analysis": "objects",
        "run": run.identity,
        "boxes": None if boxes is None else hashlib.sha256(boxes.read_bytes()).hexdigest(),
        "bins": bins,
    }
    check_out(out)
    folder = AnalysisFolder(out / (name or "objects"), identity)
    folder.check()
    read = examples[examples["status"] == "ok"]
    tables, figures = {}, {}
    about = made_now() | {"run": str(result), "certified": run.about}
    if pixels is not None:
        by_size = analyses.by_object_size(read, pixels, run.image_size, bins)
        tables["sizes"], figures["sizes"] = by_size, object_size_figure(by_size)
        about["images_without_boxes"] = len(read) - int(by_size["count"].sum())
    by_class = analyses.by_class(read, run.class_name, pixels, run.image_size)
    tables["classes"], figures["classes"] = by_class, class_figure(by_class)
    folder.write(tables, figures, about)
    for which, made in tables.items():
        show(f"{which} of {len(read):,} images", made, made.columns)
    if left_out := about.get("images_without_boxes"):
        typer.echo(f"{left_out:,} images have no box: they are in no row of the sizes")
    typer.echo(f"Tables and figures: {folder.path}")


analyze_features.add_to(app, _FEATURES)
analyze_crops.add_to(app, _CROPS)
analyze_heuristics.add_to(app, _HEURISTICS)


def _one_setup(masks: str, multiplicity: str, layout: Literal["paper", "balanced"]) -> Setup:
    from patchproof.evaluation.analyses import Setup

    sides = opt.parse_pair("--masks", masks)
    return Setup(sides, opt.parse_pair("--multiplicity", multiplicity), layout)


def possible_setups(
    threat: Threat,
    image_size: tuple[int, int],
    masks: str,
    multiplicity: str = "1",
    layout: str = "paper",
    shapes: int | None = None,
) -> list[Setup]:
    """Return the combinations of three lists of which there are masks against a threat.

    A multiplicity that is too high for some of the masks is left out with those, with a word.

    Raises:
        PatchproofError: lists that cannot be read, or a multiplicity, a layout or a patch that is
            impossible with all masks.
    """
    from patchproof.errors import PatchproofError
    from patchproof.evaluation.analyses import Setup

    setups: list[Setup] = []
    for which in parse_layouts(layout):
        for several in parse_pairs("--multiplicity", multiplicity):
            tried = [
                Setup(sides, several, which, shapes) for sides in parse_pairs("--masks", masks)
            ]
            refusals = {}
            for setup in tried:
                try:
                    setup.mask_set(threat, image_size)
                except PatchproofError as error:
                    refusals[setup] = error
            if refusals and (max(several) == 1 or len(refusals) == len(tried)):
                raise next(iter(refusals.values()))
            for setup, refusal in refusals.items():
                typer.echo(f"patchproof: left out {setup.describe()}: {refusal}", err=True)
            setups += [setup for setup in tried if setup not in refusals]
    return setups


def parse_list(option: str, text: str) -> list[int]:
    """Return ``2,5,8`` or ``2-8`` as whole numbers from 1, each once, in the order given.

    Raises:
        PatchproofError: something else.
    """
    numbers: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)(?:\s*-\s*([1-9]\d*))?\s*", word)
        if match is None:
            raise _misuse(option, "numbers from 1 such as 2,5,8 or 2-8", text)
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + _LONGEST_RANGE:
            raise _misuse(option, f"an ascending range of at most {_LONGEST_RANGE} numbers", word)
        numbers += range(first, last + 1)
    if len(set(numbers)) < len(numbers):
        raise _misuse(option, "each number once", text)
    return numbers


def parse_pairs(option: str, text: str) -> list[tuple[int, int]]:
    """Return ``2,6x4`` as [(2, 2), (6, 4)], each once, in the order given; ranges as in lists.

    Raises:
        PatchproofError: something else.
    """
    pairs: list[tuple[int, int]] = []
    for word in text.split(","):
        if "x" in word.lower():
            pairs.append(opt.parse_pair(option, word))
        else:
            pairs += [(number, number) for number in parse_list(option, word)]
    if len(set(pairs)) < len(pairs):
        raise _misuse(option, "each number once", text)
    return pairs


def parse_layouts(text: str) -> list[Layout]:
    """Return ``paper,balanced`` as names of layouts.

    Raises:
        PatchproofError: another name, or one twice.
    """
    from patchproof.threat.masks import Layout

    names = [word.strip() for word in text.split(",")]
    if not set(names) <= set(get_args(Layout)) or len(set(names)) < len(names):
        raise _misuse("--layout", "paper, balanced or paper,balanced", text)
    return cast("list[Layout]", names)


def _misuse(option: str, expected: str, got: str) -> Exception:
    from patchproof.errors import PatchproofError

    return PatchproofError(f"{option}: expected {expected}, got {got!r}")
