"""Recipe ``cutout``: train on images with two masks, so that masked views are familiar.

PatchCleanser classifies images with one or two masks on them and certifies those whose label no
pair of masks changes, so the network should be right under any two masks. As in its paper (Section
4.1, after Cutout), two squares of the defense's own fill are put on every training image. Here
their sizes are drawn per square, so that one network serves several mask budgets.

The recipe ``greedy-cutout`` puts the two of the defense's masks on an image that hurt most (Saha et
al., 2023), which costs many forward passes a step: best as fine-tuning of a network that ``cutout``
made. Without squares and masks the same page is the recipe ``plain``, for comparison.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import time
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.datasets import ImageDataset
from patchproof.models import (
    ModelSpec,
    build_model,
    load_classifier,
    read_card,
    save_classifier,
    write_atomically,
)
from patchproof.results import PatchproofError, RunError
from patchproof.training.masking import GreedyMasks, greedy_pair, random_squares

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Optimizer = Literal["sgd", "adamw"]

GREEDY_VALIDATION = 1000
"""Most validation images of ``greedy-cutout``, which searches the worst masks on each."""


@dataclass(frozen=True)
class CutoutRecipe:
    """How to train; with equal data and device, the same recipe gives the same network.

    Attributes:
        square_sizes: smallest and largest side of the squares, in pixels; None for the recipes
            ``greedy-cutout`` and ``plain``, without squares.
        fill: value of the masked pixels, in [0, 1]; the defense must use the same.
        epochs: rounds of training, each ending with a validation and a checkpoint.
        batch_size: images in a step.
        learning_rate: at its highest; it rises linearly from 0 over ``warmup`` and falls back.
        warmup: share of the steps until the highest learning rate.
        momentum: Nesterov momentum, of ``sgd``.
        weight_decay: of all weights; with ``adamw`` of matrices and kernels alone.
        label_smoothing: share of the target that is spread over all classes.
        shift: images are shifted by up to this many pixels, mirrored at the border.
        flip: flip half of the images left to right.
        seed: of the initial weights and of everything random.
        precision: of the forward and backward passes, as Lightning Fabric names it.
        greedy: the masks that ``greedy-cutout`` searches; None for the other recipes.
        optimizer: ``sgd``, or ``adamw``, which transformers and networks of linear layers need.
        epoch_images: training images of an epoch, drawn anew for each; None for all of them.
    """

    square_sizes: tuple[int, int] | None
    fill: float = 0.5
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 0.4
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    shift: int = 2
    flip: bool = False
    seed: int = 0
    precision: Precision = "bf16-mixed"
    greedy: GreedyMasks | None = None
    optimizer: Optimizer = "sgd"
    epoch_images: int | None = None

    def __post_init__(self) -> None:
        if self.square_sizes is not None and self.greedy is not None:
            raise PatchproofError("expected random squares or greedy masks, got both")
        if self.square_sizes is not None and not 1 <= self.square_sizes[0] <= self.square_sizes[1]:
            raise PatchproofError(
                f"expected square sizes (smallest, largest) from 1 pixel, got {self.square_sizes}"
            )
        for name, low, high in (
            ("epochs", 1, math.inf),
            ("batch_size", 2, math.inf),
            ("shift", 0, math.inf),
            ("fill", 0.0, 1.0),
            ("warmup", 0.0, 1.0),
            ("momentum", 0.0, 1.0),
            ("label_smoothing", 0.0, 1.0),
            ("weight_decay", 0.0, math.inf),
        ):
            if not low <= getattr(self, name) <= high:
                raise PatchproofError(
                    f"expected {name} from {low} to {high}, got {getattr(self, name)}"
                )
        if self.precision not in (known := get_args(Precision)):
            raise PatchproofError(f"expected a precision of {known}, got {self.precision!r}")
        if self.optimizer not in (known := get_args(Optimizer)):
            raise PatchproofError(f"expected an optimizer of {known}, got {self.optimizer!r}")
        if self.epoch_images is not None and self.epoch_images < self.batch_size:
            raise PatchproofError(
                f"expected epochs of at least one batch of {self.batch_size} images, "
                f"got {self.epoch_images}"
            )
        if not 0.0 < self.learning_rate < math.inf:
            raise PatchproofError(f"expected a positive learning_rate, got {self.learning_rate}")

    @property
    def name(self) -> str:
        """Return ``cutout``, ``greedy-cutout``, or ``plain`` without squares and masks."""
        if self.greedy is not None:
            return "greedy-cutout"
        return "plain" if self.square_sizes is None else "cutout"

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values.

        The last three attributes only where they are not at their defaults, so that the card of a
        training that began before they existed stays equal, and the training can go on.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.square_sizes is not None:
            values["square_sizes"] = list(self.square_sizes)
        if self.greedy is not None:
            values["greedy"] = self.greedy.to_dict()
        for name, default in (("greedy", None), ("optimizer", "sgd"), ("epoch_images", None)):
            if values[name] == default:
                del values[name]
        return {"recipe": self.name} | values


def train_cutout(
    recipe: CutoutRecipe,
    spec: ModelSpec,
    training: ImageDataset,
    validation: ImageDataset,
    out: Path,
    *,
    device: str = "auto",
    pretrained: bool = False,
    start: Path | None = None,
) -> dict[str, Any]:
    """Train a classifier; the same call continues a training that was stopped, after any epoch.

    The model of the epoch with the best validation accuracy is kept: under two fixed random
    squares for each image; for ``greedy-cutout`` under the masks that hurt most, on at most 1,000
    images and with fixed candidates; for ``plain`` of clean images. Written to ``out``:
    ``card.json`` (what is trained on what), ``checkpoint.pt``, ``log.jsonl`` (one line an epoch)
    and ``model.safetensors`` (the best model, for ``load_classifier``).

    Args:
        recipe: how to train.
        spec: the network.
        training: images to train on; they are held in memory, as 8-bit values.
        validation: other images, to choose the epoch by.
        out: a folder, new or of this very training.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        pretrained: start from the published weights of a ``timm:`` or ``torchvision:`` model.
        start: start from the weights of this classifier file, which must be of the network
            ``spec``; the card records their digest.

    Returns:
        The log entry of the best epoch.

    Raises:
        PatchproofError: data that do not fit the network, weights to start from that are of
            another network or given twice, or a folder of another training.
        RunError: a loss that is not finite, or a file that cannot be read or written.
    """
    from lightning_fabric import Fabric
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    for data in (training, validation):
        if (data.channels, data.image_size) != (spec.channels, spec.image_size):
            raise PatchproofError(
                f"expected images for {spec}, got {data.image_size} with {data.channels} channels"
            )
        if len(data.class_names) != spec.classes:
            raise PatchproofError(
                f"expected images of {spec.classes} classes, got {len(data.class_names)}"
            )
    if len(training) < recipe.batch_size:
        raise PatchproofError(
            f"expected at least one batch of {recipe.batch_size} images, got {len(training)}"
        )
    if recipe.square_sizes and recipe.square_sizes[1] >= min(spec.image_size):
        raise PatchproofError(
            f"expected squares smaller than the images of {spec.image_size} pixels, "
            f"got sides up to {recipe.square_sizes[1]}"
        )
    if recipe.epoch_images is not None and recipe.epoch_images > len(training):
        raise PatchproofError(
            f"expected epochs of at most the {len(training)} training images, "
            f"got {recipe.epoch_images}"
        )
    if recipe.greedy is not None:
        masks = recipe.greedy.masked(spec.image_size)
        validation = validation.sample(min(len(validation), GREEDY_VALIDATION), recipe.seed)
    card = {
        **recipe.to_dict(),
        "model": spec.to_dict(),
        "pretrained": pretrained,
        "data": {
            data.split: {"name": data.name, "images": len(data), "digest": data.digest()}
            for data in (training, validation)
        },
    }
    if start is not None:
        card["start"] = _check_start(start, spec, pretrained)
    accelerator, _, index = device.partition(":")
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=[int(index)] if index else 1,
            precision=recipe.precision,
        )
    except (ValueError, RuntimeError) as error:
        raise PatchproofError(
            f"expected a device and a precision of this machine, got {device!r} and "
            f"{recipe.precision!r}: {error}"
        ) from error
    if fabric.device.type == "cpu" and recipe.precision == "16-mixed":
        raise PatchproofError("expected precision bf16-mixed or 32-true on a cpu, got 16-mixed")
    _claim_folder(out, card)
    images, labels = (fabric.to_device(tensor) for tensor in training.tensors())
    clean, clean_labels = (fabric.to_device(tensor) for tensor in validation.tensors())
    torch.manual_seed(recipe.seed)
    covered = None
    if recipe.square_sizes:
        covered = fabric.to_device(random_squares(len(clean), spec.image_size, recipe.square_sizes))

    if start is None:
        network = build_model(spec, pretrained=pretrained)
    else:  # its card names the model that the caller asked for, code included
        network, _ = load_classifier(start, allow_code=True)
    if next(network.parameters(), None) is None:
        raise PatchproofError(f"expected a model with weights to train, got {spec.name}")
    network = network.to(memory_format=torch.channels_last)
    network, optimizer = fabric.setup(network, make_optimizer(recipe, network))
    search = None
    if recipe.greedy is not None:
        search = partial(
            greedy_pair,
            network,
            masks=fabric.to_device(masks),
            candidates=recipe.greedy.candidates,
            fill=recipe.fill,
        )
    log = _resume(out, network, optimizer)
    made = card | {
        "class_names": list(training.class_names),
        "versions": {name: version(name) for name in ("patchproof", "torch")},
    }
    steps = (recipe.epoch_images or len(images)) // recipe.batch_size
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(
            "training", total=recipe.epochs * steps, completed=len(log) * steps, state=""
        )
        for epoch in range(len(log), recipe.epochs):
            started = time.perf_counter()
            torch.manual_seed(recipe.seed + 1_000_003 * (epoch + 1))  # the same after a resume
            order = torch.randperm(len(images))[: steps * recipe.batch_size].to(images.device)
            network.train()
            total_loss = 0.0
            for step, batch in enumerate(
                torch.split(order, recipe.batch_size), start=epoch * steps
            ):
                views = shift_and_flip(images[batch], recipe) / 255
                if recipe.square_sizes:
                    squares = random_squares(len(views), spec.image_size, recipe.square_sizes)
                    views.masked_fill_(squares.to(views.device), recipe.fill)
                elif search is not None:
                    views.masked_fill_(search(views, labels[batch]), recipe.fill)
                loss = functional.cross_entropy(
                    network(views), labels[batch], label_smoothing=recipe.label_smoothing
                )
                value = loss.item()
                if not math.isfinite(value):
                    raise RunError(
                        f"expected a finite loss, got {value} in epoch {epoch + 1}; "
                        "a lower learning rate may help"
                    )
                total_loss += value
                done = (step + 1) / (recipe.epochs * steps)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * min(
                        done / max(recipe.warmup, 1e-9), (1 - done) / max(1 - recipe.warmup, 1e-9)
                    )
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                progress.update(task, advance=1, state=f"loss {value:.3f}")

            if search is not None:
                torch.manual_seed(recipe.seed)  # the same candidates after every epoch
                covered = torch.cat(
                    [
                        search(clean[batch] / 255, clean_labels[batch])
                        for batch in torch.split(torch.arange(len(clean)), 250)
                    ]
                )
            entry = {
                "epoch": epoch + 1,
                "loss": total_loss / steps,
                "clean_accuracy": _accuracy(network, clean, clean_labels),
                "masked_accuracy": None
                if covered is None
                else _accuracy(network, clean, clean_labels, covered, recipe.fill),
                "seconds": time.perf_counter() - started,
            }
            log.append(entry)
            if _best(log) is entry:
                save_classifier(
                    out / "model.safetensors", network.module, spec, made | {"best": entry}
                )
            _save_checkpoint(out, network, optimizer, log)
            progress.console.print(_in_words(entry))
    return _best(log)


def shift_and_flip(images: Tensor, recipe: CutoutRecipe) -> Tensor:
    """Shift each image (N, C, H, W) at random, mirrored at the border, and flip half of them."""
    count, channels, height, width = images.shape
    top, left = torch.randint(-recipe.shift, recipe.shift + 1, (2, count, 1), device="cpu")
    rows = _mirror(top + torch.arange(height), height)
    columns = _mirror(left + torch.arange(width), width)
    if recipe.flip:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return images[
        torch.arange(count).reshape(-1, 1, 1, 1),
        torch.arange(channels).reshape(1, -1, 1, 1),
        rows.to(images.device).reshape(count, 1, height, 1),
        columns.to(images.device).reshape(count, 1, 1, width),
    ]


def _mirror(positions: Tensor, length: int) -> Tensor:
    last = length - 1
    return last - (last - positions.abs()).abs()


def make_optimizer(recipe: CutoutRecipe, network: nn.Module) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over all parameters of a network."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
        )
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for parameter in network.parameters():
        vector = parameter.squeeze().ndim < 2  # ResMLP keeps the scales of its channels (1, 1, D)
        groups[vector]["params"].append(parameter)
    return torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )


def _check_start(start: Path, spec: ModelSpec, pretrained: bool) -> str:
    """Return the digest of the weights to start from, or raise if they are not for the network."""
    if pretrained:
        raise PatchproofError(f"expected published weights or {start} to start from, got both")
    card = read_card(start)
    if (found := ModelSpec.from_dict(card["model"])) != spec:
        raise PatchproofError(f"expected weights of {spec} to start from, got {found} in {start}")
    return str(card["digest"])


@torch.no_grad()
def _accuracy(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    covered: Tensor | None = None,
    fill: float = 0.0,
) -> float:
    """Return the share of uint8 images classified right, under masks (N, 1, H, W) if given."""
    network.eval()
    right = 0
    for batch in torch.split(torch.arange(len(images), device=images.device), 250):
        views = images[batch] / 255
        if covered is not None:
            views.masked_fill_(covered[batch], fill)
        right += int((network(views).argmax(1) == labels[batch]).sum())
    return right / len(images)


def _best(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first epoch of the best accuracy: under masks, or clean for ``plain``."""
    key = "clean_accuracy" if log[0]["masked_accuracy"] is None else "masked_accuracy"
    return max(log, key=lambda entry: float(entry[key]))


