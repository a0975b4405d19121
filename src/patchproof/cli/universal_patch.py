"""``patchproof universal-patch``: train one patch for many images, to print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchproof.cli import options as opt


def universal_patch(
    out: Annotated[
        Path,
        typer.Option(
            help="The patch: a .png file, which `patchproof attack --attack universal` takes, or a "
            ".pdf file. With one of them the other is written beside it."
        ),
    ],
    patch: opt.Patch = None,
    covering: opt.Covering = None,
    target: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The class that the patch calls forth, by its number; by default any wrong one.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the training.")] = 300,
    images_per_step: Annotated[int, typer.Option(min=1, help="Images in each step.")] = 64,
    scale: Annotated[
        tuple[float, float],
        typer.Option(help="Smallest and largest factor of the patch's sides."),
    ] = (0.9, 1.1),
    degrees: Annotated[
        tuple[float, float], typer.Option(help="Smallest and largest turn of the patch.")
    ] = (-10.0, 10.0),
    variation: Annotated[
        float, typer.Option(min=0.0, help="Weight of the total variation: more is smoother.")
    ] = 0.0,
    width_cm: Annotated[
        float, typer.Option(min=0.1, max=10_000.0, help="Width of the print in centimetres.")
    ] = 10.0,
    data: opt.Data = "digits",
    root: opt.Root = None,
    download: opt.Download = False,
    split: Annotated[
        str, typer.Option(help="train, validation or test: not what the patch is tested on.")
    ] = "validation",
    count: opt.Count = None,
    seed: opt.Seed = 0,
    image_size: opt.ImageSize = None,
    weights: opt.Weights = None,
    model: opt.Model = None,
    classes: opt.Classes = None,
    model_option: opt.ModelOption = None,
    pretrained: opt.Pretrained = False,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
) -> None:
    """Train one patch that fools a classifier in many images, wherever it is seen (Brown 2017).

    The same seed makes the same patch. How many images it fools is for `patchproof attack --attack
    universal --patch-image FILE` to say, on images that it was not trained on.
    """
    from rich.console import Console
    from rich.progress import Progress

    from patchproof.attacks import UniversalTraining, Victim, train_universal_patch
    from patchproof.cli.building import (
        ModelOptions,
        build_classifier,
        choose_slice,
        pick_device,
        use_threads,
    )
    from patchproof.datasets import load_dataset
    from patchproof.errors import PatchproofError

    use_threads(threads)
    if out.suffix.lower() not in (".png", ".pdf"):
        raise PatchproofError(f"--out: expected a .png or .pdf file, got {out}")
    size = None if image_size is None else opt.parse_pair("--image-size", image_size)
    dataset = load_dataset(data, split, root=root, image_size=size, download=download)
    dataset = choose_slice(dataset, count, seed, None)
    if not len(dataset):
        raise PatchproofError(f"expected images in {dataset.name} {dataset.split}, got none")
    classifier = build_classifier(
        ModelOptions(
            weights, model, classes, pretrained, device, opt.parse_model_options(model_option)
        ),
        dataset.image_size,
        dataset.channels,
        len(dataset.class_names),
    )
    threat = opt.parse_threat(patch, covering, "anywhere", dataset.image_size)
    settings = UniversalTraining(
        target=target,
        steps=steps,
        batch_size=images_per_step,
        scale=scale,
        degrees=degrees,
        variation=variation,
        seed=seed,
    )
    pixels, labels = dataset.tensors()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training the patch", total=steps)
        trained = train_universal_patch(
            Victim.of_model(classifier.model, pick_device(device)),
            pixels / 255,
            labels,
            threat=threat,
            settings=settings,
            progress=lambda step, _: bar.update(task, completed=step),
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    for path in (out.with_suffix(".png"), out.with_suffix(".pdf")):
        trained.save(path, width_cm=width_cm)
        typer.echo(f"Patch: {path}")
