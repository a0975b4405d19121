"""``patchproof analyze``: the analyses of the randomized cropping paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from patchproof.cli import options as opt
from patchproof.cli.analyze_features import Locations, PatchList, parse_patches
from patchproof.cli.bench import make_command
from patchproof.cli.feature_bench import (
    ManyWeights,
    RecordedBench,
    open_classifiers,
    options_of,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from patchproof.cli.feature_bench import Tables
    from patchproof.defenses.randomized_cropping import Mode
    from patchproof.evaluation.crop_analyses import Draw, RecordedCrops
    from patchproof.threat import Threat
    from patchproof.views.crops import CropViews

_SETUPS = "Setups"
_MODES: tuple[Mode, ...] = ("all-crops", "fixed-crops", "random-crops")

CropOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Crops, 10 (10x10 pixels) or 12x8. By default what the classifier was made for.",
        rich_help_panel="Model",
    ),
]
Modes = Annotated[
    str,
    typer.Option(
        metavar="MODES",
        help="Which crops vote: some of all-crops, fixed-crops and random-crops.",
        rich_help_panel=_SETUPS,
    ),
]
Numbers = Annotated[
    str,
    typer.Option(metavar="NUMBERS", help="Crops of a draw, 64,128,256.", rich_help_panel=_SETUPS),
]
Replacement = Annotated[
    Literal["with", "without", "both"],
    typer.Option(help="Whether a draw may hold a place twice.", rich_help_panel=_SETUPS),
]
Probabilities = Annotated[
    str,
    typer.Option(
        metavar="SHARES",
        help="Probabilities with which a prediction from random crops is to be right, and from "
        "which the paper's condition is met: 0.95, or 0.93,0.99.",
        rich_help_panel=_SETUPS,
    ),
]
DrawSeed = Annotated[
    int, typer.Option("--draw-seed", min=0, help="Seed of the draws.", rich_help_panel=_SETUPS)
]


@dataclass(frozen=True, eq=False)
class CropBench(RecordedBench):
    """Classifiers of crops, with the crops at all places."""

    views: Mapping[str, CropViews]

    def run(
        self,
        analysis: str,
        parameters: Mapping[str, Any],
        table: Callable[[list[RecordedCrops]], pd.DataFrame],
        figures: Callable[[pd.DataFrame], Mapping[str, Figure]],
        shown: Sequence[str],
    ) -> None:
        """Record the votes of all crops, then write and show a table and its figures."""
        from patchproof.evaluation.crop_analyses import RecordedCrops

        def tables(record: Callable[[str], Any]) -> Tables:
            read = [
                RecordedCrops.read(
                    name,
                    one.model,
                    self.views[name],
                    record(name)(None),
                    self.image_size,
                    self.bench.tolerance,
                )
                for name, one in self.classifiers.items()
            ]
            return {analysis: table(read)}

        def drawn(made: Tables) -> Mapping[str, Figure]:
            return figures(made[analysis])

        self.record_and_write(analysis, parameters, tables, drawn, {analysis: shown})

    def check(self, threats: Sequence[Threat], draws: Sequence[Draw]) -> None:
        """Raise ``PatchproofError`` for what no defense can be made of, before anything runs."""
        import torch

        from patchproof.defenses import RandomizedCropping
        from patchproof.defenses.inference import model_device
        from patchproof.views.crops import check_local

        image = torch.zeros(1, self.bench.dataset.channels, *self.image_size)
        for name, views in self.views.items():
            model = self.classifiers[name].model
            check_local(model, views.places, image.to(model_device(model)))
            for threat in threats:
                for draw in draws:
                    RandomizedCropping(
                        model,
                        threat,
                        image_size=self.image_size,
                        crop_size=views.places.crop_size,
                        **draw.settings(0),
                    )


def open_crop_bench(
    weights: ManyWeights = None, crop: CropOption = None, **shared: Any
) -> CropBench:
    """Load the images and the classifiers, and find out what their crops are.

    Raises:
        PatchproofError: two classifiers of the same name, or crops of no size or another.
    """
    from patchproof.errors import PatchproofError
    from patchproof.views.crops import CropViews

    bench, classifiers = open_classifiers(weights, **shared)
    views = {}
    for name, one in classifiers.items():
        made_for = getattr(one.model, "crop_size", None)
        size = made_for if crop is None else opt.parse_pair("--crop", crop)
        if size is None or made_for not in (None, size):
            expected = "the size of the crops" if made_for is None else str(made_for)
            raise PatchproofError(f"--crop: expected {expected} for {name}, got {crop or 'none'}")
        views[name] = CropViews(bench.image_size, size)
    return CropBench(bench, classifiers, views)


def crops(
    bench: CropBench,
    patches: PatchList,
    modes: Modes = "all-crops,fixed-crops,random-crops",
    numbers: Numbers = "128",
    replacement: Replacement = "with",
    probabilities: Probabilities = "0.95",
    locations: Locations = "anywhere",
    draw_seed: DrawSeed = 0,
) -> None:
    """What votes of crops certify, by patch, number, size and probability.

    Randomized cropping, Tables 2, 3 and 5, Figures 2 and 3. Give --weights once for each
    classifier, of crops of other sizes for example.
    """
    from patchproof.evaluation import crop_analyses as analyses

    threats = parse_patches(patches, locations, bench.image_size)
    draws = parse_draws(modes, numbers, replacement)
    shares = parse_shares(probabilities)
    bench.check(threats, draws)
    bench.run(
        "crops",
        {
            "patches": [threat.to_dict() for threat in threats],
            "draws": [[draw.mode, draw.crops, draw.replacement] for draw in draws],
            "probabilities": shares,
            "draw_seed": draw_seed,
        },
        lambda recorded: analyses.certified_accuracies(recorded, threats, draws, shares, draw_seed),
        _crop_figures,
        (
            *(("model", "crop") if len(bench.views) > 1 else ()),
            *("threat", "mode", "crops"),
            *(("replacement",) if replacement == "both" else ()),
            *("probability", "clean", "certified", "certified_with_probability", "paper"),
        ),
    )


def crop_draws(
    bench: CropBench,
    patches: PatchList,
    numbers: Numbers = "64,128,256,512",
    replacement: Replacement = "with",
    times: Annotated[
        int, typer.Option(min=2, help="Draws of each image.", rich_help_panel=_SETUPS)
    ] = 200,
    locations: Locations = "anywhere",
    draw_seed: DrawSeed = 0,
) -> None:
    """How much the paper's statistics vary from draw to draw (randomized cropping, Table 6)."""
    from patchproof.evaluation import crop_analyses as analyses

    threats = parse_patches(patches, locations, bench.image_size)
    if len(threats) > 1:
        raise _misuse("--patches", "one patch", patches)
    draws = parse_draws("random-crops", numbers, replacement)
    bench.check(threats, draws)
    bench.run(
        "crop-draws",
        {
            "patches": [threats[0].to_dict()],
            "draws": [[draw.crops, draw.replacement] for draw in draws],
            "times": times,
            "draw_seed": draw_seed,
        },
        lambda recorded: analyses.repeated_draws(recorded, threats[0], draws, times, draw_seed),
        lambda table: {},
        (
            *("model", "crop", "threat", "crops", "replacement"),
            *("turn_interval", "turn_variance", "chance_interval", "chance_variance"),
        ),
    )


