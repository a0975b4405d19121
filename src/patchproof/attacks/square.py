"""Random search in the patch, without gradients (Square Attack; Andriushchenko et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from patchproof.attacks.base import CLEAR_LEAD, PatchAttack, Problem
from patchproof.errors import PatchproofError

_FALLS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Parts of the search after which the squares' area halves, as in the paper's Section 4."""


@dataclass(frozen=True, kw_only=True)
class SquareSearch(PatchAttack):
    """A black-box search: squares inside the patch take colours, and stay if it does no worse.

    The patch starts as upright stripes. Each step lays a square over a random pixel of the patch
    and paints what it covers of the patch in a corner of the colour cube; all patches of a threat
    are one canvas. It stays unless the objective falls: the lead in a surrogate's scores, or, of a
    victim that gives labels alone, whether the attack succeeds, which makes it a plain random walk.

    Attributes:
        steps: squares that are tried; each takes one forward pass.
        first_share: what part of the patch's pixels the first squares cover; it halves nine times.

    Raises:
        PatchproofError: numbers out of range.
    """

    steps: int = 300
    first_share: float = 0.8

    name: ClassVar[str] = "square"
    needs_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.steps, int) or self.steps < 1:
            raise PatchproofError(f"steps: expected at least 1, got {self.steps!r}")
        if not 0.0 < self.first_share <= 1.0:
            raise PatchproofError(f"first_share: expected in (0, 1], got {self.first_share!r}")

    def optimise(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Search, and return what is left at the end: no step made it worse."""
        exact = problem.scores is None or bool(getattr(problem.scores, "exact", False))
        channels, _, width = problem.images.shape[1:]
        stripes, draws = _drawn(problem.seeds, self.steps, channels, width)
        best = problem.paste(stripes.to(problem.images.device)[:, :, None])
        objective = problem.lead(best)
        rows, left = torch.arange(len(best), device=best.device), problem
        for step, draw in enumerate(draws.to(best.device).unbind(1)):
            if exact and bool((won := objective[rows] > CLEAR_LEAD).any()):
                rows = rows[~won]
                if not len(rows):
                    break
                left = problem.select(rows)
            painted = painting(left.inside, self.share_at(step), draw[rows, :3])
            colour = draw[rows, 3:].round()[:, :, None, None]
            given = best[rows]
            unchanged = ((given == colour) | ~painted).flatten(1).all(1)[:, None, None, None]
            tried = torch.where(painted, torch.where(unchanged, 1 - colour, colour), given)
            found = left.lead(tried)
            stays = found >= objective[rows]
            best[rows[stays]] = tried[stays]
            objective[rows[stays]] = found[stays]
        return best, objective

    def share_at(self, step: int) -> float:
        """Return what part of the patch's pixels the squares of a step cover, from step 0 on."""
        return self.first_share * 0.5 ** sum(step >= part * self.steps for part in _FALLS)


def painting(inside: Tensor, share: float, draw: Tensor) -> Tensor:
    """Return what a random square covers of each patch, (B, 1, H, W) bool.

    Args:
        inside: (B, 1, H, W) bool, the pixels of the patches, at least one in each row.
        share: of the pixels of a patch that the square's area is, to the nearest side.
        draw: (B, 3) random numbers in [0, 1): which pixel it covers for sure, and where in
            the square that pixel is.
    """
    height, width = inside.shape[2:]
    flat = inside.flatten(1).int()
    area = flat.sum(1)
    side = (share * area).sqrt().round().clamp(min=1).long()
    rank = (draw[:, 0] * area).long().clamp(max=area - 1)
    pixel = (flat.cumsum(1) == rank[:, None] + 1).int().argmax(1)
    top = pixel // width - (draw[:, 1] * side).long().clamp(max=side - 1)
    left = pixel % width - (draw[:, 2] * side).long().clamp(max=side - 1)
    covered = []
    for start, length in ((top, height), (left, width)):
        there = torch.arange(length, device=inside.device)[None]
        covered.append((there >= start[:, None]) & (there < (start + side)[:, None]))
    return inside & (covered[0][:, None, :, None] & covered[1][:, None, None, :])


def _drawn(seeds: Tensor, steps: int, channels: int, width: int) -> tuple[Tensor, Tensor]:
    """Return stripes of 0 and 1, (B, C, W), and numbers in [0, 1), (B, steps, 3 + C), by seed."""
    stripes, draws = [], []
    for seed in seeds.tolist():
        generator = np.random.default_rng((seed, 3))
        stripes.append(generator.random((channels, width), dtype=np.float32).round())
        draws.append(generator.random((steps, 3 + channels), dtype=np.float32))
    return torch.from_numpy(np.stack(stripes)), torch.from_numpy(np.stack(draws))
