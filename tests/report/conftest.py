"""Results folders with made-up figures, written by the real writer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchproof.evaluation.store import (
    CERTIFIED,
    FORMAT,
    AttackedGallery,
    Gallery,
    RunFolder,
    read_result,
)
from patchproof.evaluation.summary import summarize, summarize_attack
from patchproof.results import ALERT
from patchproof.threat import MaskSet, SquarePatch
from patchproof.threat.masks import listed_masks

MakeRun = Callable[..., Path]
MakeAttack = Callable[..., Path]


def manifest(
    dataset: str = "mnist",
    side: int = 5,
    size: int = 28,
    budget: int = 6,
    count: int = 40,
    multiplicity: int = 1,
    tau: float | None = None,
    model: dict[str, Any] | None = None,
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
                "model": model
                or {"spec": {"name": "small-resnet"}, "digest": "0123456789abcdef" * 4},
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
        paper_beyond: float = -0.05,
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
                    "paper_condition": bool(read and scores[index] < certified + paper_beyond),
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


@pytest.fixture
def make_attack(tmp_path: Path) -> MakeAttack:
    """Return a function that writes the folder of an attack on a certify run's images."""

    def make(
        run: Path,
        name: str = "attack",
        broken: Sequence[int] = (),
        only: Sequence[int] | None = None,
        right_share: float = 0.0,
        attack: dict[str, Any] | None = None,
        target: int = -1,
        gallery: bool = True,
        **changed: Any,
    ) -> Path:
        certify = read_result(run)
        identity = certify.manifest["identity"]
        settings = {"name": "pgd", "steps": 40, "step_size": 0.05, "places": {"search": "all"}}
        described = {
            "format": FORMAT,
            "identity": identity
            | {"kind": "attack", "attack": settings | (attack or {})}
            | copy.deepcopy(changed),
            "about": certify.manifest["about"],
        }
        rows = []
        for row in certify.examples.to_dict("records"):
            index, label, prediction = row["index"], row["label"], row["prediction"]
            if only is not None and index not in only:
                continue
            hit = index in broken
            rows.append(
                {name: row[name] for name in ("index", "label", "vanilla", "status", "message")}
                | {
                    "prediction": prediction,
                    "case": "wrong" if prediction != label else "broken" if hit else "held",
                    "attacked_prediction": (label + 1) % 10 if hit else prediction,
                    "broken": hit,
                    "target": target,
                    "hit_target": hit and target == (label + 1) % 10,
                    "right_share": right_share if hit else float(prediction == label),
                    "regions": json.dumps([[2, 3, 5, 5]]),
                    "objective": 0.5 if hit else -0.5,
                    "tries": 3 if prediction == label else 0,
                    "forwards": 120,
                    "seconds": 0.25,
                    "smallest_margin": float("nan"),
                }
            )
        path = tmp_path / name
        with RunFolder.open(path, described) as folder:
            folder.append(rows)
            folder.write_summary(summarize_attack(*folder.tables(), 64))
            if gallery:
                chosen = [*broken][:3] + [row["index"] for row in rows if not row["broken"]][:3]
                height, width = identity["image_size"]
                images = np.random.default_rng(3).integers(0, 256, (len(chosen), 1, height, width))
                attacked = images.copy()
                attacked[:, :, 2:7, 3:8] = 255
                folder.write_attacked(
                    AttackedGallery(
                        index=np.array(chosen, dtype=np.int64),
                        image=images.astype(np.uint8),
                        attacked=attacked.astype(np.uint8),
                        broken=np.array([index in broken for index in chosen]),
                    )
                )
        return path

    return make
