"""The images under way in the evaluation loop, and which of their views come next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchproof.aggregation.base import CERTAIN
from patchproof.results import Outputs

_TRIED_AT_ONCE = 4
"""Views of one image in one batch, beyond those needed in any case: with more, more are wasted when
one of them decides; with fewer, the steps get smaller."""

_GROWTH = 8
"""An image that has had more than this times as many views tried gets more at once."""


@dataclass(eq=False)
class Pool:
    """Images that are not decided yet.

    Attributes:
        keys: the caller's names for the N images.
        images: (N, C, H, W) float32, on the model's device.
        labels: (N,) int64.
        outputs: what is known of their views.
        forwards: (N,) int64, the model forwards spent on each.
    """

    keys: list[int]
    images: Tensor
    labels: Tensor
    outputs: Outputs
    forwards: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def select(self, chosen: Tensor) -> Pool:
        """Return some of the images, by (n,) indices."""
        return Pool(
            [self.keys[index] for index in chosen.tolist()],
            self.images[chosen.to(self.images.device)],
            self.labels[chosen],
            self.outputs.select(chosen),
            self.forwards[chosen],
        )

    @classmethod
    def join(cls, pool: Pool, more: Pool) -> Pool:
        """Return the images of both."""
        return cls(
            pool.keys + more.keys,
            torch.cat([pool.images, more.images]),
            torch.cat([pool.labels, more.labels]),
            Outputs.concatenate([pool.outputs, more.outputs]),
            torch.cat([pool.forwards, more.forwards]),
        )

    def record(self, image: Tensor, forward: Tensor, scores: Tensor) -> None:
        """Enter the (B, per_forward, classes) scores of the pairs of image and forward."""
        per_forward = scores.shape[1]
        views = forward[:, None] * per_forward + torch.arange(per_forward)
        self.outputs.record(image[:, None].expand_as(views), views, scores)
        self.forwards.index_add_(0, image, torch.ones_like(image))


def choose(
    priority: Tensor, forwards: Tensor, batch_size: int, fill: bool = False
) -> tuple[Tensor, Tensor]:
    """Choose the next batch: of each image, in order, the views of highest priority.

    Args:
        priority: (N, F), 0 where a view is not wanted.
        forwards: (N,) int64, the model forwards already spent on each image.
        batch_size: how many views to choose at most.
        fill: try more of each image at once, to fill a batch when there are no more images.

    Returns:
        The image and the forward of each chosen view, (B,) int64 each.
    """
    limit = (forwards // _GROWTH).clamp(min=_TRIED_AT_ONCE)
    if fill:
        open_images = max(1, int((priority.amax(1) > 0).sum()))
        limit = limit.clamp(min=-(-batch_size // open_images))
    certain = (priority >= CERTAIN).sum(1)
    most = int(torch.maximum(limit, certain).amax()) if len(limit) else 0
    value, forward = priority.topk(min(most, priority.shape[1]), dim=1)
    rank = torch.arange(value.shape[1])
    taken = (value > 0) & ((rank < limit[:, None]) | (value >= CERTAIN))
    image, place = taken.nonzero()[:batch_size].unbind(1)
    return image, forward[image, place]
