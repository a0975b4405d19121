"""Whatever a program has set before, certificates compute in float32, and it finds its settings."""

from collections.abc import Iterator

import pytest
import torch
from torch.backends import cuda, cudnn, mkldnn

from patchproof.precision import direct_inference, exact_inference

CPU = torch.device("cpu")
KINDS = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)


def precisions() -> list[str]:
    return [kind.fp32_precision for kind in KINDS]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    old, before, everything = (
        torch.get_float32_matmul_precision(),
        precisions(),
        torch.backends.fp32_precision,
    )
    yield
    torch.backends.fp32_precision = everything
    torch.set_float32_matmul_precision(old)
    for kind, precision in zip(KINDS, before, strict=True):
        kind.fp32_precision = precision


def test_everything_as_pytorch_starts(restored):
    before = precisions()
    with exact_inference(CPU):
        assert precisions() == ["ieee"] * len(KINDS)
        assert torch.get_float32_matmul_precision() == "highest"
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("inference", [exact_inference, direct_inference])
@pytest.mark.parametrize("old", ["high", "medium"])
def test_the_setting_of_all_products(inference, old):
    torch.set_float32_matmul_precision(old)
    before = precisions()
    with inference(CPU):
        assert precisions() == ["ieee"] * len(KINDS)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not cuda.matmul.allow_tf32  # what compiled models ask
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == old


@pytest.mark.parametrize("inference", [exact_inference, direct_inference])
@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        (cuda.matmul, "tf32"),
        (cudnn.conv, "ieee"),  # differs from cudnn.rnn then
        (mkldnn.conv, "bf16"),
        (mkldnn.matmul, "bf16"),
        (torch.backends, "tf32"),
    ],
)
def test_the_setting_of_a_kind_of_operator(inference, kind, precision):
    kind.fp32_precision = precision
    before = precisions()
    with inference(CPU):
        assert precisions() == ["ieee"] * len(KINDS)
    assert precisions() == before
    assert kind.fp32_precision == precision


def test_cudnn_is_as_it_was():
    cudnn.benchmark = True
    try:
        with exact_inference(CPU):
            assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == (True, False, True)
        with direct_inference(CPU):
            assert not cudnn.enabled
        assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == (True, True, False)
    finally:
        cudnn.benchmark = False
