"""Receptive fields: computed from the network, equal to what a planted NaN marks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from patchproof.errors import PatchproofError
from patchproof.models import BagNet
from patchproof.threat import RectanglePatch
from patchproof.views import ReceptiveFields, receptive, receptive_fields
from patchproof.views.reach import output_reach
from patchproof.views.receptive import planted

SIZE = (18, 14)


class Local(nn.Module):
    """Local logits by layers and functions, after a first 3x3 convolution."""

    def __init__(self, *steps: nn.Module | Callable[[Tensor], Tensor], channels: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, padding=1)
        self.layers = nn.ModuleList(step for step in steps if isinstance(step, nn.Module))
        self.steps = steps

    def local_logits(self, images: Tensor) -> Tensor:
        features: Tensor = self.first(images)
        layers = iter(self.layers)
        for step in self.steps:
            features = (next(layers) if isinstance(step, nn.Module) else step)(features)
        return features


def fields_of(*steps: Any, size: tuple[int, int] = SIZE) -> ReceptiveFields:
    torch.manual_seed(0)
    return receptive_fields(Local(*steps).eval(), size, 2)


def marks_of(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """Return which pixel, planted alone, marks which feature, (h * w, H, W) bool."""
    pixels = torch.eye(size[0] * size[1], dtype=torch.bool).view(-1, *size)
    return planted(model, size, 2, pixels).flatten(1).T.reshape(-1, *size)


@pytest.mark.parametrize(
    ("receptive_field", "stride"), [(3, 1), (5, 1), (5, 2), (7, 2), (9, 2), (9, 4), (13, 4)]
)
def test_a_planted_nan_marks_the_features_of_a_bagnet_that_see_the_pixel(
    receptive_field: int, stride: int
) -> None:
    torch.manual_seed(0)
    model = BagNet(3, 2, receptive_field, stride, (4, 4, 4), 1).eval()
    fields = receptive_fields(model, SIZE, 2)
    assert torch.equal(marks_of(model, SIZE), fields.pixels().pixels())
    assert fields.grid == tuple(-(-side // stride) for side in SIZE)
    whole = receptive_fields(model, (64, 64), 2)
    assert whole.size == (receptive_field, receptive_field)
    assert whole.stride == (stride, stride)
    assert whole.offset == (-(receptive_field // 2), -(receptive_field // 2))
    inside = torch.arange(len(whole.rows))[8:-8]
    starts = whole.offset[0] + stride * inside
    assert torch.equal(whole.rows[8:-8], torch.stack([starts, starts + receptive_field], 1))


EXACT: dict[str, tuple[Any, ...]] = {
    "even kernel": (nn.Conv2d(4, 4, (2, 4), stride=(1, 2)),),
    "grouped": (nn.Conv2d(4, 4, 3, groups=4, padding="same"),),
    "reflected border": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),),
    "repeated border": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),),
    "max pool": (nn.MaxPool2d(3, 2, padding=1),),
    "max pool of what is left over": (nn.MaxPool2d(4, 3, ceil_mode=True),),
    "mean pool": (nn.AvgPool2d((3, 2)),),
    "as large as asked": (nn.AdaptiveAvgPool2d((5, 4)),),
    "as large as asked, maxima": (nn.AdaptiveMaxPool2d((5, 4)),),
    "batch norm in place": (nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "layer norm of channels": (
        lambda x: x.permute(0, 2, 3, 1),
        nn.LayerNorm(4),
        nn.Linear(4, 3),
        nn.GELU(),
        lambda x: x.permute(0, 3, 1, 2),
    ),
    "softmax over channels": (lambda x: x.softmax(1),),
    "channels shuffled to space": (nn.PixelShuffle(2),),
    "space shuffled to channels": (nn.PixelUnshuffle(2), nn.Conv2d(16, 3, 1)),
    "places in a line": (lambda x: x.flatten(2).transpose(1, 2).reshape(-1, 18, 14, 4)[:, :, ::2],
                         lambda x: x.permute(0, 3, 1, 2)),
    "cropped residual": (lambda x: functional.avg_pool2d(x, 3, 1) + x[:, :, 1:-1, 1:-1],),
    "padded": (lambda x: functional.pad(x, (2, 0, -1, 3)),),
    "concatenated channels": (lambda x: torch.cat([x, functional.max_pool2d(x, 3, 1, 1)], 1),),
    "concatenated places": (lambda x: torch.cat([x[:, :, :5], 1 + x[:, :, 9:]], 2),),
    "stacked": (lambda x: torch.stack([x[:, :, 0], x[:, :, 7]], 2),),
    "turned and moved on": (lambda x: x.flip(2), lambda x: x.roll(3, 3)),
    "added in place": (lambda x: x.clone().add_(functional.max_pool2d(x, 3, 1, 1)),),
    "one column": (lambda x: x.amax(2, keepdim=True),),
    "resized, nearest": (lambda x: functional.interpolate(x, (9, 20), mode="nearest-exact"),),
}  # fmt: skip


@pytest.mark.parametrize("steps", EXACT.values(), ids=EXACT)
def test_every_operation_carries_what_its_outputs_see(steps: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    model = Local(*steps).eval()
    fields = receptive_fields(model, SIZE, 2)
    marks, seen = marks_of(model, SIZE), fields.pixels().pixels()
    assert not (marks & ~seen).any()
    by_feature = marks.view(*fields.grid, *SIZE)
    assert torch.equal(fields.rows, hull(by_feature.any(3).any(1)))
    assert torch.equal(fields.columns, hull(by_feature.any(2).any(0)))


def hull(lines: Tensor) -> Tensor:
    """Return the half-open interval of what is True in each row, (n, 2); [0, 0) for nothing."""
    numbers = lines.int()
    ends = torch.stack([numbers.argmax(1), lines.shape[1] - numbers.flip(1).argmax(1)], 1)
    return ends * lines.any(1, keepdim=True)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(9, 20), (24, 7)])
def test_a_resize_sees_at_least_what_a_planted_nan_marks(
    mode: str, antialias: bool, size: tuple[int, int]
) -> None:
    model = Local(lambda x: functional.interpolate(x, size, mode=mode, antialias=antialias)).eval()
    fields = receptive_fields(model, SIZE, 2)
    assert not (marks_of(model, SIZE) & ~fields.pixels().pixels()).any()
    assert fields.size[0] < SIZE[0]


def test_comparisons_that_swallow_a_nan_are_seen_by_the_layers() -> None:
    """NaN > 0 is False: a planted NaN leaves no mark, and the comparison depends on it still."""

    def gate(x: Tensor) -> Tensor:
        return torch.where(functional.max_pool2d(x, 3, 1, 1) > 0, torch.ones_like(x), -x * 0 + 2)

    def silent(x: Tensor) -> Tensor:
        return (functional.max_pool2d(x, 3, 1, 1) > 0).to(x.dtype)

    for step in (gate, silent):
        assert fields_of(step).size == (5, 5)
    assert not marks_of(Local(silent).eval(), SIZE).any()


@pytest.mark.parametrize(
    ("patch", "stride", "receptive_field"),
    [
        ((p, q), s, r)
        for p, q in [(1, 1), (2, 5), (5, 5), (7, 3)]
        for s, r in [(1, 3), (1, 5), (2, 5), (2, 9), (4, 9)]
    ],
)
def test_no_patch_corrupts_more_features_than_equation_1_says(
    patch: tuple[int, int], stride: int, receptive_field: int
) -> None:
    size = (24, 28)
    model = BagNet(2, 1, receptive_field, stride, (2, 2, 2), 0).eval()
    fields = receptive_fields(model, size, 1)
    bound = fields.window(patch)
    assert bound == tuple(-(-(p + receptive_field - 1) // stride) for p in patch)
    patterns = RectanglePatch(*patch).corruption(fields.pixels()).patterns.view(-1, *fields.grid)
    most = tuple(int(patterns.any(along).sum(1).max()) for along in (2, 1))
    assert most == bound


def test_a_window_is_no_larger_than_the_feature_map() -> None:
    fields = receptive_fields(BagNet(2, 1, 5, 2, (2, 2, 2), 0).eval(), (8, 30), 1)
    assert fields.window((8, 8)) == (4, 6)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.expand(x.mean((2, 3), keepdim=True))
        return x * gate.sigmoid()


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit: Any = timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=12, depth=1, in_chans=2
        )

    def local_logits(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.vit.forward_features(images)
        return tokens[:, 1:].transpose(1, 2).reshape(len(images), -1, 4, 4)


def test_networks_that_see_everything_are_refused_with_the_layer_s_name() -> None:
    cases: list[tuple[nn.Module, str]] = [
        (Local(nn.ReLU(), SqueezeExcite(), nn.ReLU()), "as outputs of layer 'layers.1' do"),
        (Local(nn.GroupNorm(2, 4)), "layer 'layers.0'"),
        (Local(nn.InstanceNorm2d(4)), "layer 'layers.0'"),
        (Local(nn.LayerNorm([4, 16, 16])), "layer 'layers.0'"),
        (Local(nn.Conv2d(4, 4, 7, padding=3), nn.Conv2d(4, 4, 31, padding=15)), "'layers.1'"),
        (Local(lambda x: x - x.mean()), "outputs of the network itself"),
        (VisionTransformer(), r"'vit\.blocks\.0\.attn'"),
    ]
    for model, message in cases:
        with pytest.raises(PatchproofError, match=message):
            receptive_fields(model.eval(), (16, 16), 2)


def test_a_resnet_is_refused_where_its_receptive_field_is_the_image() -> None:
    network = timm.create_model("resnet18", in_chans=2)
    network.local_logits = network.forward_features
    with pytest.raises(PatchproofError, match=r"layer 'layer1\.1\.conv1' do"):
        receptive_fields(network.eval(), (32, 32), 2)


def shifted_copy(x: Tensor) -> Tensor:
    copy = torch.zeros_like(x)
    copy[:, :, 1:] = x[:, :, :-1]
    return copy + x


def changed_behind_a_view(x: Tensor) -> Tensor:
    view = x[:, :, 1:]
    x.add_(functional.max_pool2d(x, 3, 1, 1))
    return view * 1


def branching(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: x.sort(1).values, "got sort in the network itself"),
        (nn.ConvTranspose2d(4, 4, 2), r"convolution in layer 'layers\.0': of convolutions, only"),
        (lambda x: functional.conv2d(x, x[:, :, :3, :3].transpose(0, 1).expand(4, 4, 3, 3)),
         "weights depend on the image"),
        (branching, "fails for tensors without values|depends on values"),
        (lambda x: x * x.max().item(), "fails for tensors without values|depends on values"),
        (lambda x: torch.from_numpy(x.numpy()), "fails for tensors without values"),
        (shifted_copy, "changed in place through another tensor"),
        (changed_behind_a_view, "changed in place through another tensor"),
        (lambda x: x[x > 0].view(1, 1, 1, -1), "index"),
        (lambda x: torch.add(x, x, out=torch.empty_like(x)), "add in the network itself"),
        (lambda x: x.clone().transpose_(2, 3), "transpose_ in the network itself"),
        (nn.Upsample(scale_factor=2, mode="linear"), "layer 'layers.0'"),
    ],
)  # fmt: skip
def test_operations_that_cannot_be_followed_are_refused(step: Any, message: str) -> None:
    with pytest.raises(PatchproofError, match=message):
        fields_of(step)


def test_an_attention_kernel_is_not_taken_for_local() -> None:
    def attention(x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return mixed.transpose(1, 2).reshape(len(x), -1, *SIZE)

    with pytest.raises(PatchproofError, match=r"sees all|not known to be local"):
        fields_of(attention)


def test_a_feature_that_changes_without_seeing_the_pixel_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Were a rule wrong, the planted NaN would tell."""

    def too_small(*arguments: Any) -> Any:
        output, (top, left, bottom, right), layer = output_reach(*arguments)
        return output, (top + 1, left, bottom, right), layer

    monkeypatch.setattr(receptive, "output_reach", too_small)
    with pytest.raises(PatchproofError, match=r"expected a change of pixel \(\d+, 0\) of 18x14"):
        fields_of(nn.ReLU())


@pytest.mark.parametrize("size", [(18, 14), (60, 130)])
def test_planted_lines_reach_every_feature_row_of_small_images(size: tuple[int, int]) -> None:
    fields = receptive_fields(BagNet(2, 2, 5, 2, (2, 2, 2), 0).eval(), size, 2)
    lines = torch.cat(list(receptive._plants(fields)))
    rows, columns = lines.all(2).any(0), lines.all(1).any(0)
    assert (size != (18, 14)) or (rows.all() and columns.all())
    assert len(lines) <= 2 * 10
    assert rows.sum() > 0.7 * size[0]


def test_other_models_are_refused() -> None:
    with pytest.raises(PatchproofError, match=r"expected a network with local_logits, .* Conv2d"):
        receptive_fields(nn.Conv2d(1, 1, 1), (8, 8), 1)
    with pytest.raises(PatchproofError, match="got training mode"):
        receptive_fields(BagNet(2, 1), (8, 8), 1)
    with pytest.raises(PatchproofError, match=r"expected local logits of shape .* \(1, 4\)"):
        fields_of(lambda x: x[:, :, 0, 0])
    with pytest.raises(PatchproofError, match="logits that the network computes from the image"):
        fields_of(lambda x: torch.zeros(1, 4, 2, 2))
