"""BagNet-9, -17 and -33 (Brendel and Bethge, 2019): ResNet-50 with few 3x3 kernels left.

Their names are their receptive fields in pixels. Tensors are named as in the published weights, and
convolutions are unpadded, as there; ``load_weights`` takes the files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.models.preprocessed import Preprocessed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_DEPTHS = (3, 4, 6, 3)
_STRIDES = (2, 2, 2, 1)
_LAYERS_OF_3X3 = {9: 2, 17: 3, 33: 4}
"""How many layers begin with a 3x3 kernel; a stem of one more sees 3 pixels."""


class Bottleneck(nn.Module):
    """1x1, then 1x1 or 3x3, then 1x1 convolutions, added to what came in.

    Args:
        inputs: channels that come in; four times ``width`` go out.
        width: channels inside.
        kernel: of the second convolution, 1 or 3, without padding.
        stride: of the second convolution.
    """

    def __init__(self, inputs: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 4 * width, h, w), cutting the last rows and columns off."""
        inner = torch.relu(self.bn1(self.conv1(features)))
        inner = torch.relu(self.bn2(self.conv2(inner)))
        inner = self.bn3(self.conv3(inner))
        past = features if self.downsample is None else self.downsample(features)
        return torch.relu(inner + past[:, :, : inner.shape[2], : inner.shape[3]])


class BagNetResNet(nn.Module):
    """A BagNet for normalised images of about 224 pixels a side.

    Args:
        classes: number of classes.
        channels: channels of the image.
        receptive_field: pixels a side that a local feature sees: 9, 17 or 33; the stride is 8.
        width: channels inside the first bottlenecks, 64 as published.

    Raises:
        PatchproofError: another receptive field.
    """

    def __init__(
        self, classes: int, channels: int, receptive_field: int = 17, width: int = 64
    ) -> None:
        super().__init__()
        if receptive_field not in _LAYERS_OF_3X3:
            raise PatchproofError(
                f"receptive_field: expected one of {list(_LAYERS_OF_3X3)}, got {receptive_field}"
            )
        self.receptive_field = receptive_field
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width, momentum=0.001)
        inputs = width
        for number, (depth, stride) in enumerate(zip(_DEPTHS, _STRIDES, strict=True)):
            kernel = 3 if number < _LAYERS_OF_3X3[receptive_field] else 1
            inner = width * 2**number
            blocks = [Bottleneck(inputs, inner, kernel, stride)]
            blocks += [Bottleneck(4 * inner, inner, 1, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
            inputs = 4 * inner
        self.fc = nn.Linear(inputs, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def local_logits(self, images: Tensor) -> Tensor:
        """Map normalised images (N, C, H, W) to the logits of every place, (N, classes, h, w).

        Raises:
            PatchproofError: images smaller than the receptive field.
        """
        logits: Tensor = self.fc(self._features(images).permute(0, 2, 3, 1))
        return logits.permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, C, H, W) to logits (N, classes), the mean of the local ones."""
        logits: Tensor = self.fc(self._features(images).mean((2, 3)))
        return logits

    def _features(self, images: Tensor) -> Tensor:
        if min(images.shape[2:]) < self.receptive_field:
            raise PatchproofError(
                f"expected images of at least {self.receptive_field} pixels a side, "
                f"got {tuple(images.shape[2:])}"
            )
        features: Tensor = torch.relu(self.bn1(self.conv2(self.conv1(images))))
        for number in range(len(_DEPTHS)):
            features = self.get_submodule(f"layer{number + 1}")(features)
        return features


class PreprocessedBagNet(Preprocessed):
    """A ``BagNetResNet`` for images in [0, 1], with normalisation by ImageNet's statistics inside.

    Args:
        classes: number of classes.
        channels: channels of the image, up to 3.
        receptive_field: as of ``BagNetResNet``, in pixels after a resize.
        size: pixels a side that images are resized to, such as the 192 that PatchGuard takes for
            CIFAR-10; None leaves their size.
        width: as of ``BagNetResNet``.

    Raises:
        PatchproofError: more than 3 channels.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        receptive_field: int = 17,
        size: int | None = None,
        width: int = 64,
    ) -> None:
        if channels > len(IMAGENET_MEAN):
            raise PatchproofError(f"channels: expected up to 3, got {channels}")
        super().__init__(
            BagNetResNet(classes, channels, receptive_field, width),
            IMAGENET_MEAN[:channels],
            IMAGENET_STD[:channels],
            None if size is None else (size, size),
        )

    def local_logits(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to the logits of every place, (N, classes, h, w)."""
        assert isinstance(self.model, BagNetResNet)
        return self.model.local_logits(self.prepare(images))
