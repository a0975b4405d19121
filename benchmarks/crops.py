"""How fast randomized cropping is: crops through the network, and certificates from their votes.

    python benchmarks/crops.py views
    python benchmarks/crops.py certify

- views: crops per second of ``RandomizedCropping.crop_labels`` for CIFAR-10-sized images, all
  crops and a draw of 128, as a ratio to what the layers of the network take of ready crops,
  channels last, both in the batch size that is fastest for the latter. The ratio is the median over
  pairs of measurements, one right after the other.
- certify: seconds of ``certify_votes`` for 10,000 images from recorded votes, and of the paper's
  condition alone. The votes are drawn at random: of each image a share of 0.2 to 0.95 for the
  label, the rest for the nine other classes in uneven shares, in patches of neighbouring places.

On one thread, and in processor time: other work on the machine then counts less.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import measuring
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import patchproof as pp
from patchproof.defenses.inference import fastest_batch_size
from patchproof.defenses.randomized_cropping import CropLabels, Mode
from patchproof.models import ModelSpec, build_model
from patchproof.models.crops import CropResNet9, cut
from patchproof.precision import exact_inference

CLASSES = 10
SIZE = (32, 32)
LARGEST_BATCH = 2048
pairs = partial(measuring.pairs, clock=time.process_time)
seconds = partial(measuring.seconds, clock=time.process_time)


def defense(threat: pp.Threat, **options: Any) -> pp.RandomizedCropping:
    """Return one of the network at its default widths, with random weights."""
    torch.manual_seed(0)
    model = build_model(ModelSpec("crop-resnet9", CLASSES, 3, SIZE)).eval()
    return pp.RandomizedCropping(model, threat, image_size=SIZE, **options)


def views(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time crops of images against ready crops through the layers."""
    rows = []
    for name, options in (
        ("all", {}),
        ("128 with replacement", {"mode": "random-crops"}),
        ("128 without replacement", {"mode": "random-crops", "replacement": False}),
    ):
        tested = defense(pp.SquarePatch(5), **options)
        images = torch.rand(arguments.images, 3, *SIZE)
        if tested.mode == "all-crops":
            places = tested.fixed.expand(len(images), -1)
        else:
            generator = np.random.default_rng(0)
            places = tested.places.draw(len(images), tested.crops, tested.replacement, generator)
        work = partial(tested.crop_labels, images, places)
        classified = int(work().forwards.sum())
        assert isinstance(tested.model, CropResNet9)
        raw, tested.batch_size = ready_crops(tested.model.layers, images, classified)
        times = pairs(arguments.repeats, work, raw)
        rows.append(
            {
                "benchmark": "views",
                "crops": name,
                "images": len(images),
                "crops_per_image": classified / len(images),
                "batch": tested.batch_size,
                "crops_per_second": classified / times["ours"],
                "raw_crops_per_second": classified / times["theirs"],
                "over_raw": times["ratio"],
            }
        )
    return rows


def ready_crops(layers: nn.Module, images: Tensor, count: int) -> tuple[Callable[[], None], int]:
    """Return the classification of as many ready crops, and its fastest batch size."""
    corners = torch.stack([torch.arange(LARGEST_BATCH) % 23, torch.arange(LARGEST_BATCH) % 19], 1)
    image = torch.arange(LARGEST_BATCH) % len(images)
    crops = cut(images, image, corners, (10, 10)).contiguous(memory_format=torch.channels_last)
    with exact_inference(images.device):
        batch = fastest_batch_size(lambda size: layers(crops[:size]), LARGEST_BATCH, images.device)

    def work() -> None:
        with exact_inference(images.device):
            for start in range(0, count, batch):
                layers(crops[: min(batch, count - start)])

    return work, batch


def recorded_votes(count: int, places: tuple[int, int], seed: int) -> tuple[CropLabels, Tensor]:
    """Return votes of all places (see the module), and the labels, (N,) int64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    share = 0.2 + 0.75 * torch.rand(count, generator=generator)
    noise = torch.rand(count, 1, *places, generator=generator)
    order = functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False).flatten(1)
    # The places are ranked, and a class has a range of ranks: neighbours vote alike.
    rank = order.argsort(1).argsort(1) / order.shape[1]
    others = torch.rand(count, CLASSES, generator=generator) ** 3
    others.scatter_(1, labels[:, None], 0.0)
    shares = others / others.sum(1, keepdim=True) * (1 - share[:, None])
    shares.scatter_(1, labels[:, None], share[:, None])
    votes = torch.searchsorted(shares.cumsum(1), rank.contiguous()).clamp(max=CLASSES - 1)
    forwards = torch.full((count,), votes.shape[1])
    return CropLabels(votes, torch.full(votes.shape, 9.0), forwards, CLASSES), labels


def certify(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time certificates from recorded votes, each from a defense that was just made."""
    rows = []
    modes: tuple[tuple[Mode, bool], ...] = (
        ("all-crops", False),
        ("fixed-crops", True),
        ("random-crops", True),
        ("random-crops", False),
    )
    for mode, replacement in modes:
        tested = defense(pp.SquarePatch(arguments.side), mode=mode, replacement=replacement)
        found, labels = recorded_votes(arguments.votes, tested.places.grid, arguments.seed)
        generator = np.random.default_rng(arguments.seed)
        drawn = tested.places.draw(len(labels), tested.crops, replacement, generator)
        voting = drawn if mode == "random-crops" else tested.fixed.expand(len(labels), -1)
        votes = found.labels.gather(1, voting)
        if mode == "fixed-crops":
            found = replace(found, labels=votes, margins=found.margins.gather(1, voting))
        work = partial(
            tested.certify_votes, found, labels, drawn if mode == "random-crops" else None
        )
        taken = seconds(work)
        result = work()
        rows.append(
            {
                "benchmark": "certify",
                "mode": mode,
                "replacement": replacement,
                "images": len(labels),
                "places": tested.places.count,
                "regions": len(tested.regions),
                "seed": arguments.seed,
                "seconds": taken,
                "seconds_paper_condition": seconds(
                    partial(tested.paper_condition, votes, CLASSES, labels)
                ),
                "holding": float((result.verdicts == pp.Verdict.HOLDS).float().mean()),
                "paper_condition": float(result.paper_condition.float().mean()),
            }
        )
    return rows


BENCHMARKS = {"views": views, "certify": certify}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--votes", type=int, default=10_000, help="images with recorded votes")
    parser.add_argument("--side", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = {"processor": platform.processor(), "torch": torch.__version__, "threads": 1}
    for row in BENCHMARKS[arguments.benchmark](arguments):
        figures = {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in row.items()
        }
        print(json.dumps(figures | machine), flush=True)


if __name__ == "__main__":
    main()
