"""How much the same pixels' scores differ with the batch they come in, threads and layout.

    python benchmarks/numerics.py --data PATH --weights model.safetensors
    python benchmarks/numerics.py --data PATH --split validation --model timm:resnet50

The default tolerance of the defenses rests on this: a view's decision can only depend on such
differences if its margin is not larger than the largest difference of a margin.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.datasets import load_dataset
from patchproof.models import ModelSpec, build_model, load_classifier
from patchproof.precision import exact_inference


def scores(model: nn.Module, views: Tensor, batch: int) -> Tensor:
    with exact_inference(views.device):
        return torch.cat([model(part) for part in views.split(batch)])


def margins(scores: Tensor) -> Tensor:
    """Return every score less every other, (B, C * C)."""
    return (scores[:, :, None] - scores[:, None, :]).flatten(1)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    dataset = load_dataset(arguments.data, arguments.split).sample(arguments.images, seed=0)
    images = torch.stack([dataset.image(index) for index in range(len(dataset))])
    torch.manual_seed(0)
    if arguments.weights:
        model, _ = load_classifier(arguments.weights)
    else:
        classes = len(dataset.class_names)
        spec = ModelSpec(arguments.model, classes, dataset.channels, dataset.image_size)
        model = build_model(spec)
    model, images = model.to(arguments.device), images.to(arguments.device)
    defense = pp.PatchCleanser(
        model, pp.SquarePatch(arguments.patch), image_size=dataset.image_size, masks_per_side=3
    )
    hidden = defense.views.hidden.pixels().to(images.device)
    views = torch.cat([image.masked_fill(hidden[:, None], 0.5) for image in images])
    threads = torch.get_num_threads()
    reference = margins(scores(model, views, 1))
    largest = {}
    for batch in (2, 7, 36, 128, 512):
        if batch <= arguments.largest_batch:
            largest[f"batch {batch}"] = scores(model, views, batch)
    if arguments.device == "cpu":
        torch.set_num_threads(1 if threads > 1 else 2)
        largest[f"{torch.get_num_threads()} threads, batch 36"] = scores(model, views, 36)
        torch.set_num_threads(threads)
        other = model.to(memory_format=torch.contiguous_format)
        largest["contiguous layout, batch 36"] = scores(other, views, 36)
    return {
        "model": arguments.weights or arguments.model,
        "views": len(views),
        "device": arguments.device,
        "threads": threads,
        "torch": torch.__version__,
        "largest_score": round(float(reference.abs().max()), 2),
        "largest_difference_of_a_margin": {
            name: float(f"{float((margins(value) - reference).abs().max()):.2g}")
            for name, value in largest.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", help="a classifier that patchproof train made")
    what.add_argument("--model", help="a network as it is built, such as timm:resnet50")
    parser.add_argument("--data", required=True, help="data set, name or path")
    parser.add_argument("--split", default="test")
    parser.add_argument("--patch", type=int, default=5, help="side in pixels")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--largest-batch", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
