"""What every patch attack keeps to: one contract, checked, and success as ``predict`` has it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self, final, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.attacks.places import (
    PlaceSearch,
    images_at_once,
    margins,
    place_boxes,
    place_pixels,
)
from patchproof.attacks.victim import Victim
from patchproof.defenses.checks import check_images, check_labels
from patchproof.errors import PatchproofError
from patchproof.results import ALERT
from patchproof.threat import SparsePixels, Threat

Loss = Literal["margin", "cross-entropy"]
"""What is ascended: the lead of the best wrong class (of the target), or the cross-entropy."""

CLEAR_LEAD = 1e-3
"""A lead in the scores that is no larger may be rounding, and no attack stops at it."""

_ROWS = 256
"""Tries (an image, a place and a restart each) that are optimised together by default."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Tries that are optimised together: a row is an image, a place and a restart.

    Attributes:
        images: (B, C, H, W), clean.
        inside: (B, 1, H, W) bool, the pixels that may change.
        boxes: (B, P, 4) int64, the smallest box (top, left, height, width) around each patch.
        labels: (B,) int64.
        targets: (B,) int64, the classes to reach; None for any wrong one.
        scores: from images to scores (B, classes); None where labels are all that is known.
        predict: from images to the victim's labels, (B,) int64.
        seeds: (B,) int64, of each row's random numbers.
        step_loss: which loss ``loss`` is.
    """

    images: Tensor
    inside: Tensor
    boxes: Tensor
    labels: Tensor
    targets: Tensor | None
    scores: nn.Module | None
    predict: Callable[[Tensor], Tensor]
    seeds: Tensor
    step_loss: Loss = "margin"

    def select(self, rows: Tensor) -> Self:
        """Return some of the rows, by (n,) indices."""
        return replace(
            self,
            images=self.images[rows],
            inside=self.inside[rows],
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            targets=None if self.targets is None else self.targets[rows],
            seeds=self.seeds[rows.to(self.seeds.device)],
        )

    def paste(self, content: Tensor) -> Tensor:
        """Return the images with the content, (B, C, H, W), where it may be."""
        return torch.where(self.inside, content, self.images)

    def objective(self, scores: Tensor) -> Tensor:
        """Return by how much the attacker leads, (B,): of scores (B, classes), more than 0 wins."""
        if self.targets is None:
            return margins(scores, self.labels)
        return -margins(scores, self.targets)

    @torch.no_grad()
    def lead(self, images: Tensor) -> Tensor:
        """Return the objective of images, (B,), without gradients.

        Where labels are all that is known it is 1 for a success and -1 for none.
        """
        if self.scores is not None:
            return self.objective(self.scores(images))
        labels = self.predict(images).to(self.labels.device)
        return 2.0 * succeeds(labels, self.labels, self.targets).float() - 1.0

    def loss(self, scores: Tensor) -> Tensor:
        """Return what is ascended, (B,)."""
        if self.step_loss == "margin":
            return self.objective(scores)
        if self.targets is None:
            return functional.cross_entropy(scores, self.labels, reduction="none")
        return -functional.cross_entropy(scores, self.targets, reduction="none")

    def uniform(self) -> Tensor:
        """Return random numbers in [0, 1) that depend on each row's seed alone, (B, C, H, W)."""
        shape = tuple(self.images.shape[1:])
        drawn = [
            np.random.default_rng((seed, 2)).random(shape, dtype=np.float32)
            for seed in self.seeds.tolist()
        ]
        return torch.from_numpy(np.stack(drawn)).to(self.images.device)


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack found, its worst try of each image.

    Attributes:
        images: (N, C, H, W), attacked; the clean image where it was not attacked.
        clean_prediction: (N,) int64, of the clean images.
        prediction: (N,) int64, of ``images``.
        broken: (N,) bool: right on the clean image; on the attacked one neither right nor an alert.
        hit_target: (N,) bool: the attacked image gets the target's label; False without targets.
        places: (N, P) int64, where the patches are, as of ``PlaceSearch``; -1 where not attacked.
        inside: (N, H, W) bool, the pixels that might change.
        objective: (N,) float64, by how much the attacker leads in the surrogate's scores; NaN where
            not attacked.
        tries: (N,) int64, places and restarts that were tried.
    """

    images: Tensor
    clean_prediction: Tensor
    prediction: Tensor
    broken: Tensor
    hit_target: Tensor
    places: Tensor
    inside: Tensor
    objective: Tensor
    tries: Tensor


@dataclass(frozen=True, kw_only=True)
class PatchAttack(ABC):
    """An attack on images with patches of any threat, at places that ``places`` chooses.

    Images that the victim gets wrong already are left as they are. Others are tried, place by
    place and restart by restart, until a try succeeds: the victim's own ``predict`` returns
    neither the label nor an alert (with targets: the target). A restart goes through all aims, and
    with each through all places. The batches mix images and places.

    Attributes:
        places: where the patch goes.
        restarts: tries at each place with each aim, each from another start.
        aims: names of the victim's surrogates to take in turn; None for all of them.
        loss: what is ascended.
        seed: of everything that is random; with it and its index an image has its own numbers.
        batch_size: tries that are optimised together; fewer where images are large, or a surrogate
            takes several ``forwards`` for each.

    Raises:
        PatchproofError: numbers out of range.
    """

    places: PlaceSearch = field(default_factory=PlaceSearch)
    restarts: int = 1
    aims: tuple[str, ...] | None = None
    loss: Loss = "margin"
    seed: int = 0
    batch_size: int = _ROWS

    name: ClassVar[str]
    """What the attack is called, in tables and on the command line."""
    needs_scores: ClassVar[bool] = True
    """Whether it needs scores of a surrogate, or can do with labels."""
    optimises: ClassVar[bool] = True
    """Whether it looks for contents, which another aim or restart may make others."""

    def __post_init__(self) -> None:
        if self.loss not in (known := get_args(Loss)):
            raise PatchproofError(f"loss: expected {' or '.join(known)}, got {self.loss!r}")
        for name, number, least in (
            ("restarts", self.restarts, 1),
            ("batch_size", self.batch_size, 1),
            ("seed", self.seed, 0),
        ):
            if not isinstance(number, int) or number < least:
                raise PatchproofError(f"{name}: expected a number from {least}, got {number!r}")

    @abstractmethod
    def optimise(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Search for the contents of each row's patch.

        Returns:
            The attacked images, (B, C, H, W), the best of each row; and by how much the attacker
            leads there, (B,), by ``problem.objective``.
        """

    def check(self, threat: Threat, shape: tuple[int, ...]) -> None:
        """Raise ``PatchproofError`` unless it can attack images of a shape within a threat.

        Args:
            threat: what the attacker may do.
            shape: (C, H, W) of the images.
        """
        threat.regions((shape[1], shape[2]))

    def to_dict(self) -> dict[str, Any]:
        """Return all that decides what the attack finds, as JSON values."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        aims = None if self.aims is None else list(self.aims)
        return {"name": self.name, **values, "places": self.places.to_dict(), "aims": aims}

    @final
    def run(
        self,
        victim: Victim,
        images: Tensor,
        labels: Tensor,
        *,
        threat: Threat,
        indices: Tensor | None = None,
        targets: Tensor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> AttackResult:
        """Attack N images.

        Args:
            victim: what is attacked.
            images: (N, C, H, W) float32 in [0, 1].
            labels: (N,) integers, the right classes.
            threat: what the attacker may do, in the pixels of the images.
            indices: (N,) integers that name the images, for their random numbers; by default 0 to
                N - 1.
            targets: (N,) integers, the classes to reach, other than the labels; None for any wrong
                one.
            progress: called with the number of images still under attack.

        Raises:
            PatchproofError: images, labels or targets of another shape, type or range, or a victim
                without what the attack needs.
        """
        size = (images.shape[-2], images.shape[-1]) if images.ndim >= 2 else (0, 0)
        check_images(images, size)
        self.check(threat, (images.shape[1], *size))
        images, labels = images.to(victim.device), check_labels(labels, len(images))
        if targets is not None:
            targets = check_labels(targets, len(images))
            if (targets == labels).any():
                raise PatchproofError("targets: expected wrong classes, got the label of an image")
        numbers = (
            torch.arange(len(images)) if indices is None else check_labels(indices, len(images))
        )
        seeds = torch.tensor(
            [_seed(self.seed, number) for number in numbers.tolist()], dtype=torch.int64
        )
        aims: list[nn.Module | None] = [None]
        if self.needs_scores or victim.surrogates or self.aims:
            aims = [*victim.aims(self.aims)]
        if not self.optimises:
            aims = aims[:1]
        clean = victim.predict(images).cpu()
        found = _Found.start(images, clean, threat)
        waiting = (clean == labels).nonzero().squeeze(1)
        if not len(waiting):
            return found.result(labels, targets)
        self._redraw(aims[0], 0)
        places = self.places.choose(
            threat,
            aims[0],
            images[waiting],
            labels[waiting].to(images.device),
            seeds[waiting],
            self._open_regions(victim, threat, images[waiting], labels[waiting]),
        )
        chosen = torch.full((len(images), *places.shape[1:]), -1)
        chosen[waiting] = places
        each_place = places.shape[1]
        tries = each_place * len(aims) * (self.restarts if self.optimises else 1)
        next_try = torch.zeros(len(images), dtype=torch.int64)
        while len(waiting):
            if progress is not None:
                progress(len(waiting))
            # A batch is of one aim: the images that are behind, at as many places as fit.
            first = int(next_try[waiting].min())
            scores = aims[first // each_place % len(aims)]
            most = images_at_once(scores, images[0], self.batch_size)
            behind = waiting[next_try[waiting] == first]
            each = min(max(1, most // len(behind)), each_place - first % each_place)
            behind = behind[: max(1, most // each)]
            rows = behind.repeat_interleave(each)
            number = first + torch.arange(each).repeat(len(behind))
            where = chosen[rows, number % each_place]
            inside = place_pixels(threat, size, where).to(images.device)[:, None]
            boxes = place_boxes(threat, size, where).to(images.device)
            self._redraw(scores, first)
            problem = Problem(
                images[rows],
                inside,
                boxes,
                labels[rows].to(images.device),
                None if targets is None else targets[rows].to(images.device),
                scores,
                victim.predict,
                seeds[rows] + number,
                self.loss,
            )
            attacked, objective = self.optimise(problem)
            check_attacked(problem, attacked)
            prediction = victim.predict(attacked).cpu()
            won = succeeds(prediction, labels[rows], None if targets is None else targets[rows])
            found.keep(rows, attacked, prediction, won, objective.cpu().double(), where, inside)
            next_try[behind] = first + each
            waiting = waiting[~found.won[waiting] & (next_try[waiting] < tries)]
        return found.result(labels, targets)

    def _redraw(self, scores: nn.Module | None, number: int) -> None:
        """Start anew what a surrogate draws, whatever it was used for before."""
        redraw = getattr(scores, "redraw", None)
        if redraw is not None:
            redraw(_seed(self.seed, number))

    def _open_regions(
        self, victim: Victim, threat: Threat, images: Tensor, labels: Tensor
    ) -> Tensor | None:
        """Return the regions without a certificate, (N, R) bool, if the search asks for them."""
        if self.places.search != "open" or isinstance(threat, SparsePixels):
            return None
        return None if victim.open_regions is None else victim.open_regions(images, labels)


def succeeds(prediction: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Return which predictions are successes of an attacker, (N,) bool: an alert is none."""
    if targets is not None:
        return prediction == targets
    return (prediction != labels) & (prediction != ALERT)


