"""Results folders with made-up figures, written by the real writer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchproof.evaluation.store import FORMAT, Gallery, RunFolder
from patchproof.evaluation.summary import summarize
from patchproof.threat import MaskSet, SquarePatch

MakeRun = Callable[..., Path]


def manifest(
    dataset: str = "mnist",
    side: int = 5,
    size: int = 28,
    budget: int = 6,
    count: int = 40,
    multiplicity: int = 1,
    **about: Any,
) -> dict[str, Any]:
    """Return the manifest of a PatchCleanser run."""
    threat = SquarePatch(side)
    mask_set = MaskSet.for_threat(threat, (size, size), budget, multiplicity)
    return copy.deepcopy(
        {
            "format": FORMAT,
            "identity": {
                "defense": {
                    "type": "PatchCleanser",
                    "threat": threat.to_dict(),
                    "image_size": [size, size],
                    "masks": [list(box) for box in mask_set.boxes],
                    "masks_per_side": [budget, budget],
                    "multiplicity": [multiplicity, multiplicity],
                    "inference": "double",
                    "fill": 0.5,
                    "tolerance": 1e-4,
                },
                "threat": threat.to_dict(),
                "image_size": [size, size],
                "model": {"spec": {"name": "small-resnet"}, "digest": "0123456789abcdef" * 4},
                "dataset": {
                    "name": dataset,
                    "split": "test",
                    "digest": "ab" * 32,
                    "count": count,
                    "indices_digest": "cd" * 32,
                },
                "stop": "first_lost_region",
                "precision": "float32",
                "patchproof": "0.1.0",
            },
            "about": {
                "command": ["patchproof", "certify", "--data", dataset, "--out", "a run"],
                "started": "2024-05-01T12:00:00+00:00",
                "versions": {"python": "3.12.1", "torch": "2.6.0"},
                "device": "CPU, 2 threads",
                "threads": 2,
                "class_names": [f"class-{label}" for label in range(10)],
                "model_card": {"made": {"recipe": "cutout", "epochs": 12}},
                "seed": 0,
                "batch_size": 128,
                **about,
            },
        }
    )


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a results folder and returns its path."""

    def make(
        name: str = "run",
        done: int | None = None,
        corrupt: int = 0,
        finish: bool = True,
        certified: float = 0.5,
        images: np.ndarray[Any, Any] | None = None,
        **values: Any,
    ) -> Path:
        described = manifest(**values)
        count = described["identity"]["dataset"]["count"]
        height, width = described["identity"]["image_size"]
        done = count if done is None else done
        random = np.random.default_rng(7)
        scores = random.permutation(done) / max(done, 1)
        rows = []
        for index in range(done):
            label = index % 10
            read = index >= corrupt
            right = scores[index] < 0.5 + certified / 2
            rows.append(
                {
                    "index": 3 * index,
                    "label": label,
                    "vanilla": label if scores[index] < 0.97 else (label + 1) % 10,
                    "prediction": label if right else (label + 3) % 10,
                    "certified": bool(read and scores[index] < certified),
                    "paper_condition": bool(read and scores[index] < certified - 0.05),
                    "case": "agreed" if scores[index] < 0.9 else "disagreer",
                    "status": "ok" if read else "corrupt",
                    "message": "" if read else f"image {index}: not an image",
                    "forwards": (666 if scores[index] < certified else 120) if read else 0,
                    "seconds": 0.25 if read else 0.0,
                    "smallest_margin": 0.5,
                }
            )
        path = tmp_path / name
        with RunFolder.open(path, described) as folder:
            if rows:
                folder.append(rows)
            if finish:
                examples, timing = folder.tables()
                folder.write_summary(summarize(examples, timing, 128))
                chosen = np.array([3 * index for index in range(corrupt, min(done, corrupt + 6))])
                if images is None:
                    images = random.integers(0, 256, (len(chosen), 1, height, width))
                ramp = np.linspace(0, 1, height * width).reshape(1, height, width)
                lost = ~examples.set_index("index").loc[chosen, "certified"].to_numpy()
                folder.write_gallery(
                    Gallery(
                        index=chosen.astype(np.int64),
                        image=images[: len(chosen)].astype(np.uint8),
                        vulnerability=(lost[:, None, None] * ramp).astype(np.float32),
                    )
                )
        return path

    return make
