"""Classifiers: small networks, adapters for timm, torchvision and your own, and their weights."""

from patchproof.models.ablation import Ablation, AblationResNet, BandResNet, Kept
from patchproof.models.bagnet import BagNet
from patchproof.models.crops import CropResNet9
from patchproof.models.interval import IntervalConvNet, IntervalMLP, Normalize
from patchproof.models.preprocessed import Preprocessed
from patchproof.models.small import SmallResNet, TinyResNet
from patchproof.models.spec import ModelSpec, build_model
from patchproof.models.unet import GuideUNet
from patchproof.models.weights import (
    load_classifier,
    load_weights,
    model_digest,
    read_card,
    save_classifier,
    write_atomically,
)

__all__ = [
    "Ablation",
    "AblationResNet",
    "BagNet",
    "BandResNet",
    "CropResNet9",
    "GuideUNet",
    "IntervalConvNet",
    "IntervalMLP",
    "Kept",
    "ModelSpec",
    "Normalize",
    "Preprocessed",
    "SmallResNet",
    "TinyResNet",
    "build_model",
    "load_classifier",
    "load_weights",
    "model_digest",
    "read_card",
    "save_classifier",
    "write_atomically",
]
