"""Networks that move what a feature saw, where a comparison swallows a planted NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.views import receptive_fields


class Signs(nn.Module):
    """Whether local logits are positive; a NaN is not."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Conv2d(1, 2, 3)

    def signs(self, images: Tensor) -> Tensor:
        return (self.local(images) > 0).to(images.dtype)


class MovedInPlace(Signs):
    def local_logits(self, images: Tensor) -> Tensor:
        signs = self.signs(images)
        signs[:, :, 0] = signs[:, :, -1]
        return signs


class MoreDimensions(Signs):
    def local_logits(self, images: Tensor) -> Tensor:
        signs = self.signs(images) + torch.zeros(1, 1, 1, 1, 1, device=images.device)
        return signs.cumsum(3)[0]  # down, which is dimension 2 of ``signs``


class ThroughForward(Signs):
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.local(images)
        return logits

    def local_logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self(images)
        return logits


def test_an_output_that_was_written_to_through_a_view_is_refused() -> None:
    with pytest.raises(PatchproofError, match="changed in place"):
        receptive_fields(MovedInPlace().eval(), (9, 11), 1)


def test_constants_with_more_dimensions_leave_rows_rows() -> None:
    assert receptive_fields(MoreDimensions().eval(), (9, 11), 1).size == (9, 3)


def test_local_logits_may_be_what_the_network_returns() -> None:
    assert receptive_fields(ThroughForward().eval(), (9, 11), 1).size == (3, 3)
