"""``patchproof demo``: the whole way, from training to a report, on digits in a few minutes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchproof.cli import options as opt

if TYPE_CHECKING:
    from torch import Tensor, nn

    from patchproof.defenses import PatchCleanser

_PATCH = 2
_MASKS = 7
_EPOCHS = 30


def demo(
    out: Annotated[
        Path,
        typer.Option(help="Folder for the model, results and report; goes on with its own."),
    ] = Path("runs/demo"),
    threads: opt.Threads = None,
) -> None:
    """Train, defend, certify, attack and report: digits against a 2x2-pixel patch.

    Takes about two minutes on two processor cores and downloads nothing. The digits are 8x8 pixels,
    so that the patch covers 6% of the image.
    """
    from patchproof.cli.building import use_threads
    from patchproof.cli.running import certify_and_show
    from patchproof.datasets import load_dataset
    from patchproof.defenses import PatchCleanser
    from patchproof.evaluation import read_result
    from patchproof.models import ModelSpec, load_classifier
    from patchproof.report import write_report
    from patchproof.threat import SquarePatch
    from patchproof.training import CutoutRecipe, train

    use_threads(threads)
    weights, result = out / "model" / "model.safetensors", out / "result"
    training, validation, test = (
        load_dataset("digits", split) for split in ("train", "validation", "test")
    )
    spec = ModelSpec("tiny-resnet", len(test.class_names), test.channels, test.image_size)
    recipe = CutoutRecipe(
        square_sizes=(1, 4),
        epochs=_EPOCHS,
        batch_size=64,
        learning_rate=0.2,
        shift=1,
        precision="32-true",
    )
    _say(f"1. Train a small network on {len(training)} digits with random squares on them.")
    train(recipe, spec, training, validation, weights.parent, device="cpu")

    _say(f"2. Defend it against any {_PATCH}x{_PATCH} patch anywhere, certify {len(test)} digits.")
    model, card = load_classifier(weights)
    defense = PatchCleanser(
        model,
        SquarePatch(_PATCH),
        image_size=test.image_size,
        masks_per_side=_MASKS,
        fill=recipe.fill,
    )
    about = {"command": ["patchproof", *sys.argv[1:]], "model_card": card}
    certify_and_show(
        defense, test, result, stop="first_lost_region", gallery=9, spec=spec, about=about
    )

    _say("3. Paint a patch that fools the network on an image that is certified.")
    examples = read_result(result).examples
    position_of = {index: position for position, index in enumerate(test.indices.tolist())}
    for index in examples.loc[examples["certified"], "index"]:
        clean = test.image(position_of[index])
        patched = _fooling(model, defense, clean)
        if patched is not None:
            break
    else:
        typer.echo("No patch of black and white pixels fools the network on a certified image.")
        patched = clean
    for name, image in (("clean", clean), ("patched", patched)):
        path = out / f"{name}.png"
        _save_png(image, path)
        undefended = int(model(image[None]).argmax())
        typer.echo(
            f"{path}: the network alone says {undefended}, "
            f"defended it says {int(defense.predict(image[None]))}"
        )

    _say("4. Make a report.")
    page = write_report([result], out / "report.html")
    typer.echo(f"Report: {page}")
    typer.echo(
        f"Try next: patchproof predict {out / 'patched.png'} --weights {weights} "
        f"--patch {_PATCH} --masks {_MASKS}"
    )


def _fooling(model: nn.Module, defense: PatchCleanser, image: Tensor) -> Tensor | None:
    """Return the image with a patch of black and white pixels that changes the model's label."""
    import torch

    regions = defense.threat.regions(defense.image_size)
    *_, height, width = regions.box(0)
    contents = torch.tensor(list(itertools.product((0.0, 1.0), repeat=height * width)))
    patched = []
    for top, left, *_ in map(regions.box, range(len(regions))):
        variants = image.repeat(len(contents), 1, 1, 1)
        variants[..., top : top + height, left : left + width] = contents.view(-1, 1, height, width)
        patched.append(variants)
    candidates = torch.cat(patched)
    with torch.inference_mode():
        label = model(image[None]).argmax(1)
        fooled = (model(candidates).argmax(1) != label).nonzero().flatten()
    return candidates[fooled[0]] if len(fooled) else None


def _save_png(image: Tensor, path: Path) -> None:
    import io

    import torch
    from PIL import Image

    from patchproof.models import write_atomically

    pixels = (image * 255).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[0].numpy()).save(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def _say(text: str) -> None:
    typer.secho(f"\n{text}", bold=True)
