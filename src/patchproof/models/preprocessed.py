"""A model with its own resize and normalisation inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError

Interpolation = Literal["nearest-exact", "bilinear", "bicubic"]


@dataclass(frozen=True)
class Preprocessing:
    """From images in [0, 1] to what a network was trained on: resize, crop, normalise.

    Attributes:
        mean: mean of each channel, in pixel units of [0, 1].
        std: standard deviation of each channel.
        input_size: (H, W) that images of another size are resized to; None leaves their size.
        crop_size: (H, W) of the centre that is kept after the resize; None keeps everything.
        interpolation: how pixels are resized; but for ``nearest-exact`` antialiased.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int] | None = None
    crop_size: tuple[int, int] | None = None
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        for name in ("input_size", "crop_size"):
            size = getattr(self, name)
            if size is None:
                continue
            if len(size) != 2 or min(size) < 1:
                raise PatchproofError(f"expected {name} (height, width) in pixels, got {size}")
            object.__setattr__(self, name, (int(size[0]), int(size[1])))
        if not self.mean or len(self.mean) != len(self.std):
            raise PatchproofError(
                f"expected as many means as standard deviations, got {self.mean} and {self.std}"
            )
        if not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            raise PatchproofError(
                f"expected finite means and positive deviations, got {self.mean} and {self.std}"
            )
        if self.interpolation not in (known := get_args(Interpolation)):
            raise PatchproofError(
                f"expected an interpolation of {known}, got {self.interpolation!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the preprocessing as JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Return the preprocessing that ``to_dict`` wrote."""
        return cls(**values)

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], channels: int, input_size: tuple[int, int] | None = None
    ) -> Preprocessing:
        """Return what the model options ``mean``, ``std`` and ``size`` say.

        Args:
            options: ``mean`` and ``std`` are numbers, or lists of one for each channel; ``size`` is
                a number of pixels or [height, width]. Without them nothing is changed.
            channels: channels of the images.
            input_size: (H, W) where ``size`` is not given.

        Raises:
            PatchproofError: other values, or not one for each channel.
        """

        def per_channel(name: str, default: float) -> tuple[float, ...]:
            value = options.get(name, default)
            values = value if isinstance(value, Sequence) else [value] * channels
            if len(values) != channels or not all(isinstance(v, (int, float)) for v in values):
                raise PatchproofError(
                    f"{name}: expected a number, or one for each of {channels} channels, "
                    f"got {value!r}"
                )
            return tuple(float(v) for v in values)

        size = options.get("size", input_size)
        match size:
            case None | [int(), int()]:
                pair = size
            case int():
                pair = (size, size)
            case _:
                raise PatchproofError(f"size: expected pixels or [height, width], got {size!r}")
        return cls(per_channel("mean", 0.0), per_channel("std", 1.0), pair)


class Preprocessed(nn.Module):
    """Resize and normalise inside the model, so that patches live in the user's pixels.

    A patch of a few pixels touches more pixels after a resize. Masks that act before the resize, as
    here, remove all of it; masks of the resized image would need to be larger.

    Args:
        model: from normalised images of ``input_size`` to logits.
        mean: mean of each channel, in pixel units of [0, 1].
        std: standard deviation of each channel.
        input_size: (H, W) that ``model`` wants; images of another size are resized to it. None
            leaves the size as it is.
        crop_size: (H, W) of the centre that is cropped out after the resize; None for no crop.
        interpolation: of the resize; but for ``nearest-exact`` it is antialiased.

    Raises:
        PatchproofError: sizes, means or deviations out of range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: tuple[int, int] | None = None,
        crop_size: tuple[int, int] | None = None,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        super().__init__()
        checked = Preprocessing(tuple(mean), tuple(std), input_size, crop_size, interpolation)
        self.model = model
        self.input_size = checked.input_size
        self.crop_size = checked.crop_size
        self.interpolation = checked.interpolation
        for name, values in (("mean", checked.mean), ("std", checked.std)):
            shaped = torch.tensor(values).reshape(1, -1, 1, 1)
            self.register_buffer(name, shaped, persistent=False)

    def extra_repr(self) -> str:
        """Return the size that the model wants, and how images come to it."""
        crop = "" if self.crop_size is None else f", crop_size={self.crop_size}"
        how = "" if self.interpolation == "bicubic" else f", interpolation={self.interpolation}"
        return f"input_size={self.input_size}{crop}{how}"

    def prepare(self, images: Tensor) -> Tensor:
        """Resize, crop and normalise images (N, C, H, W) in [0, 1], of any size."""
        if self.input_size is not None and images.shape[2:] != self.input_size:
            smooth = self.interpolation != "nearest-exact"
            half = images.dtype in (torch.bfloat16, torch.float16)  # which cannot be resized
            images = functional.interpolate(
                images.float() if half else images,
                self.input_size,
                mode=self.interpolation,
                antialias=smooth,
                align_corners=False if smooth else None,
            ).clamp(0.0, 1.0)
        if self.crop_size is not None:
            height, width = self.crop_size
            top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
            if top < 0 or left < 0:
                raise PatchproofError(
                    f"expected images of at least {self.crop_size} pixels to crop, "
                    f"got {tuple(images.shape[2:])}"
                )
            images = images[:, :, top : top + height, left : left + width]
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1], of any size, to logits (N, classes)."""
        logits: Tensor = self.model(self.prepare(images))
        return logits

    def embedded_options(self) -> dict[str, Any]:
        """Return the model options by which a saved file needs no other file, as JSON values."""
        return {}
