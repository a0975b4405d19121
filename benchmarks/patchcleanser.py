"""How fast PatchCleanser is, as ratios to the raw throughput of the same model in the same run.

    python benchmarks/patchcleanser.py --weights model.safetensors --data PATH --patch 5
    python benchmarks/patchcleanser.py --weights model.safetensors --data PATH --patch any:1% \
        --shapes 3
    python benchmarks/patchcleanser.py --model timm:resnet18 --data PATH --patch 32

With ``--weights`` it takes a trained classifier and the data set's labels; with ``--model`` a
network as it is built, with one logit raised so that all images are certified; in the mixed set it
gives wrong labels to the images that shall not be.

- raw: images/s of plain forward passes at the batch size that is best for them.
- plain algorithm: all unordered pairs of masks (of several patches, of unions of masks), one pair
  at a time over a batch of 16 images, with no early exit. It is timed on some of the pairs, since
  each costs the same.
- Every ratio is the median over pairs of measurements, one right after the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import patchproof as pp
from patchproof.cli.options import parse_threat
from patchproof.datasets import load_dataset
from patchproof.defenses.inference import model_device
from patchproof.models import ModelSpec, build_model, load_classifier
from patchproof.precision import exact_inference

PLAIN_BATCH = 16
MIXED_SHARE = 0.4


class Sure(nn.Module):
    """A network that is sure of class 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.model(images)
        scores[:, 0] += 1e3
        return scores


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def forward_rate(model: nn.Module, images: Tensor, batch: int, least_seconds: float) -> float:
    """Return images/s of plain forward passes of ``batch`` images."""
    device = model_device(model)
    inputs = images[torch.arange(batch) % len(images)].to(device)
    count, spent = 0, 0.0
    with exact_inference(device):
        while spent < least_seconds or count < 2:
            spent += seconds(lambda: model(inputs), device)
            count += 1
    return count * batch / spent


def best_batch(model: nn.Module, images: Tensor, largest: int) -> int:
    """Return the batch size of the highest raw throughput."""
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if size <= largest]
    forward_rate(model, images, min(8, largest), 0.5)
    return max(sizes, key=lambda size: forward_rate(model, images, size, 0.5))


def plain_rate(defense: pp.PatchCleanser, images: Tensor, least_seconds: float) -> float:
    """Return images/s of the plain algorithm."""
    device = defense.device
    batch = images[torch.arange(PLAIN_BATCH) % len(images)].to(device)
    masked = defense.mask_set.masked().to(device)
    rows, columns = torch.triu_indices(len(masked), len(masked))
    pairs, spent = 0, 0.0
    with exact_inference(device):
        while spent < least_seconds or pairs < 2:
            hidden = masked[rows[pairs % len(rows)]] | masked[columns[pairs % len(rows)]]
            spent += seconds(
                lambda hidden=hidden: defense.model(batch.masked_fill(hidden, defense.fill)), device
            )
            pairs += 1
    return PLAIN_BATCH / (spent / pairs * len(rows))


def repeated(repeats: int, *measures: Callable[[], float]) -> list[list[float]]:
    """Measure all of them, one right after the other, ``repeats`` times."""
    return [[measure() for measure in measures] for _ in range(repeats)]


