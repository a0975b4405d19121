"""PatchCleanser: certifiably robust recovery for any classifier, by masking pixels twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from patchproof.aggregation import ChallengerGame, DoubleMasking
from patchproof.defenses.view_defense import ViewDefense
from patchproof.models import ModelSpec, save_classifier
from patchproof.results import PatchproofError
from patchproof.threat import MaskSet, Threat, threat_from_dict
from patchproof.threat.masks import per_axis
from patchproof.threat.regions import ImageSize
from patchproof.views import MaskPairViews

Inference = Literal["double", "challenger"]

DEFAULT_FILL = 0.5
DEFAULT_TOLERANCE = 1e-3


class PatchCleanser(ViewDefense):
    """Double masking or the challenger game over an R-covering mask set (Xiang et al., 2022).

    The region certificate of double masking is necessary and sufficient against an attacker who
    sets the labels of corrupted views freely; that of the challenger game is sufficient (see
    ``aggregation``). ``paper_condition`` is two-mask correctness (Algorithm 2): sound, and never
    more than the region certificate.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what the attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        masks_per_side: the budget k of Section 3.4, one number or (rows, columns).
        multiplicity: the least number of masks per axis that cover each stretch of a patch.
        mask_set: the masks themselves, in place of ``masks_per_side`` and ``multiplicity``; it must
            cover ``threat``.
        inference: ``"double"`` (Algorithm 1) or ``"challenger"`` (Appendix C).
        fill: the value in [0, 1] that masked pixels take in every channel.
        tolerance: a view whose margin between the two highest logits is not larger counts as
            corrupted, since the same pixels can score differently in the last bits in another batch
            or on another device. The default is more than ten times the largest difference
            measured (``docs/numerics.md``).
        batch_size: views in one forward pass; None picks one by the size of the image.
        memory_budget: bytes that the activations of one batch may take; None for no limit.

    Raises:
        PatchproofError: a model in training mode, masks that do not cover the threat, or numbers
            out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        masks_per_side: int | tuple[int, int] = 6,
        multiplicity: int | tuple[int, int] = 1,
        mask_set: MaskSet | None = None,
        inference: Inference = "double",
        fill: float = DEFAULT_FILL,
        tolerance: float = DEFAULT_TOLERANCE,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.masks_per_side: tuple[int, int] | None = None
        self.multiplicity: tuple[int, int] | None = None
        if mask_set is None:
            self.masks_per_side = per_axis("masks_per_side", masks_per_side)
            self.multiplicity = per_axis("multiplicity", multiplicity)
            mask_set = MaskSet.for_threat(threat, image_size, masks_per_side, multiplicity)
        elif mask_set.image_size != image_size or mask_set.threat != threat:
            mask_set = MaskSet(image_size, mask_set.boxes, threat)
        if inference not in ("double", "challenger"):
            raise PatchproofError(
                f"inference: expected 'double' or 'challenger', got {inference!r}"
            )
        if not tolerance >= 0:
            raise PatchproofError(f"tolerance: expected a number >= 0, got {tolerance!r}")
        views = MaskPairViews(mask_set, fill)
        aggregation = DoubleMasking if inference == "double" else ChallengerGame
        super().__init__(
            model,
            threat,
            views,
            aggregation(views.pair_to_view, tolerance),
            image_size=image_size,
            batch_size=batch_size,
            memory_budget=memory_budget,
        )
        self.mask_set = mask_set
        self.inference: Inference = inference
        self.fill = fill
        self.tolerance = tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return all that decides the labels and certificates, but the model, as JSON values."""
        return {
            "type": "PatchCleanser",
            "threat": self.threat.to_dict(),
            "image_size": list(self.image_size),
            "masks": [list(box) for box in self.mask_set.boxes],
            "masks_per_side": self.masks_per_side and list(self.masks_per_side),
            "multiplicity": self.multiplicity and list(self.multiplicity),
            "inference": self.inference,
            "fill": self.fill,
            "tolerance": self.tolerance,
        }

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

    @classmethod
    def from_dict(cls, model: nn.Module, values: dict[str, Any]) -> PatchCleanser:
        """Return the defense of ``model`` that ``to_dict`` described."""
        threat = threat_from_dict(values["threat"])
        height, width = values["image_size"]
        defense = cls(
            model,
            threat,
            image_size=(height, width),
            mask_set=MaskSet((height, width), tuple(values["masks"]), threat),
            inference=values["inference"],
            fill=values["fill"],
            tolerance=values["tolerance"],
        )
        if values["masks_per_side"]:
            defense.masks_per_side = tuple(values["masks_per_side"])
            defense.multiplicity = tuple(values["multiplicity"])
        return defense
