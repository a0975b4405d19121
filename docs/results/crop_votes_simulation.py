"""Check the stated probabilities of random crops by simulation, on the votes of real images.

python docs/results/crop_votes_simulation.py docs/results/crops-cifar10/recordings/DIGEST

Of images that the label wins on, drawn with a seed, those with a stated probability from 0.5 to
0.9999: at the worst place of a 5x5 patch, every crop that meets it votes for the runner-up. Fresh
draws of 128 of the 529 crops are then counted; a draw is right if the label has strictly the most
votes. One JSON line for draws with replacement, one for draws without.
``least_chance_times_images`` is the p-value, after Bonferroni, of the image for which the stated
probability is most in doubt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor
from torch.nn import functional

from patchproof import SquarePatch
from patchproof.aggregation.crop_draws import ChanceTable, success_probability
from patchproof.aggregation.crop_votes import Votes
from patchproof.evaluation.feature_recording import FeatureRecording
from patchproof.views.crops import CropViews

CROPS, CLASSES = 128, 10


def attacked(
    labels: Tensor, label: int, patterns: Tensor, chance: ChanceTable
) -> tuple[float, Tensor]:
    """Return the stated probability of an image, and the votes of the worst attack, (V,)."""
    one_hot = functional.one_hot(labels, CLASSES)
    corrupted = (patterns.float() @ one_hot.float()).long()  # (P, C)
    votes = Votes(one_hot.sum(0)[None], torch.zeros(1, dtype=torch.int64), corrupted.T[None])
    stated = success_probability(votes, torch.tensor([label]), len(labels), chance)[0]
    worst = int(stated.argmin())
    benign = votes.benign()[0, :, worst].index_fill(0, torch.tensor([label]), -1)
    return float(stated[worst]), torch.where(patterns[worst], benign.argmax(), labels)


def rightness(labels: Tensor, label: int, drawn: Tensor) -> float:
    """Return the share of draws (D, n) in which a label has strictly the most votes."""
    counts = functional.one_hot(labels[drawn], CLASSES).sum(1)
    own = counts[:, label].clone()
    counts[:, label] = -1
    return float((own > counts.amax(1)).double().mean())


def main() -> None:
    """Simulate, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--images", type=int, default=10_000, help="of the recording")
    parser.add_argument("--chosen", type=int, default=300, help="images to simulate")
    parser.add_argument("--draws", type=int, default=2000, help="of each image")
    parser.add_argument("--seed", type=int, default=0, help="of images and draws")
    arguments = parser.parse_args()
    recording = FeatureRecording.read(arguments.recording, arguments.images)
    parts = [(part.outputs.labels, part.right) for part in recording.parts()]
    labels, right = (torch.cat(column) for column in zip(*parts, strict=True))
    views = CropViews((32, 32), 10)
    patterns = views.corruption(SquarePatch(5)).patterns
    generator = np.random.default_rng(arguments.seed)
    for replacement in (True, False):
        chance = ChanceTable(views.count, CROPS, replacement)
        stated, found = [], []
        for image in generator.permutation(len(labels)).tolist():
            promise, votes = attacked(labels[image], int(right[image]), patterns, chance)
            if 0.5 <= promise <= 0.9999:
                drawn = views.places.draw(arguments.draws, CROPS, replacement, generator)
                stated.append(promise)
                found.append(rightness(votes, int(right[image]), drawn))
            if len(stated) == arguments.chosen:
                break
        promised, came = torch.tensor(stated), torch.tensor(found)
        # How likely it is that a draw of the stated probability is right no more often than found.
        chances = binom.cdf((came * arguments.draws).round(), arguments.draws, promised)
        outcome = {
            "replacement": replacement,
            "images": len(stated),
            "draws": arguments.draws,
            "stated": float(promised.mean()),
            "found": float(came.mean()),
            "most_stated_above_found": float((promised - came).max()),
            "least_chance_times_images": float(min(chances) * len(stated)),
        }
        print(json.dumps({name: round(v, 4) for name, v in outcome.items()}))


if __name__ == "__main__":
    main()
