"""How fast attacks are: steps per second, against raw forward and backward passes of the model.

    python benchmarks/attacks.py zoo/mnist-greedy.safetensors data/mnist
    python benchmarks/attacks.py zoo/cifar10-plain.safetensors data/cifar10

- undefended: ``PatchPGD`` on the network itself. Raw is what its steps cost at the least: forward
  and backward passes of the same images in the same batch, with gradients in the images alone, as
  many as the attack takes steps. The attack does more: it chooses places, pastes, keeps the best,
  scores the last step, and checks the contract and ``predict`` at the end.
- majority, two-mask-disagreement: the same through the surrogates of PatchCleanser. Raw is as many
  passes of the surrogate. Success is checked with the network alone here: the defense's own
  ``predict`` would add some steps' worth of passes to an attack, whatever number of steps it takes.

No row stops early: surrogates do not say that they are exact. The ratio is the median over pairs of
measurements, one right after the other, on one thread, in processor time.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import measuring
import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.attacks import PatchPGD, PlaceSearch, Victim
from patchproof.datasets import load_dataset
from patchproof.models import load_classifier


class Inexact(nn.Module):
    """A surrogate that leaves it open whether a lead is a success, so that no row stops."""

    def __init__(self, scores: nn.Module) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.scores(images)
        return scores


def raw_steps(scores: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Take forward and backward passes, with gradients in the images alone."""
    for _ in range(steps):
        given = images.detach().requires_grad_()
        loss = scores(given).gather(1, labels[:, None]).sum()
        torch.autograd.grad(loss, given)


def measure(
    name: str,
    scores: nn.Module,
    predict: Callable[[Tensor], Tensor],
    arguments: argparse.Namespace,
    images: Tensor,
) -> dict[str, Any]:
    """Time one attack in one batch against as many raw steps."""
    labels = predict(images)
    attack = PatchPGD(
        places=PlaceSearch("random", count=1), steps=arguments.steps, batch_size=len(images)
    )
    threat = pp.SquarePatch(arguments.side)
    attacked = Victim(predict, {name: Inexact(scores)})
    times = measuring.pairs(
        arguments.repeats,
        lambda: attack.run(attacked, images, labels, threat=threat),
        lambda: raw_steps(scores, images, labels, arguments.steps),
        clock=time.process_time,
    )
    return {
        "benchmark": name,
        "images": len(images),
        "steps": arguments.steps,
        "steps_per_second": len(images) * arguments.steps / times["ours"],
        "raw_steps_per_second": len(images) * arguments.steps / times["theirs"],
        "over_raw": times["ratio"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a network in a safetensors file")
    parser.add_argument("data", help="a data set, of which test images are taken")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--side", type=int, default=5)
    parser.add_argument("--masks", type=int, default=3, help="masks of PatchCleanser on each side")
    parser.add_argument("--defended", type=int, default=2, help="images for the defense")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load_classifier(arguments.model)
    model.requires_grad_(False)
    pixels, _ = load_dataset(arguments.data, "test").sample(arguments.images, 0).tensors()
    images = pixels / 255
    size = (images.shape[2], images.shape[3])
    defense = pp.PatchCleanser(
        model, pp.SquarePatch(arguments.side), image_size=size, masks_per_side=arguments.masks
    )
    machine = {"processor": platform.processor(), "torch": torch.__version__, "threads": 1}
    undefended = Victim.of_model(model)
    for name, scores, count in (
        ("undefended", undefended.surrogates["logits"], arguments.images),
        *((aim, scores, arguments.defended) for aim, scores in defense.surrogates().items()),
    ):
        row = measure(name, scores, undefended.predict, arguments, images[:count])
        figures = {
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in row.items()
        }
        print(json.dumps({"model": arguments.model} | figures | machine), flush=True)


if __name__ == "__main__":
    main()
