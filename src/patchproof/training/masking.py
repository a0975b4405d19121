"""Which pixels a training image loses: two random squares, or the two masks that hurt most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.threat import MaskSet, Threat


@dataclass(frozen=True)
class GreedyMasks:
    """Where greedy cutout looks for its pair: the masks of a defense.

    Attributes:
        threat: what the defense's masks cover.
        masks_per_side: how many masks down and across, as for ``MaskSet.for_threat``.
        candidates: masks drawn at random to be tried, per image and round; all where there are no
            more. Each one costs a forward pass.
    """

    threat: Threat
    masks_per_side: tuple[int, int] = (6, 6)
    candidates: int = 8

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise PatchproofError(f"expected at least 1 candidate mask, got {self.candidates}")

    def masked(self, image_size: tuple[int, int]) -> Tensor:
        """Return the pixels that each mask hides, (M, H, W) bool.

        Raises:
            PatchproofError: a patch or a number of masks that images of (H, W) pixels do not allow.
        """
        return MaskSet.for_threat(self.threat, image_size, self.masks_per_side).masked()

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        return {
            "threat": self.threat.to_dict(),
            "masks_per_side": list(self.masks_per_side),
            "candidates": self.candidates,
        }


def random_squares(count: int, image_size: tuple[int, int], sizes: tuple[int, int]) -> Tensor:
    """Draw two squares for each of some images; they may hang over the border.

    Args:
        count: number of images.
        image_size: (H, W) in pixels.
        sizes: smallest and largest side, in pixels; sides are uniform in between, and centres
            uniform in the image.

    Returns:
        (N, 1, H, W) bool, True in the squares.
    """
    sides = torch.randint(sizes[0], sizes[1] + 1, (count, 2, 1))
    covered = []
    for length in image_size:
        start = torch.randint(0, length, (count, 2, 1)) - sides // 2
        pixels = torch.arange(length)
        covered.append((pixels >= start) & (pixels < start + sides))
    rows, columns = covered
    return (rows.unsqueeze(3) & columns.unsqueeze(2)).any(1, keepdim=True)


@torch.no_grad()
def greedy_pair(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Tensor,
    candidates: int,
    fill: float,
) -> Tensor:
    """Find two masks for each image under which the network errs most (Saha et al., 2023).

    The first is the mask of the largest cross-entropy among the candidates, the second the one of
    the largest cross-entropy on top of the first. The network is asked in eval mode, so that
    neither dropout nor a batch normalisation's statistics take part, and left in its mode.

    Args:
        network: from images to logits.
        images: (N, C, H, W) in [0, 1].
        labels: (N,) int64.
        masks: (M, H, W) bool, the pixels that each mask hides.
        candidates: masks tried per image in each round, drawn anew for the second.
        fill: value of the masked pixels.

    Returns:
        (N, 1, H, W) bool, True in the union of the two masks.
    """
    training = network.training
    network.eval()
    covered = torch.zeros_like(images[:, :1], dtype=torch.bool)
    for _ in range(2):
        tried = draw_candidates(len(images), len(masks), candidates).to(masks.device)
        losses = torch.stack(
            [
                functional.cross_entropy(
                    network(images.masked_fill(covered | masks[choice].unsqueeze(1), fill)),
                    labels,
                    reduction="none",
                )
                for choice in tried.unbind(1)
            ]
        )
        worst = tried.gather(1, losses.argmax(0).unsqueeze(1)).squeeze(1)
        covered = covered | masks[worst].unsqueeze(1)
    network.train(training)
    torch.clear_autocast_cache()  # weights cast here, without gradients, are not to be used again
    return covered


def draw_candidates(count: int, masks: int, candidates: int) -> Tensor:
    """Draw distinct masks for each of ``count`` images, (N, min(candidates, M)) int64.

    All masks in their order, and nothing random, where ``candidates`` is not below their number.
    """
    if candidates >= masks:
        return torch.arange(masks).expand(count, -1)
    return torch.rand(count, masks).topk(candidates, dim=1).indices
