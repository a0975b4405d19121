"""Networks for ablated images: what is kept, where it is, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from patchproof.errors import PatchproofError
from patchproof.models import (
    Ablation,
    AblationResNet,
    BandResNet,
    Kept,
    ModelSpec,
    build_model,
    load_classifier,
    save_classifier,
)
from patchproof.models.ablation import AblationKind
from patchproof.models.token_drop import TokenDropTransformer

SIZE = (16, 20)
KINDS: tuple[AblationKind, ...] = ("column", "row", "block")
TINY_VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def spec_of(name: str, kind: AblationKind, size: int) -> ModelSpec:
    options: dict[str, Any] = {"ablation": kind, "size": size}
    if name == "token-drop":
        return ModelSpec("token-drop:vit_tiny_patch16_224", 5, 3, SIZE, options | TINY_VIT)
    return ModelSpec(name, 5, 3, SIZE, options | {"widths": [4, 8, 8]})


def build(name: str, kind: AblationKind = "column", size: int = 3) -> Any:
    torch.manual_seed(0)
    return build_model(spec_of(name, kind, size))


def kept_at(ablation: Ablation, *places: int) -> Kept:
    """Return one block for each image, at positions by their number."""
    return Kept(ablation.corners(SIZE)[list(places)][:, None], ablation.block(SIZE))


def test_positions_of_blocks() -> None:
    assert Ablation("column", 3).corners((2, 3)).tolist() == [[0, 0], [0, 1], [0, 2]]
    assert Ablation("row", 2).corners((2, 3)).tolist() == [[0, 0], [1, 0]]
    assert Ablation("block", 2).corners((2, 2)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert [Ablation(kind, 2).block((4, 5)) for kind in KINDS] == [(4, 2), (2, 5), (2, 2)]
    assert Ablation("row", 2).to_dict() == {"kind": "row", "size": 2}


@pytest.mark.parametrize("corner", [(0, 0), (3, 4), (5, 2), (5, 6)])
def test_crops_and_kept_pixels_wrap_around(corner: tuple[int, int]) -> None:
    images = torch.rand(2, 3, 6, 7)
    kept = Kept(torch.tensor([[[0, 0]], [corner]]), (3, 4))
    turned = images[1].roll((-corner[0], -corner[1]), (1, 2))
    crops = kept.crop(images)
    assert torch.equal(crops[0], images[0, :, :3, :4])
    assert torch.equal(crops[1], turned[:, :3, :4])
    expected = torch.zeros(6, 7, dtype=torch.bool)
    expected[:3, :4] = True
    assert torch.equal(kept.pixels((6, 7))[1], expected.roll(corner, (0, 1)))


def test_several_blocks_are_cropped_image_by_image() -> None:
    images = torch.rand(2, 3, 6, 7)
    corners = torch.tensor([[[0, 5], [0, 1]], [[0, 2], [0, 6]]])
    crops = Kept(corners, (6, 3)).crop(images)
    assert crops.shape == (4, 3, 6, 3)
    for number, (image, left) in enumerate([(0, 5), (0, 1), (1, 2), (1, 6)]):
        assert torch.equal(crops[number], images[image].roll(-left, 2)[:, :, :3])
    both = Kept(corners, (6, 3)).pixels((6, 7))
    assert both[0, 0].tolist() == [True, True, True, True, False, True, True]


@pytest.mark.parametrize("name", ["band-resnet", "ablation-resnet", "token-drop"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_hidden_pixels_have_no_influence(name: str, kind: AblationKind, size: int) -> None:
    """At every position, in the border's rows and columns too; the others do have some."""
    model = build(name, kind, size)
    ablation = Ablation(kind, size)
    every = len(ablation.corners(SIZE))
    kept = kept_at(ablation, *range(0, every, max(1, every // 20)), every - 1)
    hidden = ~kept.pixels(SIZE)[:, None]
    images = torch.rand(1, 3, *SIZE).expand(len(hidden), -1, -1, -1)
    with torch.no_grad():
        logits = model.ablated(images, kept)
        assert logits.shape == (len(hidden), 5)
        for other in (torch.rand_like(images), torch.full_like(images, torch.inf)):
            assert torch.equal(model.ablated(torch.where(hidden, other, images), kept), logits)
        changed = torch.where(hidden, images, torch.rand_like(images))
        moved = (model.ablated(changed, kept) != logits).any(1)
        assert moved.float().mean() > 0.8  # one pixel of random weights may be behind a ReLU


@pytest.mark.parametrize("name", ["band-resnet", "ablation-resnet", "token-drop"])
def test_several_bands_are_seen_together(name: str) -> None:
    model = build(name)
    images = torch.rand(2, 3, *SIZE)
    corners = torch.tensor([[[0, 18], [0, 6]], [[0, 3], [0, 4]]])
    kept = Kept(corners, (16, 3))
    hidden = ~kept.pixels(SIZE)[:, None]
    with torch.no_grad():
        logits = model.ablated(images, kept)
        noise = torch.rand_like(images)
        assert torch.equal(model.ablated(torch.where(hidden, noise, images), kept), logits)
        for band in (0, 1):
            own = ~Kept(corners[:, [band]], (16, 3)).pixels(SIZE)[:, None]
            changed = model.ablated(torch.where(own, images, noise), kept)
            assert (changed != logits).any(1).all()
        swapped = model.ablated(images, Kept(corners.flip(1), (16, 3)))
        assert torch.allclose(swapped, logits, atol=1e-6)


@pytest.mark.parametrize("name", ["band-resnet", "ablation-resnet", "token-drop"])
def test_equal_pixels_elsewhere_are_told_apart(name: str) -> None:
    model = build(name)
    images = torch.full((2, 3, *SIZE), 0.3)
    with torch.no_grad():
        here, there = model.ablated(images, kept_at(Ablation("column", 3), 2, 9))
    assert name == "ablation-resnet" or (here - there).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["band-resnet", "ablation-resnet", "token-drop"])
def test_scores_of_an_image_do_not_depend_on_the_others(name: str) -> None:
    """Blocks of 6 pixels are in 2 or 3 tokens of 4 a side, in any order."""
    model = build(name, "block", 6)
    images = torch.rand(9, 3, *SIZE)
    tops = torch.tensor([3, 0, 7, 1, 3, 4, 11, 2, 8])
    kept = Kept(torch.stack([tops, tops.roll(2)], 1)[:, None], (6, 6))
    with torch.no_grad():
        logits = model.ablated(images, kept)
        for index in range(9):
            alone = model.ablated(images[[index]], Kept(kept.corners[[index]], kept.size))
            assert torch.allclose(alone[0], logits[index], atol=1e-5)


@pytest.mark.parametrize(("kind", "size"), [("column", 5), ("row", 3), ("block", 6)])
def test_the_undefended_band_network_averages_adjacent_bands(kind: AblationKind, size: int) -> None:
    """The last band goes on at the other border where the width is no multiple of its own."""
    model = build("band-resnet", kind, size)
    images = torch.rand(3, 3, *SIZE)
    height, width = Ablation(kind, size).block(SIZE)
    each = [
        model.ablated(images, Kept(torch.tensor([[[top, left]]]).expand(3, 1, 2), (height, width)))
        for top in range(0, SIZE[0], height)
        for left in range(0, SIZE[1], width)
    ]
    assert torch.allclose(model(images), torch.stack(each).mean(0), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [
        ("ablation-resnet", "column", 20),
        ("token-drop", "column", 20),
        ("token-drop", "row", 16),
        ("band-resnet", "column", 20),
    ],
)
def test_where_nothing_is_hidden_the_undefended_model_says_the_same(
    name: str, kind: AblationKind, size: int
) -> None:
    model = build(name, kind, size)
    images = torch.rand(2, 3, *SIZE)
    assert torch.allclose(
        model.ablated(images, kept_at(Ablation(kind, size), 0, 0)), model(images), atol=1e-5
    )


def test_the_encoding_tells_hidden_from_black() -> None:
    model = build("ablation-resnet")
    seen: list[Tensor] = []
    model.stem.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model.ablated(torch.zeros(1, 3, *SIZE), kept_at(Ablation("column", 3), 4))
    (pixels,) = seen
    assert pixels.shape[1] == 6
    assert pixels[0, :, 0, 5].tolist() == [0, 0, 0, 1, 1, 1]
    assert pixels[0, :, 0, 8].tolist() == [0] * 6


def test_a_band_costs_what_its_pixels_do() -> None:
    model = build("band-resnet", "column", 4)
    shapes: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[2:])))
    model.ablated(torch.rand(1, 3, *SIZE), kept_at(Ablation("column", 4), 0))
    assert shapes == [(8, 2), (4, 1)]
    odd = build("band-resnet", "row", 5)  # no row is left out
    shapes.clear()
    for block in odd.blocks:
        block.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape[2:])))
    odd.ablated(torch.rand(1, 3, *SIZE), kept_at(Ablation("row", 5), 0))
    assert shapes == [(3, 10), (2, 5)]


