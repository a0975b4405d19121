"""``patchproof train``: make a classifier for the views of a defense."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import typer

from patchproof.cli import options as opt

if TYPE_CHECKING:
    from patchproof.datasets import ImageDataset
    from patchproof.models import ModelSpec
    from patchproof.models.ablation import Ablation
    from patchproof.training import Recipe
    from patchproof.training.interval_bounds import Strategy

_TRAINING = "Training"
_BOUNDS = "Training of interval bounds"
_LOCAL = "Training of local features and ablations"

RecipeName = Literal[
    "cutout",
    "greedy-cutout",
    "plain",
    "ablation",
    "crops",
    "masked-evidence",
    "bagcert",
    "clipped",
    "median",
    "trimmed-mean",
    "top-masking",
    "interval-bounds",
]
_LOCAL_RECIPES = ("masked-evidence", "bagcert", "clipped", "median", "trimmed-mean", "top-masking")
_WINDOW_RECIPES = ("masked-evidence", "bagcert", "trimmed-mean", "top-masking")
_TAKEN_BY: dict[str, tuple[str, ...]] = {
    "--squares": ("cutout",),
    "--candidates": ("greedy-cutout",),
    "--fill": tuple(name for name in get_args(RecipeName) if name != "interval-bounds"),
    "--patch": ("greedy-cutout", "interval-bounds", *_WINDOW_RECIPES),
    "--masks": ("greedy-cutout",),
    "--window": _WINDOW_RECIPES,
    "--evidence-masks": ("masked-evidence",),
    "--margin": ("bagcert",),
    "--clean-share": _LOCAL_RECIPES,
    "--ablation": ("ablation",),
    "--bands": ("ablation",),
    "--crop": ("crops",),
    "--strategy": ("interval-bounds",),
    "--pool": ("interval-bounds",),
    "--clean-start": ("interval-bounds",),
    "--growth": ("interval-bounds",),
    "--full-rate": ("interval-bounds",),
}
"""The recipes that an option belongs to; all others refuse it."""


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
        RecipeName,
        typer.Option(
            help="cutout: two random squares on every image; greedy-cutout: the two masks of the "
            "defense (--patch, --masks) that hurt most, best with --start; plain: none. "
            "ablation: one random band or block of every image alone; crops: one random crop. For "
            "networks of local features: masked-evidence, without the label's best window; "
            "bagcert, votes that lead by a margin; clipped, median, trimmed-mean and top-masking, "
            "that statistic of them. "
            "interval-bounds: bounds of what any content of a patch (--patch) can do."
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
            help="small-resnet (for about 28 to 32 pixels), tiny-resnet (for 8x8), bagnet, "
            "band-resnet, ablation-resnet, crop-resnet9, ibp-mlp, ibp-conv2, ibp-conv4, "
            "ibp-conv5-wide, timm:NAME, torchvision:NAME, hf:NAME or "
            "python:package.module:factory. By default "
            "that of --start, else the one that suits the recipe and the size of the images.",
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
    ablation: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:PIXELS",
            help="What ablation keeps of an image: column:4, row:4 or block:8. By default what "
            "the network was made for.",
            rich_help_panel=_LOCAL,
        ),
    ] = None,
    bands: Annotated[
        int | None,
        typer.Option(
            help="How many bands or blocks ablation keeps; by default 1.",
            rich_help_panel=_LOCAL,
        ),
    ] = None,
    crop: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Crops for crops, 10 (10x10 pixels) or 12x8. By default what the network was "
            "made for.",
            rich_help_panel=_LOCAL,
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Instead of --patch: the features that a patch can corrupt, 6 (6x6) or 6x4 "
            "(rows x columns).",
            rich_help_panel=_LOCAL,
        ),
    ] = None,
    evidence_masks: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2,
            help="Windows that masked-evidence takes from the label: 1, by default, as the paper "
            "trains, or 2, as its certificate does; 2 needs --start from a good network.",
            rich_help_panel=_LOCAL,
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            help="Lead of the label that bagcert trains for, as a share of all votes; by default "
            "2k / V if a patch (--patch or --window) corrupts k of V local features.",
            rich_help_panel=_LOCAL,
        ),
    ] = None,
    clean_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the loss that is that of plain, for recipes of local features; by "
            "default 0.5, and 0 with --start.",
            rich_help_panel=_LOCAL,
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="all|random:N|guided:N",
            help="Which places of the patch interval-bounds looks at in a step: all, N at random, "
            "or N (a multiple of the classes) that a small U-Net predicts to be the worst. By "
            "default random:10.",
            rich_help_panel=_BOUNDS,
        ),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS[-ROWS]",
            help="With --strategy all: bound adjacent places together from the first layer on, 4 "
            "for 4x4 places; 2-2 for 2x2 there and again 2x2 after the second layer.",
            rich_help_panel=_BOUNDS,
        ),
    ] = None,
    clean_start: Annotated[
        float | None,
        typer.Option(
            help="Share of the training on clean images alone, at its beginning. By default 0.05.",
            rich_help_panel=_BOUNDS,
        ),
    ] = None,
    growth: Annotated[
        float | None,
        typer.Option(
            help="Share of the training after which a patch may show anything, more and more until "
            "then. By default 0.61.",
            rich_help_panel=_BOUNDS,
        ),
    ] = None,
    full_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of the training after which the learning rate is halved, and again after "
            "every further tenth. By default a tenth after --growth.",
            rich_help_panel=_BOUNDS,
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
        int | None,
        typer.Option(
            help="Images in a step; by default 256, 100 for interval-bounds.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    optimizer: Annotated[
        Literal["sgd", "adamw"] | None,
        typer.Option(
            help="adamw suits transformers and networks of linear layers. By default sgd; adamw "
            "for interval-bounds.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate; by default 0.4, with adamw 0.001, 0.0005 for "
            "interval-bounds; a tenth of that with --start.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="Weight decay; by default 0.0005, with adamw 0.05, 0 for interval-bounds.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    shift: Annotated[
        int | None,
        typer.Option(
            help="Shift the images by up to this many pixels; by default 2, 0 for interval-bounds.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
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
        Literal["32-true", "bf16-mixed", "16-mixed"] | None,
        typer.Option(
            help="By default bf16-mixed, which is quicker where the processor or GPU computes in "
            "bfloat16; interval-bounds needs 32-true.",
            rich_help_panel="Machine",
        ),
    ] = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
) -> None:
    """Train a classifier for what a defense shows it of an image.

    For PatchCleanser to be right under any two masks, for de-randomized smoothing from one band,
    for randomized cropping from one crop, for PatchGuard and what is like it by local features;
    for interval bounds to have narrow ones.
    The epoch is chosen on validation images seen in the same way, never on test images.
    Ctrl-C keeps what the last whole epoch gave.
    """
    from patchproof.cli.building import use_threads
    from patchproof.datasets import load_dataset
    from patchproof.errors import PatchproofError
    from patchproof.models import ModelSpec
    from patchproof.threat import SparsePixels
    from patchproof.training import (
        AblationRecipe,
        BagCertRecipe,
        ClippedRecipe,
        CropRecipe,
        CutoutRecipe,
        GreedyMasks,
        IntervalBoundsRecipe,
        MaskedEvidenceRecipe,
        RankRecipe,
    )
    from patchproof.training import train as run

    given = {
        "--squares": squares,
        "--candidates": candidates,
        "--fill": None if fill == 0.5 else fill,
        "--patch": patch,
        "--masks": None if masks == "6" else masks,
        "--window": window,
        "--evidence-masks": evidence_masks,
        "--margin": margin,
        "--clean-share": clean_share,
        "--ablation": ablation,
        "--bands": bands,
        "--crop": crop,
        "--strategy": strategy,
        "--pool": pool,
        "--clean-start": clean_start,
        "--growth": growth,
        "--full-rate": full_rate,
    }
    for option, value in given.items():
        if value is not None and recipe not in (suited := _TAKEN_BY[option]):
            raise PatchproofError(
                f"{option}: expected with --recipe {', '.join(suited)} only, got {recipe}"
            )
    use_threads(threads)
    size = None if image_size is None else opt.parse_pair("--image-size", image_size)
    training, validation = (
        load_dataset(data, split, root=root, image_size=size, download=download)
        for split in ("train", "validation")
    )
    if count is not None:
        training = training.sample(count, seed)
    if start is not None and model is None:
        spec = spec_of(start)
    else:
        name = model or default_model(recipe, training)
        options = opt.parse_model_options(model_option)
        if crop is not None and name == "crop-resnet9":
            options = {"crop": list(opt.parse_pair("--crop", crop))} | options
        spec = ModelSpec(
            name, len(training.class_names), training.channels, training.image_size, options
        )
    bounds = recipe == "interval-bounds"
    defaults: dict[str, Any] = {
        "batch_size": 100 if bounds else 256,
        "optimizer": "adamw" if bounds else "sgd",
        "shift": 0 if bounds else 2,
        "precision": "32-true" if bounds else "bf16-mixed",
    }
    default_lr, default_decay = (
        (0.4, 5e-4) if (optimizer or defaults["optimizer"]) == "sgd" else (0.001, 0.05)
    )
    if bounds:
        default_lr, default_decay = 5e-4, 0.0
    if start is not None:
        default_lr /= 10
    common: dict[str, Any] = defaults | {
        name: value
        for name, value in (
            ("batch_size", batch_size),
            ("optimizer", optimizer),
            ("shift", shift),
            ("precision", precision),
        )
        if value is not None
    }
    common |= {
        "fill": fill,
        "epochs": epochs,
        "learning_rate": default_lr if lr is None else lr,
        "weight_decay": default_decay if weight_decay is None else weight_decay,
        "flip": training.channels == 3 if flip is None else flip,
        "seed": seed,
        "epoch_images": epoch_images,
    }
    if recipe in _LOCAL_RECIPES:
        common["clean_share"] = (start is None) / 2 if clean_share is None else clean_share
    settings: Recipe
    match recipe:
        case "masked-evidence":
            settings = MaskedEvidenceRecipe(
                window=corrupted_features(spec, patch, window).window,
                masks=1 if evidence_masks is None else evidence_masks,
                **common,
            )
        case "bagcert":
            if margin is None:
                local = corrupted_features(spec, patch, window)
                margin = 2 * local.corrupted / local.features
            elif patch is not None or window is not None:
                raise PatchproofError("expected --margin, or --patch or --window, got both")
            settings = BagCertRecipe(margin=margin, **common)
        case "clipped":
            settings = ClippedRecipe(**common)
        case "median":
            settings = RankRecipe(statistic="median", **common)
        case "trimmed-mean" | "top-masking":
            trim = corrupted_features(spec, patch, window).corrupted
            settings = RankRecipe(statistic=recipe, trim=trim, **common)
        case "interval-bounds":
            if patch is None:
                raise PatchproofError(
                    "--patch: expected a size, or sparse:K, for --recipe interval-bounds, got none"
                )
            kind, regions = parse_strategy(strategy or "random:10")
            threat = opt.parse_threat(patch, None, "anywhere", training.image_size)
            if isinstance(threat, SparsePixels) and strategy is not None:
                raise PatchproofError(
                    f"--strategy: expected a patch, whose places can be chosen, got {patch}"
                )
            settings = IntervalBoundsRecipe(
                threat=threat,
                strategy=kind,
                regions=regions,
                pool=parse_pool(pool),
                clean_start=0.05 if clean_start is None else clean_start,
                growth=0.61 if growth is None else growth,
                full_rate=full_rate,
                **common,
            )
        case "ablation":
            settings = AblationRecipe(
                ablation=choose_ablation(spec, ablation),
                bands=1 if bands is None else bands,
                **common,
            )
        case "crops":
            settings = CropRecipe(crop_size=choose_crop(spec, crop), **common)
        case "cutout" | "greedy-cutout" | "plain":
            greedy = None
            if recipe == "greedy-cutout":
                if patch is None:
                    raise PatchproofError(
                        "--patch: expected a size for --recipe greedy-cutout, got none"
                    )
                greedy = GreedyMasks(
                    opt.parse_threat(patch, None, "anywhere", training.image_size),
                    opt.parse_pair("--masks", masks),
                    8 if candidates is None else candidates,
                )
            chosen = (squares or default_squares(training)) if recipe == "cutout" else None
            settings = CutoutRecipe(square_sizes=chosen, greedy=greedy, **common)
    try:
        best = run(
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
    typer.echo(f"{out / 'model.safetensors'}: epoch {best['epoch']}, {settings.describe(best)}")


def default_model(recipe: RecipeName, dataset: ImageDataset) -> str:
    """Return the network of our own that suits a recipe and the size of the images."""
    if recipe == "ablation":
        return "band-resnet"
    if recipe == "crops":
        return "crop-resnet9"
    if recipe in _LOCAL_RECIPES:
        return "bagnet"
    if recipe == "interval-bounds":
        return "ibp-mlp"
    return "small-resnet" if min(dataset.image_size) >= 24 else "tiny-resnet"


def parse_strategy(text: str) -> tuple[Strategy, int]:
    """Return the strategy of ``--strategy`` and how many regions it looks at.

    Raises:
        PatchproofError: another strategy, or no number of regions.
    """
    from patchproof.errors import PatchproofError

    kind, _, count = text.partition(":")
    match kind:
        case "all" if not count:
            return "all", 1
        case "random" | "guided" if count.isdecimal() and int(count) > 0:
            return kind, int(count)
    raise PatchproofError(f"--strategy: expected all, random:N or guided:N, got {text!r}")


def parse_pool(text: str | None) -> tuple[int, ...]:
    """Return how many places each step of ``--pool`` joins along each axis.

    Raises:
        PatchproofError: not one or two whole numbers.
    """
    from patchproof.errors import PatchproofError

    if text is None:
        return ()
    parts = text.split("-")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 1 for part in parts):
        raise PatchproofError(
            f"--pool: expected one or two numbers above 1, like 4 or 2-2, got {text!r}"
        )
    return tuple(map(int, parts))


def choose_ablation(spec: ModelSpec, text: str | None) -> Ablation:
    """Return the ablation of ``--ablation``, by default the one that the network was made for.

    Raises:
        PatchproofError: neither, or an ablation that cannot be read.
    """
    from patchproof.errors import PatchproofError
    from patchproof.models import build_model
    from patchproof.models.ablation import Ablation

    if text is None:
        made_for = getattr(build_model(spec), "ablation", None)
        if made_for is None:
            raise PatchproofError(
                f"--ablation: expected what to keep of an image for {spec.name}, such as column:4, "
                "got none"
            )
        assert isinstance(made_for, Ablation)
        return made_for
    return opt.parse_ablation("--ablation", text)


def choose_crop(spec: ModelSpec, text: str | None) -> tuple[int, int]:
    """Return (height, width) of ``--crop``, by default what the network was made for.

    Raises:
        PatchproofError: neither, or a size that cannot be read or is larger than the image.
    """
    from patchproof.errors import PatchproofError
    from patchproof.models import build_model
    from patchproof.models.crops import check_crop_size

    if text is not None:
        return check_crop_size(opt.parse_pair("--crop", text), spec.image_size)
    made_for: tuple[int, int] | None = getattr(build_model(spec), "crop_size", None)
    if made_for is None:
        raise PatchproofError(
            f"--crop: expected the size of the crops for {spec.name}, such as 10, got none"
        )
    return made_for


class CorruptedFeatures(NamedTuple):
    """What a patch can corrupt of the local features of an image.

    Attributes:
        window: (rows, columns) that hold all that one place of the patch corrupts.
        corrupted: the most features that one place corrupts.
        features: of the whole image.
    """

    window: tuple[int, int]
    corrupted: int
    features: int


def corrupted_features(spec: ModelSpec, patch: str | None, window: str | None) -> CorruptedFeatures:
    """Return what ``--patch``, or instead ``--window``, can corrupt of a network's local features.

    Raises:
        PatchproofError: neither or both, a network without local features, or a patch that
            corrupts more than a window can hold.
    """
    from patchproof.defenses.feature_windows import choose_windows
    from patchproof.errors import PatchproofError
    from patchproof.models import build_model
    from patchproof.training.evidence import check_local_logits, feature_map
    from patchproof.views import LocalFeatureViews

    if (patch is None) == (window is None):
        raise PatchproofError(
            "--patch or --window: expected one of them for this recipe, got "
            + ("none" if patch is None else "both")
        )
    network = build_model(spec)
    check_local_logits(network)
    if window is not None:
        rows, columns = opt.parse_pair("--window", window)
        height, width = feature_map(network, spec)
        return CorruptedFeatures((rows, columns), rows * columns, height * width)
    threat = opt.parse_threat(patch, None, "anywhere", spec.image_size)
    views = LocalFeatureViews(network, spec.image_size, spec.channels)
    corruption = views.corruption(threat)
    size = choose_windows(views, corruption, threat, spec.image_size).size
    return CorruptedFeatures(size, int(corruption.patterns.sum(1).max()), views.count)


def spec_of(start: Path) -> ModelSpec:
    """Return the model of a classifier file, from its card.

    Raises:
        PatchproofError: not a classifier file, or one whose model is code that --model must name.
    """
    from patchproof.errors import PatchproofError
    from patchproof.models import ModelSpec, read_card

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
