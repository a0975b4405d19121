"""timm models in the size of small images: no resize in front, and ResMLP as timm has it."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from patchproof.errors import PatchproofError
from patchproof.models import ModelSpec, Preprocessed, build_model
from patchproof.models.resmlp import PUBLISHED, resized_resmlp

VIT: dict[str, Any] = {"patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 2}
RESMLP: dict[str, Any] = {"patch_size": 4, "num_blocks": 1, "embed_dim": 24}


@pytest.mark.parametrize(
    ("name", "options"), [("timm:vit_tiny_patch16_224", VIT), ("timm:resmlp_12_224", RESMLP)]
)
@pytest.mark.parametrize(("side", "channels"), [(28, 1), (32, 3)])
def test_small_images_are_classified_in_their_own_size(
    name: str, options: dict[str, Any], side: int, channels: int
) -> None:
    torch.manual_seed(0)
    spec = ModelSpec(name, 10, channels, (side, side), options | {"img_size": side})
    model = build_model(spec)
    assert isinstance(model, Preprocessed)
    assert model.input_size == (side, side)
    assert len(model.mean.flatten()) == channels
    assert model(torch.rand(2, channels, side, side)).shape == (2, 10)


def test_a_model_of_its_published_size_resizes_small_images() -> None:
    model = build_model(ModelSpec("timm:resnet18", 10, 3, (32, 32)))
    assert isinstance(model, Preprocessed)
    assert model.input_size == (224, 224)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_sizes_are_those_of_timm(name: str) -> None:
    timms = timm.create_model(name, device="meta")
    ours = resized_resmlp(name, 1000, 3, {"device": "meta"})
    assert {n: t.shape for n, t in ours.state_dict().items()} == {
        n: t.shape for n, t in timms.state_dict().items()
    }


@pytest.mark.parametrize("name", ["resmlp_12_224", "resmlp_24_224"])
def test_residual_branches_start_at_the_scale_of_timm(name: str) -> None:
    timms = timm.create_model(name, img_size=16)
    ours = resized_resmlp(name, 10, 3, RESMLP)
    expected, got = (model.state_dict()["blocks.0.ls1"] for model in (timms, ours))
    assert float(expected[0]) == float(got[0]) != 1.0


def test_options_that_resmlp_does_not_take_are_refused() -> None:
    with pytest.raises(PatchproofError, match="expected options that timm:resmlp_12_224 takes"):
        build_model(ModelSpec("timm:resmlp_12_224", 10, 3, (32, 32), {"depth": 4}))
