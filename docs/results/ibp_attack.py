"""Attack networks with interval bounds, first of all where the bounds say that they are weakest.

python docs/results/ibp_attack.py --data DATA/mnist --patch 5 zoo/mnist-ibp-mlp-5x5-*.safetensors

For each image of a sample: projected gradient ascent by signs on the cross-entropy, at the places
of the lowest bounds and at random ones, from random contents and from black and white ones. Success
is checked by the deployed predict. Prints one JSON line a network; fails if a certified image is
broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import patchproof as pp
from patchproof.cli.options import parse_threat
from patchproof.datasets import load_dataset
from patchproof.models import load_classifier


def attacked(
    model: nn.Module, images: Tensor, labels: Tensor, inside: Tensor, starts: Tensor, steps: int
) -> Tensor:
    """Return images (N, C, H, W) with the contents of the patch (N, 1, H, W) that ascent finds."""
    content = starts
    for step in range(steps):
        content = content.detach().requires_grad_()
        loss = functional.cross_entropy(model(torch.where(inside, content, images)), labels)
        (slope,) = torch.autograd.grad(loss, content)
        size = 0.25 if 2 * step < steps else 0.05
        content = (content + size * slope.sign()).clamp(0, 1)
    return torch.where(inside, content.detach(), images)


def attack(path: Path, arguments: argparse.Namespace) -> dict[str, object]:
    model, _ = load_classifier(path)
    data = load_dataset(arguments.data, "test").sample(arguments.count, 0)
    pixels, labels = data.tensors()
    images = pixels / 255
    threat = parse_threat(arguments.patch, None, "anywhere", data.image_size)
    defense = pp.IntervalBoundPropagation(model, threat, image_size=data.image_size)
    result = defense.certify(images, labels, stop="never")
    network = defense._bounded(data.channels)
    regions = threat.regions(data.image_size)
    bounds = network.lowest_margins(images, labels, regions)
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, len(regions), (len(images), arguments.random), generator=generator)
    places = torch.cat([bounds.argsort(1)[:, : arguments.weakest], random], 1)
    right = result.prediction == labels
    broken = ~right
    attacks = 0
    for column in range(places.shape[1]):
        inside = torch.zeros(len(images), 1, *data.image_size, dtype=torch.bool)
        for image, place in enumerate(places[:, column].tolist()):
            for top, left, height, width in regions.parts[place].tolist():
                inside[image, :, top : top + height, left : left + width] = True
        drawn = torch.rand(images.shape, generator=generator)
        for starts in (drawn, drawn.round()):
            found = attacked(model, images, labels, inside, starts, arguments.steps)
            broken |= defense.predict(found) != labels
            attacks += len(images)
    return {
        "weights": path.name,
        "patch": threat.label(),
        "images": len(images),
        "clean": int(right.sum()),
        "certified": int(result.certified.sum()),
        "not_broken": int((~broken).sum()),
        "attacks": attacks,
        "attacks_on_certified": int(result.certified.sum()) * 2 * places.shape[1],
        "certified_and_broken": int((result.certified & broken).sum()),
        "steps": arguments.steps,
        "seed": 0,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", nargs="+", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--patch", required=True)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--weakest", type=int, default=6)
    parser.add_argument("--random", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    lines = [attack(path, given) for path in given.weights]
    for line in lines:
        print(json.dumps(line))
    sys.exit(any(line["certified_and_broken"] for line in lines))
