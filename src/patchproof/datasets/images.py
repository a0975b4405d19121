"""A split of labelled images, read one at a time or all at once."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from patchproof.errors import PatchproofError

if TYPE_CHECKING:
    import PIL.Image

_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)
_GREY_MODES = ("1", "L")
_WHOLE_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class CorruptImageError(PatchproofError):
    """An image that cannot be decoded; the message names its file or row."""


class Pictures(Protocol):
    """Where the images of a source come from, by their original index."""

    def content(self, index: int) -> bytes:
        """Return the stored bytes, which identify the image."""

    def open(self, index: int) -> PIL.Image.Image:
        """Return the image, possibly not decoded yet."""

    def describe(self, index: int) -> str:
        """Return the file or row, for messages."""


@dataclass(frozen=True)
class ArrayPictures:
    """Images held as one array.

    Attributes:
        pixels: (N, H, W) grey or (N, H, W, 3) RGB, uint8.
        name: the data set, for messages.
    """

    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
    name: str

    def content(self, index: int) -> bytes:
        """Return the bytes of the pixels."""
        content: bytes = self.pixels[index].tobytes()
        return content

    def open(self, index: int) -> PIL.Image.Image:
        """Return the image."""
        import PIL.Image

        return PIL.Image.fromarray(self.pixels[index])

    def describe(self, index: int) -> str:
        """Return the data set and the index."""
        return f"{self.name} image {index}"


@dataclass(frozen=True)
class EncodedPictures:
    """Images in files, or in rows of a table: anything that Pillow decodes.

    Attributes:
        content: from an index to the encoded bytes.
        describe: from an index to the file or row, for messages.
    """

    content: Callable[[int], bytes]
    describe: Callable[[int], str]

    def open(self, index: int) -> PIL.Image.Image:
        """Return the image; only its header is decoded yet."""
        import PIL.Image

        try:
            return PIL.Image.open(io.BytesIO(self.content(index)))
        except PIL.UnidentifiedImageError as error:
            raise OSError("not an image in a format that is known") from error
        except PIL.Image.DecompressionBombError as error:
            raise OSError(error) from error


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images of one split.

    Attributes:
        name: the data set.
        split: ``train``, ``validation``, ``test`` or ``all``.
        class_names: names of the classes, by label.
        image_size: (H, W) in pixels.
        channels: 1 for grey images, else 3 (RGB).
        labels: (N,) int64.
        indices: (N,) int64, where each image is in its source's own split.
        pictures: where the images come from.
        resized: whether images are brought to ``image_size`` (shorter side resized, bicubic, then
            the centre cropped); otherwise every image must have that size.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    channels: int
    labels: Tensor
    indices: Tensor
    pictures: Pictures
    resized: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        height, width = self.image_size
        return (
            f"ImageDataset({self.name!r}, {self.split!r}, {len(self)} images of "
            f"{height}x{width}x{self.channels}, {len(self.class_names)} classes)"
        )

    def image(self, position: int) -> Tensor:
        """Return one image, (C, H, W) float32 in [0, 1]: its 8-bit values over 255, unaltered.

        Raises:
            CorruptImageError: it cannot be decoded.
            PatchproofError: it has another size, or colours in a grey data set.
        """
        return self._pixels(position).float() / 255.0

    def subset(self, positions: Sequence[int] | Tensor) -> ImageDataset:
        """Return the images at some positions, in that order.

        Raises:
            PatchproofError: no position, one outside 0 to ``len(self) - 1``, or not whole numbers.
        """
        chosen = torch.as_tensor(positions).reshape(-1)
        if len(chosen) and chosen.dtype not in _WHOLE_NUMBERS:
            raise PatchproofError(f"expected positions as whole numbers, got {chosen.dtype}")
        chosen = chosen.long()
        if len(chosen) == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= len(self):
            raise PatchproofError(
                f"expected positions from 0 to {len(self) - 1}, got {chosen.tolist()[:5]}"
            )
        return replace(self, labels=self.labels[chosen], indices=self.indices[chosen])

    def sample(self, count: int, seed: int) -> ImageDataset:
        """Return ``count`` images drawn without replacement, in their original order.

        Raises:
            PatchproofError: a count below 1 or above the number of images.
        """
        if not 1 <= count <= len(self):
            raise PatchproofError(f"expected a sample of 1 to {len(self)} images, got {count}")
        generator = torch.Generator().manual_seed(seed)
        return self.subset(torch.randperm(len(self), generator=generator)[:count].sort().values)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Decode everything: images (N, C, H, W) uint8 and labels (N,) int64."""
        images = torch.empty((len(self), self.channels, *self.image_size), dtype=torch.uint8)
        for position in range(len(self)):
            images[position] = self._pixels(position)
        return images, self.labels

    def digest(self) -> str:
        """Return the SHA-256 of the stored images, their labels, and the size they are read at."""
        digest = hashlib.sha256(f"{self.channels} {self.image_size} {self.resized}".encode())
        for index, label in zip(self.indices.tolist(), self.labels.tolist(), strict=True):
            content = self.pictures.content(index)
            digest.update(f" {label} {len(content)} ".encode())
            digest.update(content)
        return digest.hexdigest()

    def _pixels(self, position: int) -> Tensor:
        """Decode one image, (C, H, W) uint8."""
        index = int(self.indices[position])
        try:
            picture = self.pictures.open(index)
            picture.load()
        except _DECODING_ERRORS as error:
            raise CorruptImageError(
                f"cannot decode {self.pictures.describe(index)}: {error}"
            ) from error
        if self.channels == 1 and picture.mode not in _GREY_MODES:
            raise PatchproofError(
                f"expected a grey image like the others, got mode {picture.mode} in "
                f"{self.pictures.describe(index)}"
            )
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        if self.resized:
            picture = _resize_and_crop(picture, self.image_size)
        if picture.size[::-1] != self.image_size:
            raise PatchproofError(
                f"expected images of {self.image_size} pixels, got {picture.size[::-1]} in "
                f"{self.pictures.describe(index)}; give an image size to resize and crop to"
            )
        pixels = torch.from_numpy(np.array(picture))
        return pixels.unsqueeze(0) if self.channels == 1 else pixels.permute(2, 0, 1)


def _resize_and_crop(picture: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """Scale a picture to the smallest size that contains (H, W), then crop its centre."""
    from PIL.Image import Resampling

    height, width = size
    scale = max(height / picture.height, width / picture.width)
    scaled = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    if scaled != picture.size:
        picture = picture.resize(scaled, Resampling.BICUBIC)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return picture.crop((left, top, left + width, top + height))


def survey(pictures: Pictures, indices: Sequence[int]) -> tuple[set[tuple[int, int]], int]:
    """Return the sizes (H, W) and the channels of some images, from their headers.

    Images that cannot be decoded are passed over. The images are grey (1 channel) if all are, else
    RGB (3 channels).
    """
    sizes: set[tuple[int, int]] = set()
    grey = True
    for index in indices:
        try:
            picture = pictures.open(index)
        except _DECODING_ERRORS:
            continue
        sizes.add((picture.height, picture.width))
        grey &= picture.mode in _GREY_MODES
    return sizes, 1 if grey else 3
