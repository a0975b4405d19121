"""How fast PatchGuard's certificates are, as ratios to plain code and to the network itself.

    python benchmarks/patchguard.py masking
    python benchmarks/patchguard.py share --data PATH
    python benchmarks/patchguard.py ablation --data PATH --weights band.safetensors

- masking: certification of random local logits by robust masking (T = 0, 6x6 windows), batched,
  against Algorithm 2 as a loop over windows in NumPy, one image at a time: for each window the
  upper bounds of all classes, and the label's evidence in every window that overlaps it.
- share: what the aggregation of BagNet-17's local logits takes at 224x224, as a share of the
  network's forward pass, in ``predict`` and in ``certify``.
- ablation: views/s of de-randomized smoothing, whole, against raw forward passes of the same
  network on bands at the batch size that is best for them.

Every ratio is the median over pairs of measurements, one right after the other, on one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring import pairs
from torch import Tensor

import patchproof as pp
from patchproof.aggregation import Logits, RobustMasking, Windows
from patchproof.datasets import load_dataset
from patchproof.models import Kept, ModelSpec, build_model, load_classifier
from patchproof.precision import exact_inference
from patchproof.results import Outputs, Verdict


def recorded(scores: Tensor) -> Outputs:
    """Return outputs that know all scores, (N, V, C)."""
    images, views, classes = scores.shape
    outputs = Outputs.empty(images, views, classes, keep_scores=True)
    places = torch.arange(views).expand(images, -1)
    outputs.record(torch.arange(images)[:, None].expand_as(places), places, scores)
    return outputs


def plain_certificate(logits: np.ndarray, label: int, window: int) -> bool:
    """Algorithm 2 of PatchGuard at T = 0 for local logits (h, w, C), as a loop over windows."""
    evidence = np.clip(logits, 0.0, None)
    height, width = (length - window + 1 for length in evidence.shape[:2])
    inside = np.zeros((height, width, evidence.shape[2]))
    for row in range(height):
        for column in range(width):
            inside[row, column] = evidence[row : row + window, column : column + window].sum((0, 1))
    total = evidence.sum((0, 1))
    others = np.arange(len(total)) != label
    certified = True
    for row in range(height):
        for column in range(width):
            upper = (total - inside[row, column])[others].max()
            left = evidence[:, :, label].copy()
            left[row : row + window, column : column + window] = 0.0
            sums = inside[:, :, label].copy()
            for r in range(max(0, row - window + 1), min(height, row + window)):
                for c in range(max(0, column - window + 1), min(width, column + window)):
                    sums[r, c] = left[r : r + window, c : c + window].sum()
            certified &= bool(upper <= left.sum() - sums.max())
    return certified


def masking(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time certification against the loop, and check that the verdicts are equal."""
    rows = []
    for side, classes, images in ((24, 10, arguments.images), (26, 1000, arguments.images // 8)):
        windows = Windows((side, side), (6, 6))
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(images, side * side, classes, generator=generator)
        for name, lead in (("all classes alike", 0.0), ("label ahead", 3.0)):
            led = scores.clone()
            led[..., 0] += lead
            outputs, labels = recorded(led), torch.zeros(images, dtype=torch.int64)
            aggregation = RobustMasking(windows, Logits(), tolerance=0.0)
            plain = led[:1].view(side, side, classes).double().numpy()
            verdict = aggregation.certify(outputs, labels, windows.members)
            assert bool((verdict[0] == Verdict.HOLDS).all()) == plain_certificate(plain, 0, 6)
            times = pairs(
                arguments.repeats,
                partial(aggregation.certify, outputs, labels, windows.members),
                partial(plain_certificate, plain, 0, 6),
            )
            rows.append(
                {
                    "benchmark": "masking",
                    "logits": f"{side}x{side}x{classes}",
                    "case": name,
                    "ms_per_image": times["ours"] / images * 1e3,
                    "ms_per_image_plain": times["theirs"] * 1e3,
                    "times_faster": times["ratio"] * images,
                }
            )
    return rows


def share(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the aggregation of BagNet-17 at 224x224 against its forward pass."""
    model = build_model(ModelSpec("bagnet17", arguments.classes, 3, (224, 224)))
    dataset = load_dataset(arguments.data, arguments.split).sample(4, seed=0)
    images = dataset.tensors()[0].float() / 255
    defense = pp.PatchGuard(model, pp.SquarePatch(32), image_size=(224, 224))
    with exact_inference(defense.device):
        logits = model.local_logits(images)
    outputs = recorded(logits.flatten(2).transpose(1, 2))
    labels, _ = defense.aggregation.predict(outputs)
    patterns = defense.corruption.patterns

    def forward() -> None:
        with exact_inference(defense.device):
            model(images)

    def certify() -> None:
        fresh = recorded(logits.flatten(2).transpose(1, 2))
        defense.aggregation.predict(fresh)
        defense.aggregation.certify(fresh, labels, patterns)
        defense.aggregation.paper_condition(fresh, labels, patterns)

    def predict() -> None:
        defense.aggregation.predict(recorded(logits.flatten(2).transpose(1, 2)))

    rows = []
    for name, work in (("predict", predict), ("certify", certify)):
        times = pairs(arguments.repeats, work, forward)
        rows.append(
            {
                "benchmark": "share",
                "classes": arguments.classes,
                "of": name,
                "ms_per_image": times["ours"] / len(images) * 1e3,
                "ms_per_image_forward": times["theirs"] / len(images) * 1e3,
                "share": 1 / times["ratio"],
            }
        )
    return rows


def ablation(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time de-randomized smoothing against raw forward passes on bands."""
    model, _ = load_classifier(arguments.weights)
    dataset = load_dataset(arguments.data, arguments.split).sample(arguments.images, seed=0)
    pixels, labels = dataset.tensors()
    images, size = pixels.float() / 255, dataset.image_size
    defense = pp.DerandomizedSmoothing(model, pp.SquarePatch(5), image_size=size)
    defense.tune_batch_size(images[0])
    batch = defense.batch_size or 1
    corners = torch.zeros(batch, 1, 2, dtype=torch.int64)
    kept = Kept(corners, model.ablation.block(size))
    inputs = images[torch.arange(batch) % len(images)]
    views = defense.views.count * len(images)

    def raw() -> None:
        with exact_inference(defense.device):
            for _ in range(views // batch):
                model.ablated(inputs, kept)

    rows = []
    for name, work in (
        ("predict", lambda: defense.predict(images)),
        ("certify", lambda: defense.certify(images, labels)),
    ):
        times = pairs(arguments.repeats, work, raw)
        rows.append(
            {
                "benchmark": "ablation",
                "of": name,
                "batch_size": batch,
                "views_per_second": views / times["ours"],
                "views_per_second_raw": views // batch * batch / times["theirs"],
                "over_raw": times["ratio"] * views / (views // batch * batch),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("benchmark", choices=["masking", "share", "ablation"])
    parser.add_argument("--data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--weights")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = {"processor": platform.processor(), "torch": torch.__version__, "threads": 1}
    for row in {"masking": masking, "share": share, "ablation": ablation}[arguments.benchmark](
        arguments
    ):
        figures = {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in row.items()
        }
        print(json.dumps(figures | machine), flush=True)


if __name__ == "__main__":
    main()
