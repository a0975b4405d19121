"""Results folders with made-up figures, written by the real writer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchproof.evaluation.store import CERTIFIED, FORMAT, Gallery, RunFolder
from patchproof.evaluation.summary import summarize
from patchproof.results import ALERT
from patchproof.threat import MaskSet, SquarePatch
from patchproof.threat.masks import listed_masks

MakeRun = Callable[..., Path]


def manifest(
    dataset: str = "mnist",
    side: int = 5,
    size: int = 28,
    budget: int = 6,
    count: int = 40,
    multiplicity: int = 1,
    tau: float | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Return the manifest of a PatchCleanser run, or with a tau of a Minority Reports run."""
    threat = SquarePatch(side)
    mask_set = MaskSet.for_threat(threat, (size, size), budget, multiplicity)
    return copy.deepcopy(
        {
            "format": FORMAT,
            "identity": {
                "kind": "recovery" if tau is None else "detection",
                "defense": {
                    "type": "PatchCleanser" if tau is None else "MinorityReports",
                    "threat": threat.to_dict(),
                    "image_size": [size, size],
                    "masks": listed_masks(mask_set.masks),
                    "masks_per_side": [budget, budget],
                    "multiplicity": [multiplicity, multiplicity],
                    **({"inference": "double"} if tau is None else {"tau": tau}),
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
        tau = values.get("tau")
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
            kept = bool(read and scores[index] < certified)
            if tau is None:
                prediction = label if right else (label + 3) % 10
                promise = {
                    "certified": kept,
                    "paper_condition": bool(read and scores[index] < certified - 0.05),
                }
            else:
                alert = -np.inf if right else tau + (1 - tau) * scores[index]
                prediction = label if right else ALERT
                promise = {
                    "certified_detection": kept,
                    "unmasked": label,
                    "alert_threshold": alert,
                    "certified_above": alert,
                    "certified_threshold": tau + (1 - tau) * scores[index] if kept else -np.inf,
                }
            rows.append(
                promise
                | {
                    "index": 3 * index,
                    "label": label,
                    "vanilla": label if scores[index] < 0.97 else (label + 1) % 10,
                    "prediction": prediction,
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
                kind = described["identity"]["kind"]
                folder.write_summary(summarize(examples, timing, 128, kind))
                chosen = np.array([3 * index for index in range(corrupt, min(done, corrupt + 6))])
                if images is None:
                    images = random.integers(0, 256, (len(chosen), 1, height, width))
                ramp = np.linspace(0, 1, height * width).reshape(1, height, width)
                lost = ~examples.set_index("index").loc[chosen, CERTIFIED[kind]].to_numpy()
                folder.write_gallery(
                    Gallery(
                        index=chosen.astype(np.int64),
                        image=images[: len(chosen)].astype(np.uint8),
                        vulnerability=(lost[:, None, None] * ramp).astype(np.float32),
                    )
                )
        return path

    return make
