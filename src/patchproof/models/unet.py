"""The guide of guided training: a U-Net that sees an image and predicts the margins of each place.

Chiang et al. (ICLR 2020), Section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError


class GuideUNet(nn.Module):
    """A small U-Net from images to a map over the places of a patch for each class.

    Half and quarter of the resolution, added back by skip connections; no normalisation. With
    width 4 it has half a million multiply-adds at 28x28. Output (r, c) is aligned with the centre
    of the patch whose top row is r and whose left column is c.

    Args:
        classes: number of classes, one map each.
        channels: channels of the images.
        image_size: (H, W) of the images, in pixels.
        places: (rows, columns) of places: H - h + 1 and W - w + 1 for patches of h by w pixels.
        width: channels at full resolution; twice and four times as many below.

    Raises:
        PatchproofError: places that do not fit the images, or a width below 1.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        image_size: tuple[int, int],
        places: tuple[int, int],
        width: int = 8,
    ) -> None:
        super().__init__()
        if not all(1 <= place <= side for place, side in zip(places, image_size, strict=True)):
            raise PatchproofError(
                f"expected places from (1, 1) to the {image_size} pixels, got {places}"
            )
        if width < 1:
            raise PatchproofError(f"expected a positive width, got {width}")
        self.image_size, self.places = image_size, places
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.to_half = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.to_quarter = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1)
        self.bottom = nn.Conv2d(4 * width, 4 * width, 3, padding=1)
        self.narrow_quarter = nn.Conv2d(4 * width, 2 * width, 1)
        self.up_half = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.narrow_half = nn.Conv2d(2 * width, width, 1)
        self.up_full = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, classes, 1)
        self.to(memory_format=torch.channels_last)  # convolutions run fastest so

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to predicted margins (N, classes, rows, columns).

        Raises:
            PatchproofError: images of another size.
        """
        return self.everywhere(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Map images to what the last convolutions see, (N, width, H, W).

        Raises:
            PatchproofError: images of another size.
        """
        if tuple(images.shape[2:]) != self.image_size:
            raise PatchproofError(
                f"expected images of {self.image_size} pixels, got {tuple(images.shape[2:])}"
            )
        full = torch.relu(self.enter(images))
        half = torch.relu(self.to_half(full))
        quarter = torch.relu(self.to_quarter(half))
        quarter = torch.relu(self.bottom(quarter))
        half = torch.relu(self.up_half(_double(self.narrow_quarter(quarter), half)))
        return _double(self.narrow_half(half), full)

    def everywhere(self, features: Tensor) -> Tensor:
        """Return the margins of all places, (N, classes, rows, columns)."""
        top, left = self._corner()
        rows, columns = self.places
        full = torch.relu(self.up_full(features))[:, :, top : top + rows, left : left + columns]
        margins: Tensor = self.head(full)
        return margins

    def at(self, features: Tensor, places: Tensor) -> Tensor:
        """Return the margins of some places (N, n) alone, numbered rows first, (N, classes, n).

        A step that learns from few places need not go back through all of them.
        """
        top, left = self._corner()
        columns, width = self.places[1], self.image_size[1] + 2
        first = (places // columns + top) * width + places % columns + left
        around = torch.arange(3, device=places.device)
        around = (around[:, None] * width + around).flatten()
        index = (first[:, :, None] + around).flatten(1)[:, None]
        padded = functional.pad(features, (1, 1, 1, 1)).flatten(2)
        seen = padded.gather(2, index.expand(-1, features.shape[1], -1))
        seen = seen.reshape(*seen.shape[:2], -1, 3)  # three rows a place
        weight, bias = self.up_full.weight, self.up_full.bias
        margins: Tensor = self.head(torch.relu(functional.conv2d(seen, weight, bias, stride=3)))
        return margins.squeeze(3)

    def _corner(self) -> tuple[int, int]:
        """Return the row and column whose output is of the first place."""
        top, left = (
            (side - place) // 2 for side, place in zip(self.image_size, self.places, strict=True)
        )
        return top, left


def _double(features: Tensor, skipped: Tensor) -> Tensor:
    """Repeat every pixel of the features twice each way, and add them to the skipped ones."""
    height, width = skipped.shape[2:]
    doubled = functional.interpolate(features, scale_factor=2, mode="nearest")
    return doubled[:, :, :height, :width] + skipped