def check_attacked(problem: Problem, attacked: Tensor) -> None:
    """Raise unless the attacked images keep to the threat.

    Raises:
        AssertionError: an attack that changes pixels outside of its patch, or leaves [0, 1]: it is
            wrong, whatever the user asked for.
    """
    if attacked.shape != problem.images.shape or attacked.dtype != torch.float32:
        raise AssertionError("attack: images of another shape or type")
    if not ((attacked >= 0) & (attacked <= 1)).all():
        raise AssertionError("attack: pixels outside [0, 1]")
    if ((attacked != problem.images) & ~problem.inside).any():
        raise AssertionError("attack: pixels changed outside of the patch")


@dataclass(eq=False)
class _Found:
    """The worst try of each image so far."""

    images: Tensor
    clean: Tensor
    prediction: Tensor
    won: Tensor
    objective: Tensor
    places: Tensor
    inside: Tensor
    tries: Tensor

    @classmethod
    def start(cls, images: Tensor, clean: Tensor, threat: Threat) -> _Found:
        """Return that nothing was tried yet."""
        count = len(images)
        each = getattr(threat, "count", 1)
        return cls(
            images.clone(),
            clean,
            clean.clone(),
            torch.zeros(count, dtype=torch.bool),
            torch.full((count,), torch.nan, dtype=torch.float64),
            torch.full((count, each), -1),
            torch.zeros(count, *images.shape[2:], dtype=torch.bool),
            torch.zeros(count, dtype=torch.int64),
        )

    def keep(
        self,
        rows: Tensor,
        attacked: Tensor,
        prediction: Tensor,
        won: Tensor,
        objective: Tensor,
        where: Tensor,
        inside: Tensor,
    ) -> None:
        """Enter the tries that are worse for the victim than those before, to the first success.

        What comes after it in the same batch counts for nothing, whatever the size of the batch.
        """
        for row, image in enumerate(rows.tolist()):
            if self.won[image]:
                continue
            self.tries[image] += 1
            first = bool(self.tries[image] == 1)
            if first or won[row] or not objective[row] <= self.objective[image]:
                self.images[image] = attacked[row]
                self.prediction[image] = prediction[row]
                self.won[image] = won[row]
                self.objective[image] = objective[row]
                self.places[image, : where.shape[1]] = where[row]
                self.inside[image] = inside[row, 0].cpu()

    def result(self, labels: Tensor, targets: Tensor | None) -> AttackResult:
        """Return what was found."""
        tried = self.tries > 0
        hit = (
            tried & (self.prediction == targets) if targets is not None else torch.zeros_like(tried)
        )
        return AttackResult(
            images=self.images,
            clean_prediction=self.clean,
            prediction=self.prediction,
            broken=tried & succeeds(self.prediction, labels, None),
            hit_target=hit,
            places=self.places,
            inside=self.inside,
            objective=self.objective,
            tries=self.tries,
        )


def _seed(seed: int, number: int) -> int:
    """Return a seed for an image or a try of its own, below 2 to the 31."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0] >> 1)
