"""Checks of what enters a defense."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from patchproof.errors import PatchproofError
from patchproof.threat.regions import ImageSize


def check_model(model: object) -> nn.Module:
    """Return ``model`` if it is a module in eval mode throughout, else raise.

    Also refused: normalisation by the statistics of the batch, with which a patch on one view
    changes the scores of all others.
    """
    if not isinstance(model, nn.Module):
        raise PatchproofError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"its layer {name!r}" if name else "the model"
        if module.training:
            raise PatchproofError(
                f"expected a model in eval mode, got {where} in training mode: call model.eval()"
            )
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise PatchproofError(
                f"expected a model that scores each image by itself, got {where} that normalises "
                "by the statistics of the batch: set track_running_stats=True"
            )
    return model


def check_images(images: object, image_size: ImageSize) -> Tensor:
    """Return ``images`` if they are float32 (N, C, H, W) in [0, 1] of that size, else raise."""
    height, width = image_size
    if not isinstance(images, Tensor) or images.dtype != torch.float32:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise PatchproofError(f"images: expected a float32 tensor, got {got}")
    if images.ndim != 4 or tuple(images.shape[2:]) != (height, width) or not images.shape[1]:
        raise PatchproofError(
            f"images: expected shape (N, channels, {height}, {width}), got {tuple(images.shape)}"
        )
    if images.numel():
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # also where there is a NaN
            raise PatchproofError(
                f"images: expected pixels in [0, 1], got values from {low:.4g} to {high:.4g}"
            )
    return images


def check_labels(labels: object, count: int) -> Tensor:
    """Return ``labels`` as (N,) int64 on the CPU if they are whole numbers >= 0, else raise."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise PatchproofError(f"labels: expected an integer tensor, got {got}")
    if tuple(labels.shape) != (count,):
        raise PatchproofError(f"labels: expected shape ({count},), got {tuple(labels.shape)}")
    return labels.cpu().long()


def checked_examples(
    images: Tensor, labels: Tensor, image_size: ImageSize
) -> list[tuple[int, Tensor, int]]:
    """Return the position, image and label of each, or raise for what cannot be certified."""
    check_images(images, image_size)
    numbers = check_labels(labels, len(images)).tolist()
    if not len(images):
        raise PatchproofError("images: expected at least one, got none")
    return [(index, images[index], label) for index, label in enumerate(numbers)]


def check_label_range(labels: Tensor, classes: int) -> None:
    """Raise unless every label is a class."""
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise PatchproofError(f"labels: expected 0 to {classes - 1}, got {int(wrong[0])}")


def check_tau(tau: object) -> float:
    """Return a confidence in [0, 1], or raise."""
    if isinstance(tau, (int, float)) and 0.0 <= tau <= 1.0:
        return float(tau)
    raise PatchproofError(f"tau: expected a confidence in [0, 1], got {tau!r}")
