"""Recipes for bags of local features: train on what a defense makes of the local logits.

Each recipe has one function from the local logits of an image (classes, h, w) to one score a class,
the defense's own aggregation, and minimises the cross-entropy of these scores:

- ``masked-evidence``: the mean of the clipped logits without the window of the label's largest
  evidence, "provable adversarial training" (PatchGuard, Appendix A);
- ``clipped``: the mean of tanh(0.05 u - 1) (Clipped BagNet, Zhang et al., 2020);
- ``median``, ``trimmed-mean`` and ``top-masking``: the mean of some ranks of the clipped logits
  (PatchGuard, Section 6.2 and Appendix E).

Training starts best from a network that the recipe ``plain`` made, whose score is the mean of the
logits. From random weights, no evidence at all is a trap: while a network knows little, the label
without its best window loses to the others, and least so where all evidence is 0. A share of the
loss that is the one of ``plain`` (``clean_share``) leads out of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec, bagnet
from patchproof.training.recipe import Recipe

Statistic = Literal["median", "trimmed-mean", "top-masking"]

SLOPE_BELOW_ZERO = 0.1
"""Share of the gradient that passes to logits below the clipping bound 0, which otherwise could
never rise above it again."""


@dataclass(frozen=True, kw_only=True)
class LocalRecipe(Recipe):
    """Train a network with ``local_logits``, (N, C, H, W) -> (N, classes, h, w).

    Attributes:
        scale: what the scores are multiplied by before the cross-entropy.
        clean_share: share of the loss that is the cross-entropy of the mean of all local logits.
    """

    scale: float = 1.0
    clean_share: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.scale < float("inf"):
            raise PatchproofError(f"expected a positive scale, got {self.scale}")
        if not 0.0 <= self.clean_share < 1.0:
            raise PatchproofError(
                f"expected a clean_share from 0 to below 1, got {self.clean_share}"
            )

    @property
    def measures(self) -> Mapping[str, str]:
        """Return the accuracy of the scores."""
        return {"clean_accuracy": "validation accuracy"}

    @property
    def chosen_by(self) -> str:
        """Return the accuracy of the scores."""
        return "clean_accuracy"

    def draw(self, spec: ModelSpec, count: int) -> Tensor | None:
        """Return None: nothing is random."""
        return None

    def check(self, network: nn.Module, spec: ModelSpec) -> None:
        """Raise ``PatchproofError`` if the network has no local logits."""
        check_local_logits(network)

    @abstractmethod
    def scores(self, local: Tensor, labels: Tensor) -> Tensor:
        """Return the scores (N, classes) to train on, of local logits (N, classes, h, w)."""

    def robust_loss(self, local: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of the scores."""
        return self._cross_entropy(self.scale * self.scores(local, labels), labels)

    def loss(
        self, network: nn.Module, views: Tensor, labels: Tensor, drawn: Tensor | None
    ) -> Tensor:
        """Return the loss of the scores, mixed with that of the mean of all local logits."""
        local = local_logits(network, views)
        robust = (1 - self.clean_share) * self.robust_loss(local, labels)
        if self.clean_share == 0:
            return robust
        return robust + self.clean_share * self._cross_entropy(local.mean((2, 3)), labels)

    def _cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(scores, labels, label_smoothing=self.label_smoothing)

    def validate(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        drawn: Tensor | None,
        positions: slice,
    ) -> dict[str, Tensor]:
        """Return which images have the label as the class of the highest score."""
        scores = self.scores(local_logits(network, images), labels)
        return {"clean_accuracy": scores.argmax(1) == labels}


