"""What a defense hands to an attacker who uses gradients: a differentiable stand-in for itself."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn


class Surrogate(nn.Module):
    """From images (N, C, H, W) in [0, 1] to scores (N, classes) that ``predict`` about follows.

    The class of the highest score is, about, what the defense says, and whoever raises the score of
    a wrong class above the label's is nearer to a wrong prediction. It is an ordinary module in
    eval mode, so that any attack can take it for a classifier. What counts as success is decided by
    the defense's own ``predict``, never by this.

    Attributes:
        exact: whether the class of the highest score is what ``predict`` returns, but for rounding.
    """

    exact = False

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return the scores, (N, classes) float32, differentiable in the images."""

    def redraw(self, seed: int) -> None:
        """Start anew whatever is drawn at random, such as the views of each call."""


class NetworkScores(Surrogate):
    """The scores of a network as they are: of defenses whose label is the network's own.

    Args:
        network: from images to logits, in eval mode.
        exact: see ``Surrogate``; False where another answer than the network's counts.
    """

    def __init__(self, network: nn.Module, exact: bool = True) -> None:
        super().__init__()
        self.network = network
        self.exact = exact
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (N, classes)."""
        scores: Tensor = self.network(images)
        return scores