def middle(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def build(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor | None]:
    """Return the model, images to choose from, and their labels if the model is a trained one."""
    dataset = load_dataset(arguments.data, arguments.split).sample(arguments.candidates, seed=0)
    pixels, labels = dataset.tensors()
    images = pixels.float() / 255
    if arguments.weights:
        return load_classifier(arguments.weights)[0], images, labels
    torch.manual_seed(0)
    classes = len(dataset.class_names)
    spec = ModelSpec(arguments.model, classes, dataset.channels, dataset.image_size)
    return Sure(build_model(spec)).eval(), images, None


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    model, images, labels = build(arguments)
    model = model.to(arguments.device, memory_format=torch.channels_last)
    device = model_device(model)
    size = tuple(images.shape[2:])
    defense = pp.PatchCleanser(
        model,
        parse_threat(arguments.patch, None, "anywhere", size),
        image_size=size,
        masks_per_side=arguments.masks,
        shapes=arguments.shapes,
    )
    best = best_batch(model, images, arguments.largest_batch)
    defense.tune_batch_size(images[0])

    wrong = None
    if labels is None:
        images = images[: arguments.images]
        labels = torch.zeros(len(images), dtype=torch.int64)
        sure = mixed = torch.arange(len(images))
        wrong = (torch.arange(len(images)) < round((1 - MIXED_SHARE) * len(images))).long()
    else:
        result = defense.certify(images, labels)
        sure = result.certified.nonzero().squeeze(1)[: arguments.images]
        others = (~result.certified).nonzero().squeeze(1)
        lost = round((1 - MIXED_SHARE) * arguments.images)
        mixed = torch.cat([others[:lost], sure[: arguments.images - lost]])
    mixed_images = images[mixed]
    mixed_labels = labels[mixed] if wrong is None else wrong

    seen: dict[str, pp.Certification] = {}

    def certify(name: str, some: Tensor, their: Tensor) -> float:
        """Return the seconds it takes."""
        start = time.perf_counter()
        seen[name] = defense.certify(some, their)
        return time.perf_counter() - start

    def predict(groups: Iterable[Tensor]) -> float:
        """Return forwards/s."""
        start = time.perf_counter()
        forwards = sum(int(defense.infer(group).forwards.sum()) for group in groups)
        return forwards / (time.perf_counter() - start)

    raw = partial(forward_rate, model, images, best, arguments.seconds)
    raw_36 = partial(forward_rate, model, images, 36, arguments.seconds)
    plain = partial(plain_rate, defense, images, arguments.seconds)
    sets = {"sure": (images[sure], labels[sure]), "mixed": (mixed_images, mixed_labels)}
    runs = {
        name: repeated(arguments.repeats, partial(certify, name, *pair), raw, plain)
        for name, pair in sets.items()
    }
    batches = mixed_images.split(arguments.predict_batch)
    predict_runs = repeated(arguments.repeats, partial(predict, batches), raw)
    one_runs = repeated(arguments.repeats, partial(predict, images[sure][:8].split(1)), raw_36)

    def rates(name: str) -> tuple[list[float], list[float]]:
        """Return forwards/s over raw ones, and images/s over the plain algorithm's."""
        count, forwards = len(seen[name]), int(seen[name].forwards.sum())
        return (
            [forwards / seconds / raw_rate for seconds, raw_rate, _ in runs[name]],
            [count / seconds / plain_images for seconds, _, plain_images in runs[name]],
        )

    return {
        "model": arguments.weights or arguments.model,
        "data": Path(arguments.data).name,
        "image_size": list(size),
        "patch": defense.threat.label(),
        "masks": len(defense.mask_set),
        "views": defense.views.count,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "repeats": arguments.repeats,
        "images": arguments.images,
        "raw_images_per_second": middle(raw_rate for _, raw_rate, _ in runs["sure"]),
        "raw_batch": best,
        "certify_batch": defense.batch_size,
        "certify_over_raw": middle(rates("sure")[0]),
        "certify_mixed_over_raw": middle(rates("mixed")[0]),
        "forwards_per_certified_image": int(seen["sure"].forwards.max()),
        "mixed_certified_share": middle([float(seen["mixed"].certified.float().mean())]),
        "mixed_forwards_per_image": middle([float(seen["mixed"].forwards.float().mean())]),
        "certified_over_plain": middle(rates("sure")[1]),
        "mixed_over_plain": middle(rates("mixed")[1]),
        "predict_batch": arguments.predict_batch,
        "predict_over_raw": middle(rate / raw_rate for rate, raw_rate in predict_runs),
        "predict_one_over_raw_36": middle(rate / raw_rate for rate, raw_rate in one_runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", help="a classifier that patchproof train made")
    what.add_argument("--model", help="a network as it is built, such as timm:resnet18")
    parser.add_argument("--data", required=True, help="data set, name or path")
    parser.add_argument("--split", default="test")
    parser.add_argument("--patch", required=True, help="as for patchproof certify: 5, 2*3, any:1%%")
    parser.add_argument("--shapes", type=int, help="covering rectangles for any:AREA")
    parser.add_argument("--masks", type=int, default=6, help="per side")
    parser.add_argument("--images", type=int, default=40, help="in each set")
    parser.add_argument("--candidates", type=int, default=200, help="images to choose them from")
    parser.add_argument("--predict-batch", type=int, default=32)
    parser.add_argument("--largest-batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each raw measurement")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="append the result to this JSON-lines file")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
