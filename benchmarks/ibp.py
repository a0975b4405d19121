"""How fast interval bounds are on windows, as ratios to the plain algorithm.

    python benchmarks/ibp.py certify
    python benchmarks/ibp.py certify --data PATH --weights net.safetensors
    python benchmarks/ibp.py screening --data PATH --weights net.safetensors
    python benchmarks/ibp.py training
    python benchmarks/ibp.py memory

- certify: the lower bounds of the margins for a 5x5 patch at all locations, without stopping early,
  of the networks of Chiang et al. (2020) on 28x28x1 and 32x32x3 images. Ours are lower by the slack
  for all rounding, which the plain ones do not have.
- screening: the same after the boxes around adjacent places, and leaving an image at the first
  location that does not hold, against all locations one by one; their verdicts must be equal.
- training: one step (loss, gradients, Adam) of each strategy on as many regions; of `all` the
  losses must be equal.
- memory: the peak of certification at growing budgets, each in a process of its own.

The plain algorithm is the paper's: one box of the whole image for each location, whose centre and
radius go through every layer. It is batched over images and locations, by as many boxes as are
fastest for it; in all-patch training it too needs gradients of the worst locations alone. Margins
are compared in the same run: verdicts are equal wherever a margin is not within the tolerance.

Every ratio is the median over pairs of measurements, one right after the other, on one thread, of
processor time: other work on the machine then counts less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import measuring
import torch
from torch import Tensor, nn
from torch.nn import functional

import patchproof as pp
from patchproof.bounds import BoundedNetwork
from patchproof.cli.main import keep_freed_memory
from patchproof.datasets import load_dataset
from patchproof.models import ModelSpec, build_model, load_classifier
from patchproof.precision import direct_inference
from patchproof.training.interval_bounds import IntervalBoundsRecipe, certificate_loss
from patchproof.training.recipe import Step

SIZES = {"28x28x1": (1, (28, 28)), "32x32x3": (3, (32, 32))}
NETWORKS = ("ibp-mlp", "ibp-conv2", "ibp-conv4")
STRATEGIES: tuple[Literal["all", "random", "guided"], ...] = ("all", "random", "guided")
pairs = partial(measuring.pairs, clock=time.process_time)
seconds = partial(measuring.seconds, clock=time.process_time)
BATCHES = (64, 128, 256, 576, 1152)


class PlainBounds:
    """The plain algorithm on a sequence of Conv2d, ReLU, Flatten and Linear.

    Args:
        network: the network.
        boxes_at_once: how many boxes go through it together.
    """

    def __init__(self, network: nn.Module, boxes_at_once: int) -> None:
        self.layers = list(network.children())
        self.boxes_at_once = boxes_at_once

    def margins(self, images: Tensor, labels: Tensor, starts: Tensor, side: int) -> Tensor:
        """Return lower bounds of the margins, (N, L, classes), for squares at starts (N, L, 2)."""
        images_at_once = max(1, self.boxes_at_once // starts.shape[1])
        return torch.cat(
            [
                torch.cat(
                    [
                        self._margins(images[chosen], labels[chosen], places, side)
                        for places in starts[chosen].split(self.boxes_at_once, 1)
                    ],
                    1,
                )
                for chosen in torch.arange(len(images)).split(images_at_once)
            ]
        )

    def _margins(self, images: Tensor, labels: Tensor, starts: Tensor, side: int) -> Tensor:
        inside = [
            (torch.arange(length) >= first[..., None])
            & (torch.arange(length) < first[..., None] + side)
            for length, first in zip(images.shape[2:], starts.unbind(2), strict=True)
        ]
        patch = (inside[0][:, :, None, :, None] & inside[1][:, :, None, None, :]).float()
        lower = (images[:, None] * (1 - patch)).flatten(0, 1)
        upper = torch.maximum(images[:, None], patch).flatten(0, 1)
        for layer in self.layers[:-1]:
            match layer:
                case nn.Conv2d():
                    weight = layer.weight.clone(memory_format=torch.contiguous_format)  # faster
                    convolve = partial(
                        functional.conv2d, stride=layer.stride, padding=layer.padding
                    )
                    centre = convolve((lower + upper) / 2, weight, layer.bias)
                    radius = convolve((upper - lower) / 2, weight.abs())
                    lower, upper = centre - radius, centre + radius
                case nn.Linear():
                    centre = layer((lower + upper) / 2)
                    radius = functional.linear((upper - lower) / 2, layer.weight.abs())
                    lower, upper = centre - radius, centre + radius
                case _:
                    lower, upper = layer(lower), layer(upper)
        head = self.layers[-1]
        difference = head.weight[labels][:, None] - head.weight  # (n, classes, features)
        shape = starts.shape[:2]
        centre = ((lower + upper) / 2).unflatten(0, shape)
        radius = ((upper - lower) / 2).unflatten(0, shape)
        margins = difference @ centre.mT - difference.abs() @ radius.mT
        return (margins + (head.bias[labels][:, None] - head.bias)[:, :, None]).mT


def fastest(work: Callable[[int], object], sizes: tuple[int, ...]) -> int:
    """Return the batch size at which some work takes the least time."""
    return min(sizes, key=lambda size: min(seconds(partial(work, size)) for _ in range(2)))


def networks(arguments: argparse.Namespace) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Return names, networks, images and labels to measure on."""
    if arguments.weights:
        model, card = load_classifier(arguments.weights)
        dataset = load_dataset(arguments.data, arguments.split).sample(arguments.images, seed=0)
        pixels, labels = dataset.tensors()
        name = f"{card['model']['name']}, {Path(arguments.weights).stem}"
        return [(name, model, pixels.float() / 255, labels)]
    found = []
    for size, (channels, image_size) in SIZES.items():
        for name in arguments.networks:
            torch.manual_seed(0)
            model = build_model(ModelSpec(name, 10, channels, image_size))
            images = torch.rand(arguments.images, channels, *image_size)
            found.append((f"{name}, {size}", model, images, torch.arange(len(images)) % 10))
    return found


