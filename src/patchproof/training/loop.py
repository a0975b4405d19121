"""The training loop that all recipes share, as one page that reads from top to bottom."""

from __future__ import annotations

import io
import json
import math
import pickle
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchproof.datasets import ImageDataset
from patchproof.errors import PatchproofError, RunError
from patchproof.models import (
    ModelSpec,
    build_model,
    load_classifier,
    read_card,
    save_classifier,
    write_atomically,
)
from patchproof.training.recipe import Recipe, Step


def train(
    recipe: Recipe,
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

    The model of the epoch that validates best, by the recipe's own measure, is kept. Written to
    ``out``: ``card.json`` (what is trained on what), ``checkpoint.pt``, ``log.jsonl`` (one line an
    epoch) and ``model.safetensors`` (the best model, for ``load_classifier``).

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
        PatchproofError: data that do not fit the network, a network or images that do not fit the
            recipe, weights to start from that are of another network or given twice, or a folder
            of another training.
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
    if recipe.epoch_images is not None and recipe.epoch_images > len(training):
        raise PatchproofError(
            f"expected epochs of at most the {len(training)} training images, "
            f"got {recipe.epoch_images}"
        )
    if recipe.validation_images is not None and recipe.validation_images < len(validation):
        validation = validation.sample(recipe.validation_images, recipe.seed)
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
    torch.manual_seed(recipe.seed)
    drawn = recipe.draw(spec, len(validation))
    if start is None:
        network = build_model(spec, pretrained=pretrained)
    else:  # its card names the model that the caller asked for, code included
        network, _ = load_classifier(start, allow_code=True)
    if next(network.parameters(), None) is None:
        raise PatchproofError(f"expected a model with weights to train, got {spec.name}")
    recipe.check(network, spec)
    _claim_folder(out, card)

    images, labels = (fabric.to_device(tensor) for tensor in training.tensors())
    clean, clean_labels = (fabric.to_device(tensor) for tensor in validation.tensors())
    drawn = None if drawn is None else fabric.to_device(drawn)
    network = network.to(memory_format=torch.channels_last)
    companion = recipe.companion(spec)
    both = network
    if companion is not None:
        both = nn.ModuleList([network, companion.to(memory_format=torch.channels_last)])
    trained, optimizer = fabric.setup(both, make_optimizer(recipe, both))
    log = _resume(out, trained.module, optimizer)
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
            trained.train()
            total_loss = 0.0
            for step, batch in enumerate(
                torch.split(order, recipe.batch_size), start=epoch * steps
            ):
                views = shift_and_flip(images[batch], recipe) / 255
                done = step / (recipe.epochs * steps)
                with fabric.autocast():
                    loss = recipe.step_loss(
                        Step(network, companion, views, labels[batch], drawn, done)
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
                    group["lr"] = recipe.learning_rate * recipe.rate(done)
                fabric.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                progress.update(task, advance=1, state=f"loss {value:.3f}")

            torch.manual_seed(recipe.seed)  # what a validation draws is the same in every epoch
            with fabric.autocast():
                measured = recipe.evaluate(network, clean, clean_labels, drawn)
            entry = {
                "epoch": epoch + 1,
                "loss": total_loss / steps,
                **measured,
                "seconds": time.perf_counter() - started,
            }
            log.append(entry)
            if _best(log, recipe) is entry:
                save_classifier(out / "model.safetensors", network, spec, made | {"best": entry})
            _save_checkpoint(out, trained.module, optimizer, log)
            progress.console.print(
                f"epoch {entry['epoch']}: loss {entry['loss']:.3f}, {recipe.describe(entry)}, "
                f"{entry['seconds']:.0f} s"
            )
    return _best(log, recipe)


def shift_and_flip(images: Tensor, recipe: Recipe) -> Tensor:
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


def make_optimizer(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
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
        fused=True,
    )


def _check_start(start: Path, spec: ModelSpec, pretrained: bool) -> str:
    """Return the digest of the weights to start from, or raise if they are not for the network."""
    if pretrained:
        raise PatchproofError(f"expected published weights or {start} to start from, got both")
    card = read_card(start)
    if (found := ModelSpec.from_dict(card["model"])) != spec:
        raise PatchproofError(f"expected weights of {spec} to start from, got {found} in {start}")
    return str(card["digest"])


def _best(log: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Return the last epoch of the highest measure."""
    return max(log, key=lambda entry: (float(entry[recipe.chosen_by]), entry["epoch"]))


def _claim_folder(out: Path, card: dict[str, Any]) -> None:
    """Make sure that the folder holds no other training than the one the card describes."""
    path = out / "card.json"
    if any((out / name).exists() for name in ("checkpoint.pt", "model.safetensors")):
        there = json.loads(path.read_text()) if path.is_file() else {}
        wanted = json.loads(json.dumps(card))
        differing = sorted(
            key for key in wanted.keys() | there.keys() if wanted.get(key) != there.get(key)
        )
        if differing:
            raise PatchproofError(
                f"expected a new folder or one of this training, got {out}, of "
                f"another {', '.join(differing)}"
            )
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
