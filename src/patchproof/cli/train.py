"""``patchproof train``: make a classifier that is right under any two masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from patchproof.cli import options as opt

if TYPE_CHECKING:
    from patchproof.datasets import ImageDataset
    from patchproof.models import ModelSpec

_TRAINING = "Training"


def train(
    data: Annotated[
        str,
        typer.Option(
            help="digits (embedded), mnist, cifar10, imagenette, imagenet (under --root), "
            "hf:NAME, or a folder of Parquet files or of images. Without a validation split, 10% "
            "of the training images, at most 5,000, are held out for it."
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
        Literal["cutout", "greedy-cutout", "plain"],
        typer.Option(
            help="cutout: two random squares on every image; greedy-cutout: the two masks of the "
            "defense (--patch, --masks) that hurt most, best with --start; plain: none."
        ),
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
            "torchvision:NAME, hf:NAME or python:package.module:factory. By default that of "
            "--start, else one of the first two.",
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
    start: Annotated[
        Path | None,
        typer.Option(
            help="Classifier file made by `patchproof train` whose weights to start from; the "
            "model is its model.",
            rich_help_panel="Model",
        ),
    ] = None,
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
    patch: opt.Patch = None,
    masks: opt.Masks = "6",
    candidates: Annotated[
        int | None,
        typer.Option(
            help="Masks that greedy-cutout tries on an image, for the first and again for the "
            "second, drawn at random; by default 8. Each costs a forward pass.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        int,
        typer.Option(
            help="Passes over the training images, or over --epoch-images.",
            rich_help_panel=_TRAINING,
        ),
    ] = 20,
    epoch_images: Annotated[
        int | None,
        typer.Option(
            help="Images of an epoch, drawn anew for each; by default all. After every epoch the "
            "network is validated and saved.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Images in a step.", rich_help_panel=_TRAINING)
    ] = 256,
    optimizer: Annotated[
        Literal["sgd", "adamw"],
        typer.Option(
            help="adamw suits transformers and networks of linear layers.",
            rich_help_panel=_TRAINING,
        ),
    ] = "sgd",
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate; by default 0.4, with adamw 0.001; a tenth of that with "
            "--start.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="Weight decay; by default 0.0005, with adamw 0.05.", rich_help_panel=_TRAINING
        ),
    ] = None,
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

    The epoch is chosen on validation images under two masks, never on test images.
    Ctrl-C keeps what the last whole epoch gave.
    """
    from patchproof.cli.building import use_threads
    from patchproof.datasets import load_dataset
    from patchproof.models import ModelSpec
    from patchproof.results import PatchproofError
    from patchproof.training import CutoutRecipe, GreedyMasks, train_cutout

    use_threads(threads)
    size = None if image_size is None else opt.parse_pair("--image-size", image_size)
    training, validation = (
        load_dataset(data, split, root=root, image_size=size, download=download)
        for split in ("train", "validation")
    )
    if count is not None:
        training = training.sample(count, seed)
    greedy = None
    if recipe == "greedy-cutout":
        if patch is None:
            raise PatchproofError("--patch: expected a size for --recipe greedy-cutout, got none")
        if squares is not None:
            raise PatchproofError("--squares: expected with --recipe cutout only")
        greedy = GreedyMasks(
            opt.parse_threat(patch, None, "anywhere", training.image_size),
            opt.parse_pair("--masks", masks),
            8 if candidates is None else candidates,
        )
    elif patch is not None or candidates is not None:
        raise PatchproofError(
            f"--patch and --candidates: expected with --recipe greedy-cutout only, got {recipe}"
        )
    default_lr, default_decay = (0.4, 5e-4) if optimizer == "sgd" else (0.001, 0.05)
    if start is not None:
        default_lr /= 10
    settings = CutoutRecipe(
        square_sizes=(squares or default_squares(training)) if recipe == "cutout" else None,
        fill=fill,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=default_lr if lr is None else lr,
        weight_decay=default_decay if weight_decay is None else weight_decay,
        shift=shift,
        flip=training.channels == 3 if flip is None else flip,
        seed=seed,
        precision=precision,
        greedy=greedy,
        optimizer=optimizer,
        epoch_images=epoch_images,
    )
    if start is not None and model is None:
        spec = spec_of(start)
    else:
        spec = ModelSpec(
            model or ("small-resnet" if min(training.image_size) >= 24 else "tiny-resnet"),
            len(training.class_names),
            training.channels,
            training.image_size,
            opt.parse_model_options(model_option),
        )
    try:
        best = train_cutout(
            settings,
            spec,
            training,
            validation,
            out,
            device=device,
            pretrained=pretrained,
            start=start,
        )
    except KeyboardInterrupt as interrupt:
        typer.echo(f"patchproof: stopped; the same command goes on from {out}", err=True)
        raise typer.Exit(130) from interrupt
    masked = best["masked_accuracy"]
    masks_in_words = "two random squares" if greedy is None else "the two masks that hurt most"
    typer.echo(
        f"{out / 'model.safetensors'}: epoch {best['epoch']}, validation accuracy "
        f"{best['clean_accuracy']:.2%}"
        + ("" if masked is None else f", under {masks_in_words} {masked:.2%}")
    )


def spec_of(start: Path) -> ModelSpec:
    """Return the model of a classifier file, from its card.

    Raises:
        PatchproofError: not a classifier file, or one whose model is code that --model must name.
    """
    from patchproof.models import ModelSpec, read_card
    from patchproof.results import PatchproofError

    spec = ModelSpec.from_dict(read_card(start)["model"])
    if spec.name.startswith("python:"):
        raise PatchproofError(
            f"--start: expected --model {spec.name} too, because the model of {start} is code"
        )
    return spec


def default_squares(dataset: ImageDataset) -> tuple[int, int]:
    """Return 20% to 40% of the shorter side, in whole pixels: 7 to 12 at 32x32."""
    side = min(dataset.image_size)
    return -(-side // 5), 2 * side // 5
