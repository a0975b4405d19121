"""Vision transformers that drop the tokens of which nothing is kept (for ablated images).

A token of a hidden part of the image carries nothing but its position: without it, the transformer
gives the same attention to what is kept, at a cost that shrinks with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.models.ablation import Ablation, AblationKind, Kept, check_kept


class TokenDropTransformer(nn.Module):
    """A vision transformer that takes the tokens that see a kept pixel, with their positions.

    Hidden pixels that share a token with kept ones are filled. Images with as many tokens run
    together, without attention masks.

    Args:
        network: timm's ``VisionTransformer`` for images of one size.
        ablation: ``"column"``, ``"row"`` or ``"block"``.
        size: of the band or block, in pixels.
        mean: mean of each channel, in pixel units of [0, 1].
        std: standard deviation of each channel.
        fill: value of hidden pixels in tokens that are kept, in [0, 1].

    Attributes:
        ablation: what the network was made for.

    Raises:
        PatchproofError: another kind of network, or one without a fixed grid of tokens.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        ablation: AblationKind,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        fill: float = 0.5,
    ) -> None:
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        plain = isinstance(network, VisionTransformer) and isinstance(
            network.get_submodule("patch_drop"), nn.Identity
        )
        if not plain or network.dynamic_img_size or network.pos_embed is None:
            raise PatchproofError(
                "expected a timm vision transformer with learned positions of a fixed grid, got "
                f"{type(network).__name__}"
            )
        self.network: Any = network
        self.ablation = Ablation(ablation, size)
        self.fill = fill
        for name, values in (("mean", mean), ("std", std)):
            shaped = torch.tensor(list(values)).reshape(1, -1, 1, 1)
            self.register_buffer(name, shaped, persistent=False)

    def ablated(self, images: Tensor, kept: Kept) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W) in [0, 1] of which parts are kept.

        Raises:
            PatchproofError: parts of another shape than the network was made for, or images of
                another size.
        """
        image_size = (images.shape[2], images.shape[3])
        check_kept(self.ablation, kept, image_size)
        shown = kept.pixels(image_size)[:, None]
        tokens = self._tokens(torch.where(shown, images, self.fill))
        patch = self.network.patch_embed.patch_size
        seen = functional.max_pool2d(shown.to(images.dtype), patch).flatten(1) > 0
        prefix = tokens.shape[1] - seen.shape[1]
        seen = functional.pad(seen, (prefix, 0), value=True)
        counts = seen.sum(1)
        order = counts.argsort(stable=True)
        logits = []
        sizes: list[int] = counts.bincount().tolist()
        for group in torch.split(order, [size for size in sizes if size]):
            chosen = seen[group].nonzero()[:, 1].view(len(group), -1)
            logits.append(
                self._classify(
                    tokens[group].gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
                )
            )
        return torch.cat(logits)[order.argsort()]

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1], nothing hidden, to logits (N, classes)."""
        return self._classify(self._tokens(images))

    def _tokens(self, images: Tensor) -> Tensor:
        """Return the tokens of images with their positions, (N, prefix + T, D)."""
        expected = tuple(self.network.patch_embed.img_size)
        if tuple(images.shape[2:]) != expected:
            raise PatchproofError(
                f"expected images of {expected} pixels, got {tuple(images.shape[2:])}: "
                "set the option img_size"
            )
        embedded = self.network.patch_embed((images - self.mean) / self.std)
        tokens: Tensor = self.network._pos_embed(embedded)
        return tokens

    def _classify(self, tokens: Tensor) -> Tensor:
        features = self.network.norm(self.network.blocks(self.network.norm_pre(tokens)))
        logits: Tensor = self.network.forward_head(features)
        return logits
