"""``patchproof train``: make a classifier that is right under any two masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from patchproof.cli import options as opt

if TYPE_CHECKING:
    from patchproof.datasets import ImageDataset

_TRAINING = "Training"


def train(
    data: Annotated[
        str,
        typer.Option(
            help="digits (embedded), mnist, cifar10, imagenette, imagenet (under --root), or a "
            "folder of Parquet files or of images. Without a validation split, 10% of the "
            "training images, at most 5,000, are held out for it."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the result, model.safetensors. The same command goes on where it "
            "was stopped."
        ),
    ],
    recipe: Annotated[
        Literal["cutout", "plain"],
        typer.Option(help="cutout: two random squares on every image; plain: none."),
    ] = "cutout",
    root: Annotated[
        Path | None, typer.Option(help="Folder of torchvision's data sets, such as mnist.")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the data set if it is not under --root.")
    ] = False,
    image_size: opt.ImageSize = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="small-resnet (for about 28 to 32 pixels), tiny-resnet (for 8x8), timm:NAME, "
            "torchvision:NAME or python:package.module:factory. By default one of the first two.",
            rich_help_panel="Model",
        ),
    ] = None,
    model_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=JSON",
            help="An option of the model, such as widths=[16,32,64] or stem_stride=2 of "
            "small-resnet (a network for MNIST). May be given several times.",
            rich_help_panel="Model",
        ),
    ] = None,
    pretrained: opt.Pretrained = False,
    squares: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="SMALLEST LARGEST",
            help="Sides of the squares in pixels; by default 20% to 40% of the image's shorter "
            "side. Choose them around the size of the defense's masks.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    fill: Annotated[
        float,
        typer.Option(
            help="Grey level of the squares, from 0 to 1; the defense must use the same.",
            rich_help_panel=_TRAINING,
        ),
    ] = 0.5,
    epochs: Annotated[
        int, typer.Option(help="Passes over the training images.", rich_help_panel=_TRAINING)
    ] = 20,
    batch_size: Annotated[
        int, typer.Option(help="Images in a step.", rich_help_panel=_TRAINING)
    ] = 256,
    lr: Annotated[
        float, typer.Option(help="Highest learning rate.", rich_help_panel=_TRAINING)
    ] = 0.4,
    shift: Annotated[
        int,
        typer.Option(
            help="Shift the images by up to this many pixels; 0 for none.",
            rich_help_panel=_TRAINING,
        ),
    ] = 2,
    flip: Annotated[
        bool | None,
        typer.Option(
            help="Flip half of the images left to right; by default if they have colours.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            help="Of the initial weights and of everything random.", rich_help_panel=_TRAINING
        ),
    ] = 0,
    count: Annotated[
        int | None,
        typer.Option(
            help="Train on this many images, drawn with --seed; by default all.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    precision: Annotated[
        Literal["32-true", "bf16-mixed", "16-mixed"],
        typer.Option(
            help="bf16-mixed is quicker where the processor or GPU computes in bfloat16.",
            rich_help_panel="Machine",
        ),
    ] = "bf16-mixed",
    device: opt.Device = "auto",
    threads: opt.Threads = None,
) -> None:
    """Train a classifier to be right under any two masks, as PatchCleanser needs it.

    The epoch is chosen on validation images under two random squares, never on test images.
    Ctrl-C keeps what the last whole epoch gave.
    """
    from patchproof.cli.building import use_threads
    from patchproof.datasets import load_dataset
    from patchproof.models import ModelSpec
    from patchproof.training import CutoutRecipe, train_cutout

    use_threads(threads)
    size = None if image_size is None else opt.parse_pair("--image-size", image_size)
    training, validation = (
        load_dataset(data, split, root=root, image_size=size, download=download)
        for split in ("train", "validation")
    )
    if count is not None:
        training = training.sample(count, seed)
    settings = CutoutRecipe(
        square_sizes=(squares or default_squares(training)) if recipe == "cutout" else None,
        fill=fill,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        shift=shift,
        flip=training.channels == 3 if flip is None else flip,
        seed=seed,
        precision=precision,
    )
    spec = ModelSpec(
        model or ("small-resnet" if min(training.image_size) >= 24 else "tiny-resnet"),
        len(training.class_names),
        training.channels,
        training.image_size,
        dict(parse_model_option(text) for text in model_option or []),
    )
    try:
        best = train_cutout(
            settings, spec, training, validation, out, device=device, pretrained=pretrained
        )
    except KeyboardInterrupt as interrupt:
        typer.echo(f"patchproof: stopped; the same command goes on from {out}", err=True)
        raise typer.Exit(130) from interrupt
    masked = best["masked_accuracy"]
    typer.echo(
        f"{out / 'model.safetensors'}: epoch {best['epoch']}, validation accuracy "
        f"{best['clean_accuracy']:.2%}"
        + ("" if masked is None else f", under two random squares {masked:.2%}")
    )


def default_squares(dataset: ImageDataset) -> tuple[int, int]:
    """Return 20% to 40% of the shorter side, in whole pixels: 7 to 12 at 32x32."""
    side = min(dataset.image_size)
    return -(-side // 5), 2 * side // 5


def parse_model_option(text: str) -> tuple[str, Any]:
    """Return ``widths=[16,32]`` as ("widths", [16, 32]); what is not JSON is a string.

    Raises:
        PatchproofError: no name or no ``=``.
    """
    from patchproof.results import PatchproofError

    name, equals, value = text.partition("=")
    if not name or not equals:
        raise PatchproofError(f"--model-option: expected NAME=JSON, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
