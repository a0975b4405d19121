"""``patchproof attack``: attack a defense on a data set, write a results folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from patchproof.cli import options as opt

if TYPE_CHECKING:
    from patchproof.attacks import PatchAttack
    from patchproof.datasets import ImageDataset
    from patchproof.evaluation.attack import AttackedDefense, Knowledge
    from patchproof.evaluation.store import Result
    from patchproof.evaluation.summary import AttackSummary
    from patchproof.models import ModelSpec

_ATTACK = "Attack"


def attack(
    out: Annotated[
        Path,
        typer.Option(
            help="Results folder. A run that was stopped goes on when the same command is given "
            "again."
        ),
    ],
    data: opt.Data = "digits",
    root: opt.Root = None,
    download: opt.Download = False,
    split: opt.Split = "test",
    count: opt.Count = None,
    seed: opt.Seed = 0,
    indices: opt.Indices = None,
    image_size: opt.ImageSize = None,
    weights: opt.Weights = None,
    model: opt.Model = None,
    classes: opt.Classes = None,
    model_option: opt.ModelOption = None,
    pretrained: opt.Pretrained = False,
    defense: opt.Defense = "patchcleanser",
    patch: opt.Patch = None,
    covering: opt.Covering = None,
    locations: opt.Locations = "anywhere",
    masks: opt.Masks = "6",
    multiplicity: opt.Multiplicity = "1",
    layout: opt.Layout = "paper",
    shapes: opt.Shapes = None,
    inference: opt.Inference = "double",
    tau: opt.Tau = None,
    defense_option: opt.DefenseOption = None,
    fill: opt.Fill = None,
    tolerance: opt.Tolerance = None,
    method: Annotated[
        str,
        typer.Option(
            "--attack",
            metavar="NAME",
            help="pgd (projected gradient ascent on the patch's pixels), ifgsm (from the image, "
            "with momentum), lavan (gradient steps that are not signs), square (random search, no "
            "gradients) or universal (one picture for all images, see --patch-image).",
            rich_help_panel=_ATTACK,
        ),
    ] = "pgd",
    attack_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=JSON",
            help="An option of the attack, such as steps=100, step_size=0.05, schedule=linear, "
            'momentum=0.9, start=black-white, loss=cross-entropy or aims=["majority"]. May be '
            "given several times; another name lists those that the attack takes.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    places: Annotated[
        Literal["gradient", "trial", "open", "random", "strided", "corners", "all"],
        typer.Option(
            help="Where the patch is tried: gradient: where the gradients are largest; trial: "
            "where black, white and random contents do most harm; open: the same, but first where "
            "there is no certificate; random; strided: every other "
            "pixel; corners: the four corners; all.",
            rich_help_panel=_ATTACK,
        ),
    ] = "gradient",
    place_count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Places to try for an image; by default 4, and all there are of strided, corners "
            "and all.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    stride: Annotated[
        int,
        typer.Option(
            min=1,
            help="Pixels between the places of strided, trial and open.",
            rich_help_panel=_ATTACK,
        ),
    ] = 2,
    restarts: Annotated[
        int,
        typer.Option(min=1, help="Tries at each place with each aim.", rich_help_panel=_ATTACK),
    ] = 1,
    knowledge: Annotated[
        Literal["defense", "model"],
        typer.Option(
            help="What the attacker knows: the defense (an adaptive attack), or the undefended "
            "model alone.",
            rich_help_panel=_ATTACK,
        ),
    ] = "defense",
    target: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The class that the attacker wants, by its number; by default any wrong one.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    patch_image: Annotated[
        Path | None,
        typer.Option(
            help="universal: the patch, a PNG file of `patchproof universal-patch`.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Results folder of `patchproof certify` on the same: compare at once, and fail if "
            "a certified image is broken.",
            rich_help_panel=_ATTACK,
        ),
    ] = None,
    gallery: Annotated[
        int, typer.Option(min=0, help="Attacked images to keep for the report; 0 for none.")
    ] = 12,
    note: Annotated[
        str, typer.Option(help="A remark for the report, such as how the data were made.")
    ] = "",
    batch_size: opt.BatchSize = None,
    memory: opt.Memory = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
) -> None:
    """Attack a defense: how many images stay right under the patches that were tried.

    The share of images that stay right is an upper bound of what any certificate may claim. With
    the same options, `patchproof certify` gives the lower bound, and `patchproof report` joins
    both, image by image.

    Needs a classifier and an attacker, as certify does; --defense undefended attacks the classifier
    itself. Ctrl-C keeps what is finished.
    """
    from patchproof.cli.building import (
        choose_slice,
        chosen_options,
        defend,
        use_threads,
    )
    from patchproof.datasets import load_dataset
    from patchproof.evaluation import read_result
    from patchproof.evaluation.sandwich import check_sandwich

    options = chosen_options(locals())
    use_threads(threads)
    chosen = _build_attack(
        method,
        opt.parse_attack_options(attack_option),
        {"search": places, "count": place_count, "stride": stride},
        restarts,
        patch_image,
    )
    certified = None if against is None else read_result(against)
    size = None if image_size is None else opt.parse_pair("--image-size", image_size)
    dataset = load_dataset(data, split, root=root, image_size=size, download=download)
    dataset = choose_slice(dataset, count, seed, indices)
    attacked, classifier = defend(
        *options,
        dataset.image_size,
        dataset.channels,
        len(dataset.class_names),
    )
    about = {
        "command": ["patchproof", *sys.argv[1:]],
        "seed": seed,
        "dataset_note": note,
        "model_card": dict(classifier.card),
    }
    _attack_and_show(
        attacked,
        dataset,
        chosen,
        out,
        knowledge=knowledge,
        target=target,
        gallery=gallery,
        against=certified,
        spec=classifier.spec,
        about=about,
    )
    if certified is not None:
        both = check_sandwich(certified, read_result(out))
        typer.echo(
            f"{both.count} images: certified {both.certified}, not broken {both.empirical}, "
            f"of neither {both.gap}; certified and broken: 0"
        )
    both_folders = out if against is None else f"{against} {out}"
    typer.echo(f"Make a report: patchproof report {both_folders} --out {out / 'report.html'}")


def _build_attack(
    method: str,
    options: Mapping[str, Any],
    places: Mapping[str, Any],
    restarts: int,
    patch_image: Path | None,
) -> PatchAttack:
    """Return the attack that the options describe.

    Raises:
        PatchproofError: no such attack, an option that it does not have, or a value out of range.
    """
    from dataclasses import fields

    from patchproof.attacks import (
        LaVAN,
        PatchIFGSM,
        PatchPGD,
        PlaceSearch,
        PrintablePatch,
        SquareSearch,
        UniversalAttack,
    )
    from patchproof.errors import PatchproofError

    known: dict[str, type[PatchAttack]] = {
        kind.name: kind for kind in (PatchPGD, PatchIFGSM, LaVAN, SquareSearch, UniversalAttack)
    }
    if method not in known:
        raise PatchproofError(f"--attack: expected {' or '.join(known)}, got {method!r}")
    kind = known[method]
    values: dict[str, Any] = {**options, "places": PlaceSearch(**places), "restarts": restarts}
    takes = {entry.name for entry in fields(kind)} - {"places", "restarts", "patch"}
    for name in options:
        if name not in takes:
            raise PatchproofError(
                f"--attack-option: expected {' or '.join(sorted(takes))} for {method}, got {name!r}"
            )
    if "aims" in options:
        aims = options["aims"]
        values["aims"] = tuple(aims) if isinstance(aims, list) else (aims,)
    if (kind is UniversalAttack) != (patch_image is not None):
        raise PatchproofError(
            "--patch-image: expected with --attack universal, and with it only, got "
            + ("none" if patch_image is None else method)
        )
    if patch_image is not None:
        values["patch"] = PrintablePatch.load(patch_image)
    try:
        return kind(**values)
    except TypeError as error:
        raise PatchproofError(f"--attack-option: expected numbers or names, got {error}") from error


def _attack_and_show(
    defense: AttackedDefense,
    dataset: ImageDataset,
    attack: PatchAttack,
    out: Path,
    *,
    knowledge: Knowledge,
    target: int | None,
    gallery: int,
    against: Result | None,
    spec: ModelSpec | None,
    about: Mapping[str, Any],
) -> AttackSummary:
    """Attack a data set with a progress bar on stderr, and print the figures."""
    from patchproof.cli.running import RunBar
    from patchproof.evaluation.attack import AttackProgress, attack_dataset

    with RunBar("attacking", len(dataset), out) as bar:

        def show(progress: AttackProgress) -> None:
            state = (
                f"{progress.under_attack} under attack, {progress.broken} of {progress.right} "
                "broken"
            )
            bar.show(progress.done, progress.images_per_second, progress.seconds_left, state)

        summary = attack_dataset(
            defense,
            dataset,
            attack,
            out,
            knowledge=knowledge,
            target=target,
            gallery=gallery,
            against=against,
            spec=spec,
            about=about,
            progress=show,
        )
    _print(summary, defense, attack)
    return summary


def _print(summary: AttackSummary, defense: AttackedDefense, attack: PatchAttack) -> None:
    from rich.console import Console
    from rich.table import Table

    from patchproof.cli.running import per_second

    title = (
        f"{summary.count} images, {attack.name} within {defense.threat.describe()}; "
        f"{defense.describe()}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("95% interval", justify="right")
    shares = {
        "undefended, clean image": summary.vanilla_accuracy,
        "defended, clean image": summary.clean_accuracy,
        "empirical: not broken by this attack": summary.robust_accuracy,
        "got the target's label": summary.hit_target,
    }
    for name, share in shares.items():
        if share is not None:
            table.add_row(name, f"{share.value:.1%}", f"{share.low:.1%} to {share.high:.1%}")
    tries = "" if summary.tries_per_image is None else f"{summary.tries_per_image:.1f} tries and "
    table.caption = (
        f"{tries}{summary.forwards_per_image:.0f} surrogate images per image, "
        f"{per_second(summary.images_per_second)} images/s"
        + (f"; {summary.corrupt} corrupt, left out" if summary.corrupt else "")
    )
    table.caption_justify = "left"
    Console().print(table)