def crops_needed(
    bench: CropBench,
    patches: PatchList,
    numbers: Numbers = "16,32,64,128,256,512",
    probabilities: Probabilities = "0.95",
    locations: Locations = "anywhere",
) -> None:
    """For how many images so many random crops are enough for a probability."""
    from patchproof.evaluation import crop_analyses as analyses
    from patchproof.report.crop_figures import needed_figure

    threats = parse_patches(patches, locations, bench.image_size)
    counts = sorted(parse_numbers(numbers))
    shares = parse_shares(probabilities)
    bench.check(threats, parse_draws("random-crops", numbers, "with"))
    bench.run(
        "crops-needed",
        {
            "patches": [threat.to_dict() for threat in threats],
            "numbers": counts,
            "probabilities": shares,
        },
        lambda recorded: analyses.crops_needed(recorded, threats, counts, shares),
        lambda table: {"crops-needed": needed_figure(table)} if len(bench.views) == 1 else {},
        ("model", "crop", "threat", "probability", "crops", "certified_with_probability"),
    )


_EXAMPLE = (
    "patchproof analyze {} --data cifar10 --weights crops.safetensors --patches {} --out runs"
)


def add_to(app: typer.Typer, panel: str) -> None:
    """Add the analyses to ``patchproof analyze``."""
    for name, analysis, patches in (
        ("crops", crops, "2,5 --numbers 128"),
        ("crop-draws", crop_draws, "5"),
        ("crops-needed", crops_needed, "2,5"),
    ):
        command = make_command(analysis, open_crop_bench, options_of(open_crop_bench))
        epilog = f"Example: {_EXAMPLE.format(name, patches)}"
        app.command(name, epilog=epilog, rich_help_panel=panel)(command)


