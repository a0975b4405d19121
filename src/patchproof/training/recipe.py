"""What every recipe has: settings of the optimisation, and what the training loop asks of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Optimizer = Literal["sgd", "adamw"]

_VALIDATION_BATCH = 250


@dataclass(frozen=True, eq=False)
class Step:
    """One step of the training.

    Attributes:
        network: in train mode.
        companion: what the recipe trains along with it (``Recipe.companion``).
        views: (N, C, H, W) in [0, 1], shifted and flipped; may be overwritten.
        labels: (N,) int64.
        drawn: what ``Recipe.draw`` returned.
        done: share of all steps before this one.
    """

    network: nn.Module
    companion: nn.Module | None
    views: Tensor
    labels: Tensor
    drawn: Tensor | None
    done: float


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How to train; with equal data and device, the same recipe gives the same network.

    Attributes:
        fill: value of hidden pixels, in [0, 1]; the defense must use the same.
        epochs: rounds of training, each ending with a validation and a checkpoint.
        batch_size: images in a step.
        learning_rate: at its highest; it rises linearly from 0 over ``warmup`` and falls back.
        warmup: share of the steps until the highest learning rate.
        momentum: Nesterov momentum, of ``sgd``.
        weight_decay: of all weights; with ``adamw`` of matrices and kernels alone.
        label_smoothing: share of the target that is spread over all classes.
        shift: images are shifted by up to this many pixels, mirrored at the border.
        flip: flip half of the images left to right.
        seed: of the initial weights and of everything random.
        precision: of the forward and backward passes, as Lightning Fabric names it.
        optimizer: ``sgd``, or ``adamw``, which transformers and networks of linear layers need.
        epoch_images: training images of an epoch, drawn anew for each; None for all of them.
    """

    fill: float = 0.5
    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 0.4
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    shift: int = 2
    flip: bool = False
    seed: int = 0
    precision: Precision = "bf16-mixed"
    optimizer: Optimizer = "sgd"
    epoch_images: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 1, math.inf),
            ("batch_size", 2, math.inf),
            ("shift", 0, math.inf),
            ("fill", 0.0, 1.0),
            ("warmup", 0.0, 1.0),
            ("momentum", 0.0, 1.0),
            ("label_smoothing", 0.0, 1.0),
            ("weight_decay", 0.0, math.inf),
        ):
            if not low <= getattr(self, name) <= high:
                raise PatchproofError(
                    f"expected {name} from {low} to {high}, got {getattr(self, name)}"
                )
        if self.precision not in (known := get_args(Precision)):
            raise PatchproofError(f"expected a precision of {known}, got {self.precision!r}")
        if self.optimizer not in (known := get_args(Optimizer)):
            raise PatchproofError(f"expected an optimizer of {known}, got {self.optimizer!r}")
        if self.epoch_images is not None and self.epoch_images < self.batch_size:
            raise PatchproofError(
                f"expected epochs of at least one batch of {self.batch_size} images, "
                f"got {self.epoch_images}"
            )
        if not 0.0 < self.learning_rate < math.inf:
            raise PatchproofError(f"expected a positive learning_rate, got {self.learning_rate}")

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name of the recipe, as ``patchproof train --recipe`` takes it."""

    @property
    @abstractmethod
    def measures(self) -> Mapping[str, str]:
        """Return what every epoch is validated by: keys of its log entry, and their words."""

    @property
    @abstractmethod
    def chosen_by(self) -> str:
        """Return the measure by whose highest value the epoch is chosen."""

    @property
    def validation_images(self) -> int | None:
        """Return the most images that an epoch is validated on; None for all."""
        return None

    def draw(self, spec: ModelSpec, count: int) -> Tensor | None:
        """Return what is drawn or listed once for the whole training, if anything.

        Args:
            spec: the network.
            count: number of validation images.

        Raises:
            PatchproofError: a recipe that the size of the images does not allow.
        """
        return None

    def check(self, network: nn.Module, spec: ModelSpec) -> None:
        """Raise ``PatchproofError`` if the recipe cannot train this network."""
        return

    def companion(self, spec: ModelSpec) -> nn.Module | None:
        """Return a network to train along with the model, which is not part of it, if any."""
        return None

    def rate(self, done: float) -> float:
        """Return the share of the highest learning rate at a share of all steps done."""
        return min(done / max(self.warmup, 1e-9), (1 - done) / max(1 - self.warmup, 1e-9))

    def step_loss(self, step: Step) -> Tensor:
        """Return the loss of one step; here it depends on nothing but the batch."""
        return self.loss(step.network, step.views, step.labels, step.drawn)

    @abstractmethod
    def loss(
        self, network: nn.Module, views: Tensor, labels: Tensor, drawn: Tensor | None
    ) -> Tensor:
        """Return the mean loss of a batch, which training minimises.

        Args:
            network: in train mode.
            views: (N, C, H, W) in [0, 1], shifted and flipped; may be overwritten.
            labels: (N,) int64.
            drawn: what ``draw`` returned.
        """

    @abstractmethod
    def validate(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        drawn: Tensor | None,
        positions: slice,
    ) -> dict[str, Tensor]:
        """Return for each measure which images are right, (N,) bool or a share of right views.

        Args:
            network: in eval mode.
            images: (N, C, H, W) in [0, 1].
            labels: (N,) int64.
            drawn: what ``draw`` returned.
            positions: which of the validation images these are.
        """

    @torch.no_grad()
    def evaluate(
        self, network: nn.Module, images: Tensor, labels: Tensor, drawn: Tensor | None
    ) -> dict[str, float | None]:
        """Return each measure over uint8 images (N, C, H, W); None for those without a value."""
        network.eval()
        right = dict.fromkeys(self.measures, 0.0)
        found: set[str] = set()
        for begin in range(0, len(images), _VALIDATION_BATCH):
            positions = slice(begin, begin + _VALIDATION_BATCH)
            batch = self.validate(
                network, images[positions] / 255, labels[positions], drawn, positions
            )
            for measure, correct in batch.items():
                right[measure] += float(correct.sum())
            found |= batch.keys()
        return {
            measure: right[measure] / len(images) if measure in found else None
            for measure in self.measures
        }

    def describe(self, entry: Mapping[str, Any]) -> str:
        """Return the measures of a log entry in words."""
        return ", ".join(
            f"{words} {entry[measure]:.2%}"
            for measure, words in self.measures.items()
            if entry[measure] is not None
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values.

        ``optimizer`` and ``epoch_images`` only where they are not at their defaults, so that the
        card of a training that began before they existed stays equal, and the training can go on.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, default in (("optimizer", "sgd"), ("epoch_images", None)):
            if values[name] == default:
                del values[name]
        return {"recipe": self.name} | values