def test_only_tokens_that_see_something_are_computed() -> None:
    model = build("token-drop", "column", 4)
    lengths: list[int] = []
    model.network.blocks[0].register_forward_hook(
        lambda _, inputs, __: lengths.append(inputs[0].shape[1])
    )
    model.ablated(torch.rand(3, 3, *SIZE), kept_at(Ablation("column", 4), 8, 9, 18))
    assert sorted(lengths) == [4 + 1, 2 * 4 + 1]  # one column of 4 tokens, or two; and the class
    model(torch.rand(1, 3, *SIZE))
    assert lengths[-1] == 4 * 5 + 1


@pytest.mark.parametrize("name", ["band-resnet", "ablation-resnet", "token-drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_learn_and_are_built_again(tmp_path: Path, name: str, kind: AblationKind) -> None:
    spec = spec_of(name, kind, 4)
    model: Any = build_model(spec).train()
    images, kept = torch.rand(6, 3, *SIZE), kept_at(Ablation(kind, 4), 0, 1, 2, 3, 4, 5)
    nn.functional.cross_entropy(model.ablated(images, kept), torch.arange(6) % 5).backward()
    assert all(p.grad is not None for p in model.parameters())
    save_classifier(tmp_path / "model.safetensors", model.eval(), spec, {})
    loaded: Any = load_classifier(tmp_path / "model.safetensors")[0]
    assert loaded.ablation == Ablation(kind, 4)
    assert torch.equal(loaded.ablated(images, kept), model.ablated(images, kept))


def test_mistakes_are_named() -> None:
    diagonal: Any = "diagonal"
    with pytest.raises(PatchproofError, match=r"expected one of .*'block'.*, got 'diagonal'"):
        Ablation(diagonal, 3)
    with pytest.raises(PatchproofError, match="expected a size from 1 pixel, got 0"):
        BandResNet(2, 3, "column", 0)
    with pytest.raises(PatchproofError, match="expected a row inside the 16x20 image, got 17"):
        Ablation("row", 17).corners(SIZE)
    with pytest.raises(PatchproofError, match=r"shape \(N, K, 2\), got \(3, 2\)"):
        Kept(torch.zeros(3, 2, dtype=torch.int64), (2, 2))
    for model in (build("band-resnet"), build("ablation-resnet"), build("token-drop")):
        with pytest.raises(PatchproofError, match=r"blocks of \(16, 3\) pixels, .* got \(16, 4\)"):
            model.ablated(torch.rand(1, 3, *SIZE), kept_at(Ablation("column", 4), 0))
    with pytest.raises(PatchproofError, match="expected two or more positive widths"):
        AblationResNet(2, 3, widths=(4,))
    with pytest.raises(PatchproofError, match=r"images of \(16, 20\) pixels, got \(16, 16\)"):
        build("token-drop")(torch.rand(1, 3, 16, 16))


def test_other_networks_do_not_drop_tokens() -> None:
    for network in (
        timm.create_model("resnet18"),
        timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, depth=1),
        timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5, depth=1),
    ):
        with pytest.raises(PatchproofError, match="expected a timm vision transformer"):
            TokenDropTransformer(network, "column", 4, (0.5,) * 3, (0.5,) * 3)