def parse_draws(modes: str, numbers: str, replacement: str) -> list[Draw]:
    """Return which crops vote, for each mode, number and kind of draw.

    Raises:
        PatchproofError: another mode, or a number that cannot be read.
    """
    from patchproof.evaluation.crop_analyses import Draw

    names = [word.strip() for word in modes.split(",")]
    if not set(names) <= set(_MODES) or len(set(names)) < len(names):
        raise _misuse("--modes", f"some of {', '.join(_MODES)}, each once", modes)
    kinds = {"with": (True,), "without": (False,), "both": (True, False)}[replacement]
    draws = []
    for mode in _MODES:
        if mode in names and mode == "all-crops":
            draws.append(Draw(mode))
        elif mode in names:
            draws += [Draw(mode, n, kind) for kind in kinds for n in parse_numbers(numbers)]
    return draws


def parse_numbers(text: str) -> list[int]:
    """Return ``64,128`` as whole numbers from 1, each once.

    Raises:
        PatchproofError: something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) < 10**6 for word in words) or len(
        set(words)
    ) < len(words):
        raise _misuse("--numbers", "numbers of crops such as 64,128, each once", text)
    return [int(word) for word in words]


def parse_shares(text: str) -> list[float]:
    """Return ``0.95,0.99`` as numbers in (0, 1), each once.

    Raises:
        PatchproofError: something else.
    """
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 < share < 1 for share in shares) or len(set(shares)) < len(shares):
        raise _misuse("--probabilities", "numbers in (0, 1) such as 0.95,0.99, each once", text)
    return shares


def _crop_figures(table: pd.DataFrame) -> Mapping[str, Figure]:
    """Draw over what varies in a table, for the first of all that varies beside it."""
    from patchproof.report import crop_figures as figures

    first = table
    if table["probability"].notna().any():
        lowest = table["probability"].dropna().iloc[0]
        first = table[table["probability"].isna() | (table["probability"] == lowest)]
    numbers = first.loc[first["mode"] != "all-crops", "crops"]
    number = numbers.iloc[0] if len(numbers) else None
    one_model = first["model"] == first["model"].iloc[0]
    one_patch = first["threat"] == first["threat"].iloc[0]
    one_number = (first["mode"] == "all-crops") | (first["crops"] == number)
    one_kind = first["replacement"] == first.groupby("mode")["replacement"].transform("first")
    drawn = {}
    if not one_patch.all():
        drawn["patches"] = figures.over_patches_figure(first[one_model & one_number])
    if not one_number.all():
        drawn["numbers"] = figures.over_numbers_figure(first[one_model & one_patch])
    if first["crop"].nunique() > 1:
        for mode in first["mode"].unique():
            rows = first[one_patch & one_number & one_kind & (first["mode"] == mode)]
            square = rows["crop"].map(lambda crop: len(set(crop.split("x"))) == 1).all()
            if square and not rows.duplicated(["crop", "positions"]).any():
                drawn[f"sizes-{mode}"] = figures.over_sizes_figure(rows)
    return drawn


def _misuse(option: str, expected: str, got: str) -> Exception:
    from patchproof.errors import PatchproofError

    return PatchproofError(f"{option}: expected {expected}, got {got!r}")
