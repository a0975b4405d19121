"""What defenses over features of small parts of the image share: their views and saved form."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Any, Literal, Self, get_args

from torch import nn

from patchproof.aggregation.evidence import LARGEST, Confidence, Evidence, Logits, Prediction
from patchproof.defenses.checks import check_model
from patchproof.defenses.saved import DEFAULT_FILL, HidingDefense
from patchproof.errors import PatchproofError
from patchproof.models.ablation import Ablation
from patchproof.threat import threat_from_dict
from patchproof.threat.regions import ImageSize, check_image_size
from patchproof.views import AblatedViews, LocalFeatureViews

Feature = Literal["logits", "confidence", "prediction"]
"""What a view says for a class: a score, a softmax probability, or a vote for the highest score."""

FeatureViews = LocalFeatureViews | AblatedViews


class OverFeatures(HidingDefense, ABC):
    """A defense whose views each see a small part of the image.

    The parts are the receptive fields of a network with ``local_logits``, or what ablations keep
    of the image.

    Attributes:
        ablation: what each view shows; None for receptive fields.
        bands: blocks that each ablated view keeps.
        features: the parts, as views.
    """

    ablation: Ablation | None
    bands: int
    features: FeatureViews

    def _take_views(
        self,
        model: nn.Module,
        image_size: ImageSize,
        ablation: Ablation | None,
        bands: int,
        fill: float,
        tolerance: float,
    ) -> FeatureViews:
        """Keep what the views are made of, and return them."""
        self._take(fill, tolerance)
        self.features = choose_views(model, image_size, ablation, bands, fill)
        views = self.features
        self.ablation = views.ablation if isinstance(views, AblatedViews) else None
        self.bands = bands
        return self.features

    def describe(self) -> str:
        """Say how many views there are, and what each sees."""
        views = self.features
        if isinstance(views, LocalFeatureViews):
            (height, width), stride = views.fields.size, views.fields.stride
            steps = str(stride[0]) if stride[0] == stride[1] else f"{stride[0]}x{stride[1]}"
            return f"{views.count} local features of {height}x{width} pixels, stride {steps}"
        height, width = views.ablation.block(self.image_size)
        several = "" if self.bands == 1 else f"combinations of {self.bands} "
        kind = "blocks" if views.ablation.kind == "block" else f"bands of {views.ablation.kind}s"
        return f"{views.count} {several}{kind} of {height}x{width} pixels"

    def to_dict(self) -> dict[str, Any]:
        """Return all that decides the labels and certificates, but the model, as JSON values."""
        return {
            "type": type(self).__name__,
            "threat": self.threat.to_dict(),
            "image_size": list(self.image_size),
            "ablation": None if self.ablation is None else self.ablation.to_dict(),
            "bands": self.bands,
            **{name: _json(getattr(self, name)) for name in self._OWN},
            "fill": self.fill,
            "tolerance": self.tolerance,
        }

    @classmethod
    def from_dict(cls, model: nn.Module, values: dict[str, Any]) -> Self:
        """Return the defense of ``model`` that ``to_dict`` described."""
        height, width = values["image_size"]
        ablation = values["ablation"]
        build: Callable[..., Self] = cls
        return build(
            model,
            threat_from_dict(values["threat"]),
            image_size=(height, width),
            ablation=None if ablation is None else Ablation(**ablation),
            **{name: values[name] for name in ("bands", *cls._OWN, "fill", "tolerance")},
        )


def choose_views(
    model: nn.Module,
    image_size: ImageSize,
    ablation: Ablation | None = None,
    bands: int = 1,
    fill: float = DEFAULT_FILL,
) -> FeatureViews:
    """Return the parts of the image that a defense of a model looks at.

    Args:
        model: in eval mode.
        image_size: (H, W) in pixels.
        ablation: what each view shows; None for the receptive fields of ``model.local_logits``, or
            for the ablation that the model was made for.
        bands: blocks that each ablated view keeps.
        fill: the value that hidden pixels take.

    Raises:
        PatchproofError: a model in training mode, one without features that see a small part of the
            image, an ablation that it was not made for, or numbers out of range.
    """
    check_model(model)
    check_image_size(image_size)
    if ablation is None and not hasattr(model, "local_logits"):
        ablation = getattr(model, "ablation", None)
        if ablation is None:
            raise PatchproofError(
                "model: expected one with local_logits, such as bagnet, or an ablation to show "
                f"it parts of the image, such as column:4, got {type(model).__name__} and none"
            )
    if ablation is not None:
        made_for = getattr(model, "ablation", ablation)
        if hasattr(model, "ablated") and made_for != ablation:
            raise PatchproofError(
                f"ablation: expected {made_for}, which the model was made for, got {ablation}"
            )
        return AblatedViews(ablation, image_size, bands, fill)
    if bands != 1:
        raise PatchproofError(f"bands: expected with an ablation only, got {bands}")
    return LocalFeatureViews(model, image_size)


def default_feature(views: FeatureViews, feature: Feature | None) -> Feature:
    """Return the feature, by default the paper's (PatchGuard, Table 3).

    Raises:
        PatchproofError: no such feature.
    """
    if feature is None:
        return "logits" if isinstance(views, LocalFeatureViews) else "confidence"
    if feature not in get_args(Feature):
        raise PatchproofError(f"feature: expected {', '.join(get_args(Feature))}, got {feature!r}")
    return feature


def evidence_of(feature: Feature, high: float = LARGEST) -> Evidence:
    """Return the evidence of a feature, logits clipped to [0, ``high``]."""
    match feature:
        case "logits":
            return Logits(high=high)
        case "confidence":
            return Confidence()
        case "prediction":
            return Prediction()


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
