"""``patchproof certify``: certify a data set, write a results folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from patchproof.cli import options as opt


def certify(
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
    stop: opt.Stop = "first_lost_region",
    gallery: Annotated[
        int,
        typer.Option(
            min=0, help="Images to keep for the report with their vulnerability maps; 0 for none."
        ),
    ] = 9,
    note: Annotated[
        str, typer.Option(help="A remark for the report, such as how the data were made.")
    ] = "",
    batch_size: opt.BatchSize = None,
    memory: opt.Memory = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
) -> None:
    """Certify a data set: how many images keep their right label whatever a patch shows.

    With --defense minority-reports or patchguard++, how many keep it or raise an alert, which is
    another promise.

    Needs a classifier (--weights, or --model with --weights or --pretrained) and an attacker
    (--patch or --covering), or a saved --defense. Ctrl-C keeps what is finished.
    """
    from patchproof.cli.building import (
        certifying,
        choose_slice,
        chosen_options,
        defend,
        use_threads,
    )
    from patchproof.cli.running import certify_and_show
    from patchproof.datasets import load_dataset

    options = chosen_options(locals())
    use_threads(threads)
    size = None if image_size is None else opt.parse_pair("--image-size", image_size)
    dataset = load_dataset(data, split, root=root, image_size=size, download=download)
    dataset = choose_slice(dataset, count, seed, indices)
    defended, classifier = defend(
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
    certify_and_show(
        certifying(defended),
        dataset,
        out,
        stop=stop,
        gallery=gallery,
        spec=classifier.spec,
        about=about,
    )
    typer.echo(f"Make a report: patchproof report {out} --out {out / 'report.html'}")