@dataclass(frozen=True, kw_only=True)
class MaskedEvidenceRecipe(LocalRecipe):
    """Provable adversarial training: the label must win without its best window.

    The window of the label's largest evidence (logits clipped at 0) is masked for all classes, and
    the mean over all cells of what is left is trained on. With ``masks=2`` the label loses one more
    window, the largest of what is left, which is what robust masking would take from it after an
    attack on the first: Algorithm 2 at T = 0 for that window. The epoch is chosen by the share of
    images that are right after masking so.

    Attributes:
        window: (rows, columns) of a window in features, as the defense masks them.
        masks: 1, as the paper trains, or 2.
    """

    window: tuple[int, int]
    masks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.window) < 1:
            raise PatchproofError(f"expected a window from 1x1, got {self.window}")
        if self.masks not in (1, 2):
            raise PatchproofError(f"expected 1 or 2 evidence masks, got {self.masks}")

    @property
    def name(self) -> str:
        """Return ``masked-evidence``."""
        return "masked-evidence"

    @property
    def measures(self) -> Mapping[str, str]:
        """Return the accuracy of robust masking (T = 0), and with the label's windows masked."""
        windows = "window" if self.masks == 1 else "two windows"
        return {
            "clean_accuracy": "validation accuracy with robust masking",
            "masked_accuracy": f"without the label's best {windows}",
        }

    @property
    def chosen_by(self) -> str:
        """Return the accuracy with the label's windows masked."""
        return "masked_accuracy"

    def check(self, network: nn.Module, spec: ModelSpec) -> None:
        """Raise ``PatchproofError`` if there are no local logits, or not more than a window."""
        super().check(network, spec)
        rows, columns = feature_map(network, spec)
        if self.window[0] > rows or self.window[1] > columns or self.window == (rows, columns):
            raise PatchproofError(
                f"expected a window smaller than the {rows}x{columns} features of the image, "
                f"got {self.window[0]}x{self.window[1]}"
            )

    def scores(self, local: Tensor, labels: Tensor) -> Tensor:
        """Return the mean of the evidence that is not masked."""
        return mask_best_windows(evidence(local), labels, self.window, self.masks).mean((2, 3))

    def validate(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        drawn: Tensor | None,
        positions: slice,
    ) -> dict[str, Tensor]:
        """Return which images are right with every class's best window masked, and the label's."""
        local = local_logits(network, images)
        windows = functional.avg_pool2d(evidence(local), self.window, 1)
        share = self.window[0] * self.window[1] / local[0, 0].numel()
        rest = evidence(local).mean((2, 3)) - share * windows.amax((2, 3))
        return {
            "clean_accuracy": rest.argmax(1) == labels,
            "masked_accuracy": self.scores(local, labels).argmax(1) == labels,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values."""
        return super().to_dict() | {"window": list(self.window)}


@dataclass(frozen=True, kw_only=True)
class ClippedRecipe(LocalRecipe):
    """Train on the mean of tanh(0.05 u - 1) over all cells, u their logits.

    With the default scale and label smoothing the cross-entropy is least at a lead of the label of
    about 0.45. A patch that corrupts k of V cells moves it by up to 2k / V.
    """

    scale: float = 10.0

    @property
    def name(self) -> str:
        """Return ``clipped``."""
        return "clipped"

    def scores(self, local: Tensor, labels: Tensor) -> Tensor:
        """Return the mean of the clipped logits, in (-1, 1)."""
        return torch.tanh(0.05 * local - 1).mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class RankRecipe(LocalRecipe):
    """Train on a robust statistic of the evidence of the cells (logits clipped at 0).

    Attributes:
        statistic: ``median``, the lower one of the middle two; ``trimmed-mean``, the mean without
            the ``trim`` least and the ``trim`` most; ``top-masking``, without the ``trim`` most.
        trim: number of cells; 0 for ``median``.
    """

    statistic: Statistic
    trim: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.statistic not in (known := get_args(Statistic)):
            raise PatchproofError(f"expected a statistic of {known}, got {self.statistic!r}")
        if self.trim != 0 if self.statistic == "median" else self.trim < 1:
            raise PatchproofError(f"trim: expected cells for {self.statistic}, got {self.trim}")

    @property
    def name(self) -> str:
        """Return the statistic."""
        return self.statistic

    def check(self, network: nn.Module, spec: ModelSpec) -> None:
        """Raise ``PatchproofError`` if there are no local logits, or trimming leaves none."""
        super().check(network, spec)
        rows, columns = feature_map(network, spec)
        if self.trim * (2 if self.statistic == "trimmed-mean" else 1) >= rows * columns:
            raise PatchproofError(
                f"trim: expected cells to be left of {rows}x{columns} for {self.statistic}, "
                f"got {self.trim}"
            )

    def scores(self, local: Tensor, labels: Tensor) -> Tensor:
        """Return the statistic of each class."""
        cells = evidence(local).flatten(2)
        if self.statistic == "median":
            return cells.median(2).values
        lowest = self.trim if self.statistic == "trimmed-mean" else 0
        return cells.sort(2).values[..., lowest : cells.shape[2] - self.trim].mean(2)


def check_local_logits(network: nn.Module) -> None:
    """Raise ``PatchproofError`` if the network has no local logits."""
    if not hasattr(network, "local_logits"):
        raise PatchproofError(
            "expected a network with local_logits, such as bagnet, to train its local features, "
            f"got {type(network).__name__}"
        )


def local_logits(network: nn.Module, images: Tensor) -> Tensor:
    """Return the local logits (N, classes, h, w) in float32, whatever they are computed in."""
    return bagnet.local_logits(network, images).float()


@torch.no_grad()
def feature_map(network: nn.Module, spec: ModelSpec) -> tuple[int, int]:
    """Return (rows, columns) of the local logits of an image; the network is in eval mode."""
    rows, columns = local_logits(network, torch.zeros(1, spec.channels, *spec.image_size)).shape[2:]
    return rows, columns


def evidence(local: Tensor) -> Tensor:
    """Return the logits clipped to at least 0, with a gradient below 0 too.

    The values are exactly those of PatchGuard's clipping with c_l = 0.
    """
    below = SLOPE_BELOW_ZERO * local.clamp(max=0)
    return local.clamp(min=0) + (below - below.detach())


def mask_best_windows(
    evidence: Tensor, labels: Tensor, window: tuple[int, int], masks: int
) -> Tensor:
    """Set the window of the label's largest evidence to 0.

    Args:
        evidence: (N, classes, h, w), at least 0.
        labels: (N,) int64.
        window: (rows, columns).
        masks: 1, or 2 for one more window of the label alone, the largest of what is left.

    Returns:
        (N, classes, h, w).
    """
    chosen = labels.reshape(-1, 1, 1, 1)
    own = evidence.detach().gather(1, chosen.expand(-1, 1, *evidence.shape[2:]))
    first = best_window(own, window)
    masked = evidence.masked_fill(first, 0.0)
    if masks == 2:
        second = best_window(own.masked_fill(first, 0.0), window)
        classes = torch.arange(evidence.shape[1], device=labels.device).reshape(1, -1, 1, 1)
        masked = masked.masked_fill(second & (classes == chosen), 0.0)
    return masked


def best_window(values: Tensor, window: tuple[int, int]) -> Tensor:
    """Return the window of the largest sum, the first of equal ones, (N, 1, h, w) bool.

    Args:
        values: (N, 1, h, w).
        window: (rows, columns).
    """
    means = functional.avg_pool2d(values, window, 1)
    best = means.flatten(1).argmax(1).reshape(-1, 1, 1, 1)
    top, left = best // means.shape[3], best % means.shape[3]
    rows, columns = (torch.arange(length, device=values.device) for length in values.shape[2:])
    inside_rows = (rows >= top.squeeze(3)) & (rows < top.squeeze(3) + window[0])
    inside_columns = (columns >= left.squeeze(3)) & (columns < left.squeeze(3) + window[1])
    return inside_rows.unsqueeze(3) & inside_columns.unsqueeze(2)
