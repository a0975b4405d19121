"""ResMLP of timm in other sizes than those it is published in."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

PUBLISHED = {
    "resmlp_12_224": (16, 12, 384, 1e-4),
    "resmlp_24_224": (16, 24, 384, 1e-5),
    "resmlp_36_224": (16, 36, 384, 1e-6),
    "resmlp_big_24_224": (8, 24, 768, 1e-6),
}
"""Patch size in pixels, blocks, width, and first scale of the residual branches, as in timm."""


def resized_resmlp(name: str, classes: int, channels: int, options: Mapping[str, Any]) -> nn.Module:
    """Build a ResMLP whose patches, blocks or width differ from the published ones.

    ``timm.create_model`` refuses these options for ResMLP, since its functions set them already;
    the network's class takes them.

    Args:
        name: one of ``PUBLISHED``; what ``options`` leave out is as there.
        classes: number of classes.
        channels: channels of the images.
        options: keyword arguments of timm's ``MlpMixer``, such as ``img_size``, ``patch_size``,
            ``num_blocks`` and ``embed_dim``.

    Returns:
        The untrained network, with timm's ``pretrained_cfg`` of ``name``.
    """
    from timm.models import get_pretrained_cfg
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    patch, blocks, width, scale = PUBLISHED[name]
    sizes = {"patch_size": patch, "num_blocks": blocks, "embed_dim": width, "mlp_ratio": 4}
    block: Any = partial(ResBlock, init_values=scale)
    model: Any = MlpMixer(
        num_classes=classes,
        in_chans=channels,
        block_layer=block,
        norm_layer=Affine,
        **(sizes | dict(options)),
    )
    published: Any = get_pretrained_cfg(name)
    model.pretrained_cfg = published.to_dict()
    network: nn.Module = model
    return network
