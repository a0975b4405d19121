"""What defenses over a mask set share: their masks, and their saved form."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from patchproof.models import ModelSpec, save_classifier
from patchproof.results import PatchproofError
from patchproof.threat import MaskSet, Threat, threat_from_dict
from patchproof.threat.masks import Layout, listed_masks, per_axis
from patchproof.threat.regions import ImageSize

DEFAULT_FILL = 0.5
DEFAULT_TOLERANCE = 1e-3

_GRID = ("masks_per_side", "multiplicity", "layout", "shapes")


class OverMasks(ABC):
    """A defense that puts the masks of a set on the image.

    Attributes:
        mask_set: the masks.
        grid: how they were made, as JSON values, where they are a grid for the threat; else None
            for each entry.
        fill: the value that masked pixels take in every channel.
        tolerance: views within it count as corrupted.
    """

    model: nn.Module
    threat: Threat
    image_size: ImageSize
    mask_set: MaskSet
    grid: Mapping[str, Any]
    fill: float
    tolerance: float

    _OWN: ClassVar[tuple[str, ...]]
    """The arguments that the defense takes beyond masks, fill and tolerance."""

    def _take_masks(
        self,
        threat: Threat,
        image_size: ImageSize,
        mask_set: MaskSet | None,
        fill: float,
        tolerance: float,
        *,
        masks_per_side: int | tuple[int, int],
        multiplicity: int | tuple[int, int],
        layout: Layout,
        shapes: int | None,
    ) -> MaskSet:
        """Keep the given masks, or make a grid of them, and return them."""
        if not tolerance >= 0:
            raise PatchproofError(f"tolerance: expected a number >= 0, got {tolerance!r}")
        self.fill = fill
        self.tolerance = tolerance
        self.grid = dict.fromkeys(_GRID)
        if mask_set is None:
            self.grid = {
                "masks_per_side": list(per_axis("masks_per_side", masks_per_side)),
                "multiplicity": list(per_axis("multiplicity", multiplicity)),
                "layout": layout,
                "shapes": shapes,
            }
            mask_set = MaskSet.for_threat(
                threat, image_size, masks_per_side, multiplicity, layout, shapes
            )
        elif mask_set.image_size != image_size or mask_set.threat != threat:
            mask_set = MaskSet(image_size, mask_set.masks, threat)
        self.mask_set = mask_set
        return mask_set

    def to_dict(self) -> dict[str, Any]:
        """Return all that decides the labels and certificates, but the model, as JSON values."""
        return {
            "type": type(self).__name__,
            "threat": self.threat.to_dict(),
            "image_size": list(self.image_size),
            "masks": listed_masks(self.mask_set.masks),
            **self.grid,
            **{name: getattr(self, name) for name in self._OWN},
            "fill": self.fill,
            "tolerance": self.tolerance,
        }

    @classmethod
    def from_dict(cls, model: nn.Module, values: dict[str, Any]) -> Self:
        """Return the defense of ``model`` that ``to_dict`` described."""
        threat = threat_from_dict(values["threat"])
        height, width = values["image_size"]
        build: Callable[..., Self] = cls
        defense = build(
            model,
            threat,
            image_size=(height, width),
            mask_set=MaskSet((height, width), tuple(values["masks"]), threat),
            **{name: values[name] for name in (*cls._OWN, "fill", "tolerance")},
        )
        defense.grid = {name: values.get(name) for name in _GRID}
        return defense

    def save(
        self, path: Path | str, spec: ModelSpec, made: Mapping[str, Any] | None = None
    ) -> None:
        """Write the defense and the weights of its model to one safetensors file.

        The card in the file's metadata holds the defense, the model's specification, the digest of
        its weights and how it was made. ``patchproof.load`` reads it, and ``load_classifier`` the
        model alone.

        Args:
            path: where; an existing file is replaced whole.
            spec: what the model is built from (``python:package.module:factory`` for your own).
            made: how the model was made, as JSON values.

        Raises:
            RunError: the file cannot be written.
        """
        save_classifier(path, self.model, spec, {**(made or {}), "defense": self.to_dict()})