def all_starts(count: int, image_size: tuple[int, ...], side: int) -> Tensor:
    """Return all locations of a square on each of ``count`` images, rows first, (count, L, 2)."""
    places = [torch.arange(length - side + 1) for length in image_size]
    return torch.cartesian_prod(*places).expand(count, -1, -1)


def certify(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time bounds at all locations, and compare the margins."""
    rows = []
    for name, model, images, labels in networks(arguments):
        image_size = (images.shape[2], images.shape[3])
        bounded = BoundedNetwork(model, (images.shape[1], *image_size))
        regions = pp.SquarePatch(arguments.side).regions(image_size)
        starts = all_starts(len(images), image_size, arguments.side)
        with direct_inference(images.device):
            boxes_at_once = fastest(
                lambda size, model=model, images=images, labels=labels, starts=starts: PlainBounds(
                    model, size
                ).margins(images[:4], labels[:4], starts[:4], arguments.side),
                BATCHES,
            )
            plain = PlainBounds(model, boxes_at_once)
            ours = bounded.lowest_margins(images, labels, regions)
            margins = plain.margins(images, labels, starts, arguments.side)
            own = labels[:, None, None].expand(-1, margins.shape[1], 1)
            theirs = margins.scatter(2, own, torch.inf).amin(2)
            order = (regions.parts[:, 0, :2] @ torch.tensor([1000, 1])).argsort()
            difference = ours[:, order] - theirs
            far = theirs.abs() > arguments.tolerance
            assert bool(((ours[:, order] > 0) == (theirs > 0))[far].all())
            times = pairs(
                arguments.repeats,
                partial(bounded.lowest_margins, images, labels, regions),
                partial(plain.margins, images, labels, starts, arguments.side),
            )
        rows.append(
            {
                "benchmark": "certify",
                "network": name,
                "images": len(images),
                "locations": len(regions),
                "boxes_at_once_plain": boxes_at_once,
                "seconds_per_100_images": times["ours"] / len(images) * 100,
                "seconds_per_100_images_plain": times["theirs"] / len(images) * 100,
                "times_faster": times["ratio"],
                "holding": float((ours > 0).float().mean()),
                "within_tolerance": float((~far).float().mean()),
                "other_verdicts": int(((ours[:, order] > 0) != (theirs > 0)).sum()),
                "lowest_difference": float(difference.min()),
                "highest_difference": float(difference.max()),
            }
        )
    return rows


def screening(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time pooled screening and stopping early against all locations one by one."""
    rows = []
    for name, model, images, labels in networks(arguments):
        image_size = (images.shape[2], images.shape[3])
        bounded = BoundedNetwork(model, (images.shape[1], *image_size))
        regions = pp.SquarePatch(arguments.side).regions(image_size)
        every = partial(bounded.lowest_margins, images, labels, regions)
        holding = every() > 0
        for screen in (1, 2, 3, 4, 6):
            for stop in (False, True):
                if screen == 1 and not stop:
                    continue
                screened = partial(every, screen=screen, stop=stop)
                found = screened() > 0
                assert torch.equal(found.all(1), holding.all(1))
                assert stop or torch.equal(found, holding)
                times = pairs(arguments.repeats, screened, every)
                rows.append(
                    {
                        "benchmark": "screening",
                        "network": name,
                        "images": len(images),
                        "screen": screen,
                        "stop": stop,
                        "certified": float(holding.all(1).float().mean()),
                        "holding": float(holding.float().mean()),
                        "seconds_per_100_images": times["ours"] / len(images) * 100,
                        "seconds_per_100_images_all": times["theirs"] / len(images) * 100,
                        "times_faster": times["ratio"],
                    }
                )
    return rows


def update(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """Do one step of the training."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def plain_loss(
    recipe: IntervalBoundsRecipe, step: Step, starts: Tensor, side: int, boxes_at_once: int
) -> Tensor:
    """Return the loss of a step by the plain algorithm, at the end of the interval's growth."""
    plain = PlainBounds(step.network, boxes_at_once)
    images, labels, companion = step.views, step.labels, step.companion
    count = len(images)
    each = torch.arange(count)[:, None]
    match recipe.strategy:
        case "random":
            drawn = torch.randperm(starts.shape[1])[: recipe.regions]
            margins = plain.margins(images, labels, starts[:, drawn], side)
            return certificate_loss(margins.amin(1), labels)
        case "all":
            with torch.no_grad():
                worst = plain.margins(images, labels, starts, side).argmin(1)
            margins = plain.margins(images, labels, starts[each, worst], side)
            return certificate_loss(margins.amin(1), labels)
        case "guided":
            assert companion is not None
            predicted = companion(images).flatten(2)
            shares = (-predicted.detach()).softmax(2).flatten(0, 1)
            drawn = torch.multinomial(shares, recipe.regions // predicted.shape[1])
            drawn = drawn.reshape(count, -1)
            margins = plain.margins(images, labels, starts[each, drawn], side)
            seen = predicted.gather(2, drawn[:, None].expand(-1, predicted.shape[1], -1))
            guide_loss = functional.mse_loss(seen, margins.detach().transpose(1, 2))
            return certificate_loss(margins.amin(1), labels) + guide_loss


def training(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one step of each strategy."""
    rows = []
    threat = pp.SquarePatch(arguments.side)
    for name, model, images, labels in networks(arguments):
        image_size = (images.shape[2], images.shape[3])
        starts = all_starts(len(images), image_size, arguments.side)
        model.train()
        for strategy in arguments.strategies:
            recipe = IntervalBoundsRecipe(threat=threat, strategy=strategy)
            spec = ModelSpec(name.partition(",")[0], 10, images.shape[1], image_size)
            companion = recipe.companion(spec)
            parameters = [*model.parameters(), *(companion.parameters() if companion else ())]
            optimizer = torch.optim.Adam(parameters, lr=1e-6, fused=True)
            step = Step(model, companion, images, labels, None, 1.0)
            ours = partial(update, optimizer, partial(recipe.step_loss, step))

            def theirs(
                size: int,
                recipe: IntervalBoundsRecipe = recipe,
                optimizer: torch.optim.Optimizer = optimizer,
                step: Step = step,
                starts: Tensor = starts,
            ) -> None:
                update(optimizer, partial(plain_loss, recipe, step, starts, arguments.side, size))

            boxes_at_once = fastest(theirs, (128, 512))
            if strategy == "all":
                plain = plain_loss(recipe, step, starts, arguments.side, boxes_at_once)
                torch.testing.assert_close(recipe.step_loss(step), plain, rtol=1e-3, atol=1e-3)
            times = pairs(arguments.repeats, ours, partial(theirs, boxes_at_once))
            rows.append(
                {
                    "benchmark": "training",
                    "network": name,
                    "strategy": strategy if strategy == "all" else f"{strategy}:{recipe.regions}",
                    "images": len(images),
                    "boxes_at_once_plain": boxes_at_once,
                    "ms_per_step": times["ours"] * 1e3,
                    "ms_per_step_plain": times["theirs"] * 1e3,
                    "times_faster": times["ratio"],
                }
            )
    return rows


def _peak(name: str, size: str, images: int, budget: int) -> tuple[float, float]:
    """Return the growth of the peak memory, in MiB, and the seconds of certification."""
    torch.set_num_threads(1)
    channels, image_size = SIZES[size]
    model = build_model(ModelSpec(name, 10, channels, image_size))
    bounded = BoundedNetwork(model, (channels, *image_size))
    pixels, labels = torch.rand(images, channels, *image_size), torch.arange(images) % 10
    regions = pp.SquarePatch(5).regions(image_size)
    with direct_inference(pixels.device):
        bounded.lowest_margins(pixels[:1], labels[:1], regions)  # what is loaded on the first call
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        taken = seconds(
            partial(bounded.lowest_margins, pixels, labels, regions, memory_budget=budget)
        )
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, taken


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the peak of certification at growing budgets."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for name in arguments.networks:
        for megabytes in (4, 16, 64, 256):
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                peak, taken = pool.submit(
                    _peak, name, "32x32x3", arguments.images, megabytes * 2**20
                ).result()
            rows.append(
                {
                    "benchmark": "memory",
                    "network": f"{name}, 32x32x3",
                    "images": arguments.images,
                    "budget_mib": megabytes,
                    "peak_growth_mib": peak,
                    "seconds": taken,
                }
            )
    return rows


BENCHMARKS = {
    "certify": certify,
    "screening": screening,
    "training": training,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--weights")
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--side", type=int, default=5)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=0.05)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command does, for both
    machine = {"processor": platform.processor(), "torch": torch.__version__, "threads": 1}
    for row in BENCHMARKS[arguments.benchmark](arguments):
        figures = {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in row.items()
        }
        print(json.dumps(figures | machine), flush=True)


if __name__ == "__main__":
    main()
