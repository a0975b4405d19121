"""No defense: a network as it is, to be attacked like one."""

from __future__ import annotations

from patchproof.defenses.preprocessed import PreprocessedDefense


class Undefended(PreprocessedDefense):
    """A network by itself, which the others are compared with.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: what an attacker may do, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        batch_size: images in one forward pass; None picks one by the size of the image.
        memory_budget: bytes that the activations of one batch may take, by an estimate from the
            layers' inputs and outputs; None for no limit.

    Raises:
        PatchproofError: a model in training mode, or a patch that does not fit in the image.
    """

    _OWN = ()

    def describe(self) -> str:
        """Say that there is no defense."""
        return "the network by itself, undefended"
