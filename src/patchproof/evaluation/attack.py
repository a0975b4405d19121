"""Attack a data set: one call from a defense, an attack and images to a results folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from patchproof.attacks import AttackResult, PatchAttack, Victim
from patchproof.attacks.victim import Attackable, draws_predictions
from patchproof.datasets import CorruptImageError, ImageDataset
from patchproof.errors import PatchproofError, RunError
from patchproof.evaluation.certifier import Described
from patchproof.evaluation.provenance import check_fit, how_made, identity, logits
from patchproof.evaluation.sandwich import check_comparable
from patchproof.evaluation.store import (
    FORMAT,
    AttackedGallery,
    Result,
    Row,
    RunFolder,
    empty_row,
    read_attacked,
)
from patchproof.evaluation.summary import AttackSummary, summarize_attack
from patchproof.models import ModelSpec
from patchproof.results import ALERT
from patchproof.threat import SparsePixels

Knowledge = Literal["defense", "model"]
"""What the attacker knows: all of the defense, or the undefended model alone."""

BLOCK = 32
"""Images that are attacked together, and written together."""
REPEATS = 1000
"""Predictions of an attacked image where they are drawn at random."""

_log = logging.getLogger(__name__)


class AttackedDefense(Described, Attackable, Protocol):
    """A defense of this library, certified or not."""


@dataclass(frozen=True)
class AttackProgress:
    """How a run goes.

    Attributes:
        done: images with a result, those of earlier sessions included.
        total: images of the data set.
        under_attack: images of the current block that are still tried.
        right: images done so far whose clean prediction is right.
        broken: images done so far that were broken.
        images_per_second: in this session.
    """

    done: int
    total: int
    under_attack: int
    right: int
    broken: int
    images_per_second: float

    @property
    def seconds_left(self) -> float:
        """At the rate of this session; infinite before its first block."""
        left = self.total - self.done
        return left / self.images_per_second if self.images_per_second else float("inf")


def attack_dataset(
    defense: AttackedDefense,
    dataset: ImageDataset,
    attack: PatchAttack,
    out: Path | str,
    *,
    knowledge: Knowledge = "defense",
    target: int | None = None,
    gallery: int = 12,
    against: Result | None = None,
    spec: ModelSpec | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[AttackProgress], None] | None = None,
) -> AttackSummary:
    """Attack every image of a data set within the defense's threat and write a results folder.

    Finished images are written block by block. A run that was stopped, whatever stopped it, goes on
    when it is called again with the same arguments, and ends with the same table of examples (but
    of a defense that draws its predictions in secret).

    Args:
        defense: any of this library, certified or not.
        dataset: N labelled images of the defense's size.
        attack: how.
        out: the results folder; it is made, must be empty, or hold the same run.
        knowledge: ``"defense"``: the attacker follows what the defense's ``surrogates`` say, and
            tries again until the deployed ``predict`` is wrong. ``"model"``: the attacker attacks
            the undefended model, knows of no defense, and the defense sees what came of it.
        target: the class that the attacker wants; images of that class are attacked without a
            target. None for any wrong class.
        gallery: how many attacked images to keep to look at, half of them broken.
        against: a run that certifies what is attacked, as must be before the attack begins.
        spec: what the model was built from; with it the run names the model exactly.
        about: more for the manifest's record of how the run was made, such as the command.
        progress: called at the start and as the attack goes on.

    Returns:
        The accuracies and the cost.

    Raises:
        PatchproofError: the data set does not fit the defense, the target is no class, the attack
            needs what the defense has not or is not for its threat, ``against`` is about something
            else, or the folder holds something else.
        RunError: the folder cannot be written, or no image could be read.
    """
    if knowledge not in (known := get_args(Knowledge)):
        raise PatchproofError(f"knowledge: expected {' or '.join(known)}, got {knowledge!r}")
    check_fit(defense, dataset)
    classes = logits(defense, torch.zeros(1, dataset.channels, *dataset.image_size)).shape[1]
    if target is not None and not 0 <= target < classes:
        raise PatchproofError(f"target: expected a class from 0 to {classes - 1}, got {target}")
    if knowledge == "defense":
        victim = Victim.of_defense(defense)
    else:
        victim = Victim.of_undefended(defense.model, defense.device)
    if attack.needs_scores or attack.aims is not None:
        victim.aims(attack.aims)
    attack.check(defense.threat, (dataset.channels, *dataset.image_size))
    repeats = REPEATS if draws_predictions(defense) else 1
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "identity": {
            "kind": "attack",
            **identity(defense, dataset, spec),
            "attack": {
                **attack.to_dict(),
                "knowledge": knowledge,
                "target": target,
                "repeats": repeats,
            },
        },
        "about": {**how_made(defense, dataset), **dict(about or {})},
    }
    if against is not None:
        check_comparable(against, manifest["identity"])
    with RunFolder.open(Path(out), manifest) as folder:
        run = _Run(folder, defense, dataset, victim, attack, target, repeats, gallery, progress)
        for start in range(0, len(dataset), BLOCK):
            run.attack_block(range(start, min(start + BLOCK, len(dataset))))
        examples, timing = folder.tables()
        if len(examples) != len(dataset):
            raise RunError(f"expected results of {len(dataset)} images, got {len(examples)}")
        summary = summarize_attack(examples, timing, attack.batch_size)
        folder.write_summary(summary)
    return summary


class _Run:
    """Attacks blocks of images and writes what came of them."""

    def __init__(
        self,
        folder: RunFolder,
        defense: AttackedDefense,
        dataset: ImageDataset,
        victim: Victim,
        attack: PatchAttack,
        target: int | None,
        repeats: int,
        gallery: int,
        progress: Callable[[AttackProgress], None] | None,
    ) -> None:
        self._folder = folder
        self._defense = defense
        self._dataset = dataset
        self._attack = attack
        self._target = target
        self._repeats = repeats
        self._gallery = gallery
        self._progress = progress
        self._victim = victim
        self._forwards = 0
        for surrogate in victim.surrogates.values():
            surrogate.register_forward_pre_hook(self._count)
        examples, _ = folder.tables()
        self._finished = set(examples["index"].tolist())
        self._right = int((examples["prediction"] == examples["label"]).sum())
        self._broken = int(examples["broken"].sum())
        self._earlier, self._started = len(examples), time.perf_counter()
        self._tell(0)

    def attack_block(self, block: range) -> None:
        """Attack the images at these positions, unless that is done."""
        if all(int(self._dataset.indices[position]) in self._finished for position in block):
            return
        started, self._forwards = time.perf_counter(), 0
        rows: list[Row] = []
        images: dict[int, Tensor] = {}
        for position in block:
            try:
                images[position] = self._dataset.image(position)
            except CorruptImageError as error:
                _log.warning("%s", error)
                rows.append(self._row(position) | {"status": "corrupt", "message": str(error)})
        if images:
            rows += self._attacked(list(images), torch.stack(list(images.values())))
        seconds = (time.perf_counter() - started) / max(1, len(images))
        shares = {"forwards": self._forwards // max(1, len(images)), "seconds": seconds}
        self._folder.append([row | shares for row in rows])
        self._finished.update(row["index"] for row in rows)
        self._right += sum(row["prediction"] == row["label"] for row in rows)
        self._broken += sum(row["broken"] for row in rows)
        self._tell(0)

    def _attacked(self, positions: list[int], images: Tensor) -> list[Row]:
        labels = self._dataset.labels[positions]
        indices = self._dataset.indices[positions]
        if self._target is None:
            targets = torch.full_like(labels, -1)
        else:
            targets = torch.where(labels == self._target, -1, self._target)
        rows: dict[int, Row] = {}
        undefended = logits(self._defense, images).argmax(1).tolist()
        clean = self._defense.predict(images.to(self._defense.device)).cpu().tolist()
        for group in (targets < 0, targets >= 0):
            chosen = group.nonzero().squeeze(1)
            if not len(chosen):
                continue
            result = self._attack.run(
                self._victim,
                images[chosen],
                labels[chosen],
                threat=self._defense.threat,
                indices=indices[chosen],
                targets=None if targets[chosen[0]] < 0 else targets[chosen],
                progress=self._tell,
            )
            after = self._defense.predict(result.images).cpu()
            shares = self._right_shares(result.images, labels[chosen], after)
            boxes = self._boxes(result)
            for number, place in enumerate(chosen.tolist()):
                label, prediction = int(labels[place]), clean[place]
                attacked = int(after[number])
                lost = attacked not in (label, ALERT)
                if self._repeats > 1:  # one answer of many
                    lost = float(shares[number]) < 0.5
                broken = prediction == label and lost
                rows[place] = self._row(positions[place]) | {
                    "vanilla": undefended[place],
                    "prediction": prediction,
                    "attacked_prediction": attacked,
                    "broken": broken,
                    "target": int(targets[place]),
                    "hit_target": bool(result.tries[number] > 0)
                    and attacked == int(targets[place]) >= 0,
                    "right_share": float(shares[number]),
                    "regions": json.dumps(boxes[number]),
                    "objective": float(result.objective[number]),
                    "tries": int(result.tries[number]),
                    "case": "wrong" if prediction != label else "broken" if broken else "held",
                }
            self._keep_to_look_at(
                images[chosen],
                result.images,
                [rows[place] for place in chosen.tolist()],
            )
        return [rows[place] for place in sorted(rows)]

    def _right_shares(self, images: Tensor, labels: Tensor, predictions: Tensor) -> Tensor:
        if not draws_predictions(self._defense):
            return (predictions == labels).double()
        drawn = self._defense.repeated_predictions(images, self._repeats)
        return (drawn == labels[:, None]).double().mean(1)

    def _boxes(self, result: AttackResult) -> list[list[list[int]]]:
        """Return the boxes (top, left, height, width) around each image's patches or pixels."""
        threat = self._defense.threat
        width = self._dataset.image_size[1]
        if isinstance(threat, SparsePixels):
            return [
                [[place // width, place % width, 1, 1] for place in places if place >= 0]
                for places in result.places.tolist()
            ]
        regions = threat.regions(self._dataset.image_size)
        return [
            [list(regions.box(place)) for place in places if place >= 0]
            for places in result.places.tolist()
        ]

    def _keep_to_look_at(self, images: Tensor, attacked: Tensor, rows: list[Row]) -> None:
        """Keep the first broken images and the first that held, half of the gallery each."""
        kept = read_attacked(self._folder.path)
        broken = [] if kept is None else kept.broken.tolist()
        known = set() if kept is None else set(kept.index.tolist())
        chosen = []
        for number, row in enumerate(rows):
            share = (self._gallery + row["broken"]) // 2
            full = broken.count(row["broken"]) >= share
            if not (full or row["case"] == "wrong" or row["index"] in known):
                chosen.append(number)
                broken.append(row["broken"])
        if not chosen:
            return
        added = AttackedGallery(
            np.array([rows[number]["index"] for number in chosen]),
            _eight_bit(images[chosen]),
            _eight_bit(attacked[chosen]),
            np.array([rows[number]["broken"] for number in chosen]),
        )
        self._folder.write_attacked(added if kept is None else kept.joined(added))

    def _row(self, position: int) -> Row:
        return empty_row("attack") | {
            "status": "ok",
            "index": int(self._dataset.indices[position]),
            "label": int(self._dataset.labels[position]),
        }

    def _count(self, _: object, inputs: tuple[Any, ...]) -> None:
        self._forwards += len(inputs[0])

    def _tell(self, under_attack: int) -> None:
        if self._progress is None:
            return
        done = len(self._finished)
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        self._progress(
            AttackProgress(
                done=done,
                total=len(self._dataset),
                under_attack=under_attack,
                right=self._right,
                broken=self._broken,
                images_per_second=(done - self._earlier) / elapsed,
            )
        )


def _eight_bit(images: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray((images.cpu() * 255).round().to(torch.uint8))
