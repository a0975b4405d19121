"""What an attack is pointed at: a defense, any network, or any function that returns labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from patchproof.aggregation.base import Stop
from patchproof.defenses.checks import check_model
from patchproof.defenses.inference import model_device
from patchproof.defenses.surrogate import NetworkScores
from patchproof.errors import PatchproofError
from patchproof.precision import exact_inference
from patchproof.results import Certificates, Kind, Verdict

_REPEATS = 101
"""Predictions that are drawn to see which label is the most frequent."""


class Attackable(Protocol):
    """A defense of this library, as attacks see it."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""

    def predict(self, images: Tensor) -> Tensor:
        """Return the labels, (N,) int64; ``ALERT`` where a patch is suspected."""

    def surrogates(self) -> Mapping[str, nn.Module]:
        """Return differentiable stand-ins by the name of what they aim at, the best first."""


@runtime_checkable
class DrawsPredictions(Protocol):
    """A defense whose predictions may be drawn anew each time."""

    kind: Kind

    def repeated_predictions(self, images: Tensor, repeats: int) -> Tensor:
        """Return what so many predictions of each image are, (N, repeats) int64."""


@runtime_checkable
class Certifies(Protocol):
    """A defense with certificates."""

    def certify(self, images: Tensor, labels: Tensor, stop: Stop) -> Certificates:
        """Certify N images."""


def draws_predictions(defense: object) -> TypeGuard[DrawsPredictions]:
    """Tell whether a defense may answer the same image in several ways."""
    return isinstance(defense, DrawsPredictions) and defense.kind == "probable"


@dataclass(frozen=True)
class Victim:
    """What is attacked: labels that count, and scores that show the way.

    Attributes:
        predict: from images (N, C, H, W) float32 in [0, 1] to labels (N,) int64, ``ALERT`` (-1)
            where a patch is suspected. It alone decides what a success is.
        surrogates: by name, modules from images to scores (N, classes), differentiable in the
            images for attacks that use gradients. Empty where labels are all that is known.
        device: where images go.
        open_regions: from images and their labels (N,) to the patch regions at which there is no
            certificate, (N, R) bool; None where there are no certificates.
    """

    predict: Callable[[Tensor], Tensor]
    surrogates: Mapping[str, nn.Module] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    open_regions: Callable[[Tensor, Tensor], Tensor] | None = None

    @classmethod
    def of_defense(cls, defense: Attackable) -> Victim:
        """Attack a defense with all knowledge of it (an adaptive attack).

        Of one that draws its predictions, the label that it returns most often counts.
        """
        predict = defense.predict
        if draws_predictions(defense):
            drawing = defense

            def predict(images: Tensor) -> Tensor:
                return drawing.repeated_predictions(images, _REPEATS).mode(1).values

        open_regions = None
        if isinstance(defense, Certifies):
            certifying = defense

            def open_regions(images: Tensor, labels: Tensor) -> Tensor:
                verdicts = certifying.certify(images, labels, "never").region_verdicts()
                return verdicts != Verdict.HOLDS

        return cls(predict, dict(defense.surrogates()), defense.device, open_regions)

    @classmethod
    def of_model(cls, model: nn.Module, device: torch.device | None = None) -> Victim:
        """Attack any classifier in eval mode: from images in [0, 1] to logits (N, classes).

        Raises:
            PatchproofError: a model in training mode.
        """
        place = model_device(model) if device is None else device
        scores = NetworkScores(check_model(model))

        def predict(images: Tensor) -> Tensor:
            with exact_inference(place):
                labels: Tensor = scores(images.to(place)).argmax(1).cpu()
            return labels.clone()  # an ordinary tensor, no longer of inference mode

        return cls(predict, {"logits": scores}, place)

    @classmethod
    def of_undefended(cls, model: nn.Module, device: torch.device | None = None) -> Victim:
        """Attack the model inside a defense, by somebody who does not know of the defense.

        Contents are sought until the last step: one that only just fools the model would be undone
        by anything that the defense does.
        """
        victim = cls.of_model(model, device)
        return cls(victim.predict, {"logits": NetworkScores(model, exact=False)}, victim.device)

    def aims(self, names: tuple[str, ...] | None) -> list[nn.Module]:
        """Return the surrogates of these names, all of them for None.

        Raises:
            PatchproofError: a name that there is not, or no surrogate at all.
        """
        if not self.surrogates:
            raise PatchproofError(
                "victim: expected differentiable scores for this attack, got labels alone: take "
                "an attack without gradients (square)"
            )
        for name in names or ():
            if name not in self.surrogates:
                raise PatchproofError(f"aim: expected {' or '.join(self.surrogates)}, got {name!r}")
        return [self.surrogates[name] for name in names or self.surrogates]
