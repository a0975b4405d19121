"""Images to look at: which ones, and where a patch could still win on them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from patchproof.datasets import ImageDataset
from patchproof.evaluation.certifier import Certifier
from patchproof.evaluation.store import CERTIFIED, Gallery
from patchproof.results import Kind


def choose_images(examples: pd.DataFrame, count: int, kind: Kind = "recovery") -> list[int]:
    """Choose images to look at: certified ones, right but not certified ones, wrong ones.

    Each group gets a third of ``count``, or what others have no images for, spread evenly over the
    data set.

    Args:
        examples: one row an image, by ascending index.
        count: how many images at most.
        kind: what the run's certificates promise.

    Returns:
        Their indices, group after group.
    """
    read = examples[examples["status"] == "ok"]
    right = read["prediction"] == read["label"]
    certified = read[CERTIFIED[kind]]
    groups = [
        read.loc[rows, "index"].to_numpy()
        for rows in (certified, right & ~certified, ~right & ~certified)
    ]
    shares = [0] * len(groups)
    for _ in range(min(count, len(read))):
        hungriest = min(
            (group for group in range(len(groups)) if shares[group] < len(groups[group])),
            key=lambda group: shares[group],
        )
        shares[hungriest] += 1
    return [
        int(group[place])
        for group, share in zip(groups, shares, strict=True)
        for place in np.linspace(0, len(group) - 1, share).round().astype(int)
    ]


def make_gallery(defense: Certifier, dataset: ImageDataset, chosen: list[int]) -> Gallery:
    """Certify the images with these indices at every patch region, for their maps."""
    position_of = {index: position for position, index in enumerate(dataset.indices.tolist())}
    positions = [position_of[index] for index in chosen]
    images = torch.stack([dataset.image(position) for position in positions])
    certification = defense.certify(images, dataset.labels[positions], stop="never")
    return Gallery(
        index=np.array(chosen, dtype=np.int64),
        image=(images * 255).round().to(torch.uint8).numpy(),
        vulnerability=certification.vulnerability_map().numpy(),
    )