def _claim_folder(out: Path, card: dict[str, Any]) -> None:
    """Make sure that the folder holds no other training than the one the card describes."""
    path = out / "card.json"
    if any((out / name).exists() for name in ("checkpoint.pt", "model.safetensors")):
        if not path.is_file() or json.loads(path.read_text()) != json.loads(json.dumps(card)):
            raise PatchproofError(f"expected a new folder or one of this training, got {out}")
    else:
        write_atomically(path, json.dumps(card, indent=2).encode())


def _resume(
    out: Path, network: nn.Module, optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Load the last checkpoint, if there is one, and return the log so far."""
    path = out / "checkpoint.pt"
    if not path.is_file():
        return []
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    network.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    log: list[dict[str, Any]] = checkpoint["log"]
    return log


def _save_checkpoint(
    out: Path, network: nn.Module, optimizer: torch.optim.Optimizer, log: list[dict[str, Any]]
) -> None:
    file = io.BytesIO()
    state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
    torch.save(state, file)
    write_atomically(out / "checkpoint.pt", file.getvalue())
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    write_atomically(out / "log.jsonl", lines.encode())


def _in_words(entry: dict[str, Any]) -> str:
    masked = entry["masked_accuracy"]
    return (
        f"epoch {entry['epoch']}: loss {entry['loss']:.3f}, clean {entry['clean_accuracy']:.2%}"
        + ("" if masked is None else f", under two masks {masked:.2%}")
        + f", {entry['seconds']:.0f} s"
    )
