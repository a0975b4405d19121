"""What defenses over a mask set share: their masks, and their saved form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import nn

from patchproof.defenses.saved import HidingDefense
from patchproof.threat import MaskSet, Threat, threat_from_dict
from patchproof.threat.masks import Layout, listed_masks, per_axis
from patchproof.threat.regions import ImageSize

_GRID = ("masks_per_side", "multiplicity", "layout", "shapes")


class OverMasks(HidingDefense):
    """A defense that puts the masks of a set on the image.

    Attributes:
        mask_set: the masks.
        grid: how they were made, as JSON values, where they are a grid for the threat; else None
            for each entry.
    """

    mask_set: MaskSet
    grid: Mapping[str, Any]

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
        self._take(fill, tolerance)
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

    def describe(self) -> str:
        """Say how many masks there are."""
        return f"{len(self.mask_set)} masks"

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
