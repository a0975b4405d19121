"""Where a model runs."""

from __future__ import annotations

import torch
from torch import nn

from patchproof.defenses.inference import model_device


def test_a_model_without_parameters_runs_where_its_buffers_are() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("values", torch.empty(1, device="meta"))

    assert model_device(Buffered()) == torch.device("meta")
    assert model_device(nn.Sequential(Buffered(), nn.Linear(1, 1))) == torch.device("cpu")
    assert model_device(nn.Identity()) == torch.device("cpu")
