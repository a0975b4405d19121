"""The networks of the interval-bound papers: plain layers, few of them, trained by their bounds.

Chiang et al. (ICLR 2020), Appendix A.1, and Gowal et al. (2018), "large". Deeper networks or
normalisation by batches would only widen the interval of every activation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, channel by channel.

    Args:
        mean: of each channel, in pixel units of [0, 1].
        std: of each channel, positive.

    Raises:
        PatchproofError: not as many means as deviations, or a deviation that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not mean or len(mean) != len(std) or not all(value > 0 for value in std):
            raise PatchproofError(
                f"expected as many means as positive deviations, got {list(mean)} and {list(std)}"
            )
        for name, values in (("mean", mean), ("std", std)):
            shaped = torch.tensor([float(value) for value in values]).reshape(1, -1, 1, 1)
            self.register_buffer(name, shaped, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to normalised ones of that shape."""
        return (images - self.mean) / self.std


class _Layers(nn.Sequential):
    """Layers by name, of which a slice is a plain sequence."""

    @overload
    def __getitem__(self, idx: slice) -> nn.Sequential: ...

    @overload
    def __getitem__(self, idx: int) -> nn.Module: ...

    def __getitem__(self, idx: slice | int) -> nn.Sequential | nn.Module:
        if isinstance(idx, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)


class IntervalMLP(_Layers):
    """A perceptron on all pixels.

    Args:
        classes: number of classes.
        channels: channels of the images.
        image_size: (H, W) of the images, in pixels.
        hidden: neurons of each hidden layer; the paper's network has one of 255.
        mean: mean of each channel for a normalisation at the front; none without ``std``.
        std: standard deviation of each channel.

    Raises:
        PatchproofError: no hidden layer, or a normalisation that does not fit.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        image_size: tuple[int, int],
        hidden: Sequence[int] = (255,),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        layers = _normalisation(channels, mean, std)
        layers |= _dense(channels * image_size[0] * image_size[1], hidden, classes)
        super().__init__(layers)


class IntervalConvNet(_Layers):
    """Convolutions with ReLU, then a perceptron on all their outputs; nothing is pooled.

    A convolution of kernel k is padded with (k - 1) // 2 zeros on each side.

    Args:
        classes: number of classes.
        channels: channels of the images.
        image_size: (H, W) of the images, in pixels.
        kernels: side of the kernel of each convolution.
        strides: stride of each convolution.
        widths: channels of the output of each convolution.
        hidden: neurons of each hidden layer of the perceptron.
        first_kernel: side of the first kernel in place of ``kernels[0]``; the paper's networks
            against sparse attacks have 11 or 13.
        mean: mean of each channel for a normalisation at the front; none without ``std``.
        std: standard deviation of each channel.

    Raises:
        PatchproofError: kernels, strides and widths of different or no number, or not positive;
            no hidden layer; images too small for the convolutions; or a normalisation that does
            not fit.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        image_size: tuple[int, int],
        kernels: Sequence[int],
        strides: Sequence[int],
        widths: Sequence[int],
        hidden: Sequence[int],
        first_kernel: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if first_kernel is not None:
            kernels = (first_kernel, *kernels[1:])
        if (
            not len(kernels) == len(strides) == len(widths) > 0
            or min(*kernels, *strides, *widths) < 1
        ):
            raise PatchproofError(
                "expected as many positive kernels, strides and widths, got "
                f"{list(kernels)}, {list(strides)} and {list(widths)}"
            )
        layers = _normalisation(channels, mean, std)
        size, inputs = list(image_size), channels
        for index, (kernel, stride, width) in enumerate(
            zip(kernels, strides, widths, strict=True), 1
        ):
            padding = (kernel - 1) // 2
            size = [(side + 2 * padding - kernel) // stride + 1 for side in size]
            if min(size) < 1:
                raise PatchproofError(
                    f"expected images that the convolutions leave pixels of, got {image_size}"
                )
            layers[f"convolution{index}"] = nn.Conv2d(inputs, width, kernel, stride, padding)
            layers[f"relu{index}"] = nn.ReLU()
            inputs = width
        layers |= _dense(inputs * size[0] * size[1], hidden, classes)
        super().__init__(layers)


def _normalisation(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> OrderedDict[str, nn.Module]:
    """Return the layers by name before the first trained one: none or one."""
    if mean is None and std is None:
        return OrderedDict()
    if mean is None or std is None or len(mean) != channels:
        raise PatchproofError(f"expected mean and std of {channels} channels, got {mean} and {std}")
    return OrderedDict(normalize=Normalize(mean, std))


def _dense(inputs: int, hidden: Sequence[int], classes: int) -> OrderedDict[str, nn.Module]:
    """Return the layers by name of a perceptron on flattened inputs."""
    if not hidden or min(hidden) < 1:
        raise PatchproofError(f"expected one or more positive hidden widths, got {list(hidden)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for index, (before, after) in enumerate(pairwise((inputs, *hidden)), 1):
        layers[f"hidden{index}"] = nn.Linear(before, after)
        layers[f"hidden_relu{index}"] = nn.ReLU()
    layers["head"] = nn.Linear(hidden[-1], classes)
    return layers
