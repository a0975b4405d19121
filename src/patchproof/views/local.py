"""The local features of one network as views (PatchGuard, Section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.models.bagnet import local_logits
from patchproof.results import Corruption
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize
from patchproof.views.receptive import receptive_fields


class LocalFeatureViews:
    """What each local feature of a network with small receptive fields sees.

    One forward pass yields all of them. A feature is corrupted by the regions that its receptive
    field, as computed from the network, meets.

    Args:
        model: a network with ``local_logits``, in eval mode.
        image_size: (H, W) in pixels.
        channels: of the images; None for those of the network's first convolution.

    Attributes:
        count: V = h * w.
        per_forward: V.
        grid: (h, w), the size of the feature map; views are numbered row by row.
        wraps: whether neighbouring features go on across the border, along rows and columns: no.
        fields: the receptive fields.

    Raises:
        PatchproofError: a network whose features see the whole image, or of which it is not known
            what they see; the message names the layer.
    """

    wraps = (False, False)

    def __init__(
        self, model: nn.Module, image_size: ImageSize, channels: int | None = None
    ) -> None:
        channels = _channels(model) if channels is None else channels
        self.fields = receptive_fields(model, image_size, channels)
        self.grid = self.fields.grid
        self.count = self.per_forward = self.grid[0] * self.grid[1]

    def corruption(self, threat: Threat) -> Corruption:
        """Enumerate which features each patch region corrupts: those that see a pixel of it."""
        return threat.corruption(self.fields.pixels())

    def evaluate(self, model: nn.Module, images: Tensor, forwards: Tensor) -> Tensor:
        """Return the local logits, (B, V, classes), of each image; ``forwards`` are all 0."""
        logits = local_logits(model, images)
        if logits.ndim != 4 or tuple(logits.shape[2:]) != self.grid:
            raise PatchproofError(
                f"model: expected local logits of shape (N, classes, {self.grid[0]}, "
                f"{self.grid[1]}), got {tuple(logits.shape)}"
            )
        return logits.flatten(2).transpose(1, 2)


def _channels(model: nn.Module) -> int:
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
    raise PatchproofError("channels: expected a number for a network without convolutions")
