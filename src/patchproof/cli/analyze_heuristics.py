"""``patchproof analyze heuristics``: the best settings of a defense without a certificate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from patchproof.cli import options as opt
from patchproof.cli.bench import Bench, bench_options, check_out, made_now, make_command, open_bench
from patchproof.cli.bench import show as show_table
from patchproof.cli.heuristic_defenses import HEURISTIC_DEFENSES, WATERMARKING, read_setting
from patchproof.errors import PatchproofError

if TYPE_CHECKING:
    from torch import Tensor

    from patchproof.datasets import ImageDataset
    from patchproof.defenses import Undefended

_SETUPS = "Setups"
_EXAMPLE = (
    "patchproof analyze heuristics --data data/mnist --split validation --weights "
    "zoo/mnist-cutout.safetensors --count 200 --patch 5 --defense local-gradient-smoothing "
    "--grid smoothing=0.5,1,2.3 --out runs/mnist"
)


def heuristics(
    bench: Bench,
    defense: Annotated[
        Literal["local-gradient-smoothing", "digital-watermarking"],
        typer.Option(help="Whose settings are tried.", rich_help_panel=_SETUPS),
    ],
    patch: opt.Patch = None,
    covering: opt.Covering = None,
    locations: opt.Locations = "anywhere",
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBERS",
            help="Values of a setting that are tried, with all values of the others: "
            "smoothing=0.5,1,2.3. May be given several times; settings that are not given take a "
            "few values of their own.",
            rich_help_panel=_SETUPS,
        ),
    ] = None,
    most_lost: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="The most clean accuracy, from 0 to 1, that the best settings may lose of that "
            "of the undefended network.",
            rich_help_panel=_SETUPS,
        ),
    ] = 1.0,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of the attack.", rich_help_panel=_SETUPS)
    ] = 50,
    place_count: Annotated[
        int, typer.Option(min=1, help="Places tried for an image.", rich_help_panel=_SETUPS)
    ] = 4,
) -> None:
    """The best settings of a defense without a certificate, against who does not know of it.

    The undefended network is attacked by patch IFGSM (IBP, Section 5.1), then each of the settings
    is tried on what came of it. This tells nothing of an attacker who knows of the defense: see
    patchproof attack. Choose on --split validation, measure on test.
    """
    from rich.console import Console

    from patchproof import defenses
    from patchproof.attacks import PatchIFGSM, PlaceSearch
    from patchproof.evaluation.heuristic_search import (
        AttackedImages,
        all_settings,
        possible_defenses,
        search_settings,
    )
    from patchproof.evaluation.provenance import check_fit, identity
    from patchproof.report.analysis import AnalysisFolder

    threat = opt.parse_threat(patch, covering, locations, bench.image_size)
    undefended = defenses.Undefended(
        bench.classifier.model, threat, image_size=bench.image_size, batch_size=bench.batch_size
    )
    check_fit(undefended, bench.dataset)
    attack = PatchIFGSM(steps=steps, places=PlaceSearch("gradient", place_count), seed=bench.seed)
    shared: dict[str, Any] = {"batch_size": bench.batch_size}
    if defense == WATERMARKING:
        shared["fill"] = bench.fill
    tried = possible_defenses(
        getattr(defenses, HEURISTIC_DEFENSES[defense].type),
        undefended,
        all_settings({**_default_grid(defense, undefended), **parse_grid(defense, grid)}),
        **shared,
    )
    parameters = {
        "defense": defense,
        "settings": [one.settings() for one in tried],
        "most_lost": most_lost,
        "attack": attack.to_dict(),
    }
    check_out(bench.out)
    folder = AnalysisFolder(
        bench.out / (bench.name or "heuristics"),
        {"analysis": "heuristics", "parameters": parameters}
        | identity(undefended, bench.dataset, bench.classifier.spec),
    )
    folder.check()
    images, labels, indices = _read(bench.dataset)
    with Console(stderr=True).status("") as status:

        def tell(left: int) -> None:
            status.update(f"attacking the undefended network: {left} images left")

        attacked = AttackedImages.of(undefended, attack, images, labels, indices, tell)
        status.update(f"trying {len(tried)} settings")
        table = search_settings(undefended, tried, attacked, most_lost)
    about = made_now() | {
        "seed": bench.seed,
        "corrupt_images": len(bench.dataset) - len(labels),
        "model_card": dict(bench.classifier.card),
    }
    folder.write({"heuristics": table}, {}, about)
    varied = [name for name in HEURISTIC_DEFENSES[defense].options if table[name].nunique() > 1]
    show_table(
        f"{defense} on {len(labels):,} images of {bench.dataset.name}; undefended "
        f"{table['vanilla'][0]:.1%} clean, {table['vanilla_attacked'][0]:.1%} attacked",
        table,
        (*varied, "clean", "attacked", "best"),
    )
    if about["corrupt_images"]:
        typer.echo(f"{about['corrupt_images']:,} images are corrupt and left out")
    if not table["best"].any():
        typer.echo(f"All settings lose more than {most_lost:.1%} of clean accuracy")
    typer.echo(f"Table: {folder.path}")


def add_to(app: typer.Typer, panel: str) -> None:
    """Add the analysis to ``patchproof analyze``."""
    shared = {name: option for name, option in bench_options().items() if name != "tolerance"}
    command = make_command(heuristics, open_bench, shared)
    app.command("heuristics", epilog=f"Example: {_EXAMPLE}", rich_help_panel=panel)(command)


def parse_grid(defense: str, texts: Sequence[str] | None) -> dict[str, list[int | float]]:
    """Return the values of ``--grid`` by the names of the settings.

    Raises:
        PatchproofError: a setting that the defense does not have or that comes twice, or values
            that cannot be read.
    """
    known = HEURISTIC_DEFENSES[defense].options
    grid: dict[str, list[int | float]] = {}
    for text in texts or []:
        name, _, values = text.partition("=")
        if name not in known or name in grid:
            raise PatchproofError(
                f"--grid: expected each of {', '.join(known)} once at most for {defense}, "
                f"got {text!r}"
            )
        try:
            numbers = json.loads(f"[{values}]")
        except json.JSONDecodeError:
            numbers = []
        if not numbers:
            raise PatchproofError(f"--grid: expected numbers such as {name}=1,2, got {text!r}")
        grid[name] = [read_setting(f"--grid {name}", name, number) for number in numbers]
    return grid


def _default_grid(defense: str, undefended: Undefended) -> Mapping[str, Sequence[int | float]]:
    """Return a few values of each setting, in pixels of the images."""
    from patchproof.defenses import DigitalWatermarking

    smallest = min(undefended.image_size)
    if defense == WATERMARKING:
        side = DigitalWatermarking(
            undefended.model, undefended.threat, image_size=undefended.image_size
        ).window
        sides = [size for size in (side, side + 2, 2 * side) if size <= smallest]
        return {"window": sides, "threshold": [0.1, 0.3, 0.5], "opening": [1, 2, 3]}
    return {
        "window": [size for size in (5, 15) if size <= smallest],
        "overlap": [2],
        "threshold": [0.1, 0.2, 0.3],
        "smoothing": [0.5, 1.0, 1.5, 2.3],
    }


def _read(dataset: ImageDataset) -> tuple[Tensor, Tensor, Tensor]:
    """Return the images that can be read, (N, C, H, W), their labels and their indices, (N,)."""
    import torch

    from patchproof.datasets import CorruptImageError
    from patchproof.errors import RunError

    read = {}
    for position in range(len(dataset)):
        try:
            read[position] = dataset.image(position)
        except CorruptImageError:
            continue
    if not read:
        raise RunError(f"{dataset.name}: expected images that can be read, got none")
    positions = list(read)
    return torch.stack(list(read.values())), dataset.labels[positions], dataset.indices[positions]
