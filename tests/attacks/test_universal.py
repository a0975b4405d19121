"""Universal patches: where training shows them, what it finds, and their pictures."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from victims import CHANNELS, SIZE, THREATS, convolutional, examples, labels_alone, linear

import patchproof as pp
from patchproof.attacks import (
    PlaceSearch,
    PrintablePatch,
    UniversalAttack,
    UniversalTraining,
    Victim,
    train_universal_patch,
)
from patchproof.attacks.places import place_boxes, place_pixels
from patchproof.attacks.universal import blended, random_maps, success, total_variation
from patchproof.errors import PatchproofError

UPRIGHT = UniversalTraining(scale=(1.0, 1.0), degrees=(0.0, 0.0), batch_size=40)


def patch(mask: torch.Tensor, channels: int = 3) -> PrintablePatch:
    levels = torch.randint(256, (channels, *mask.shape), generator=torch.Generator().manual_seed(1))
    return PrintablePatch(levels / 255, mask)


@pytest.mark.parametrize("name", ["square", "corners", "diamond", "two dots", "two squares"])
def test_pasted_pixels_are_those_of_the_patch(name: str) -> None:
    threat = THREATS[name]
    shape = threat.shapes(SIZE)[0].pixels
    tested = patch(shape, CHANNELS)
    images = torch.zeros(5, CHANNELS, *SIZE)
    zeros = torch.zeros(5, dtype=torch.int64)
    places = PlaceSearch("random", count=1).choose(threat, None, images, zeros, zeros)[:, 0]
    inside = place_pixels(threat, SIZE, places)[:, None]
    found = tested.paste(images, inside, place_boxes(threat, SIZE, places))
    expected = images.clone()
    for image, regions in zip(expected, places.tolist(), strict=True):
        for region in regions:
            top, left, height, width = threat.regions(SIZE).box(region)
            window = image[:, top : top + height, left : left + width]
            window[:, shape] = tested.content[:, shape]
    assert torch.equal(found, expected)


def test_patches_of_other_sizes_and_channels_are_refused() -> None:
    images, labels = examples(3, linear())
    victim = Victim.of_model(linear())
    for content, mask, message in (
        (torch.zeros(CHANNELS, 2, 3), torch.ones(2, 3), "expected the 3x3 pixels of the threat"),
        (torch.zeros(1, 3, 3), torch.ones(3, 3), f"expected the {CHANNELS} channels"),
    ):
        attack = UniversalAttack(patch=PrintablePatch(content, mask.bool()))
        with pytest.raises(PatchproofError, match=message):
            attack.run(victim, images, labels, threat=pp.SquarePatch(3))
    for bad in (torch.full((1, 2, 2), 1.5), torch.zeros(1, 2, 3), torch.zeros(2, 2)):
        with pytest.raises(PatchproofError):
            PrintablePatch(bad, torch.ones(2, 2, dtype=torch.bool))


def test_upright_patches_in_training_are_pasted_pixels() -> None:
    """Without scale and turns each is at whole pixels, anywhere: what ``paste`` does."""
    threat = pp.StencilPatch(["##.", "###"])
    shape = threat.shapes(SIZE)[0].pixels
    tested = patch(shape, CHANNELS)
    images = torch.rand(40, CHANNELS, *SIZE)
    maps = random_maps(np.random.default_rng(0), UPRIGHT, SIZE, tuple(shape.shape))
    shown = blended(images, tested.content, shape.float()[None], maps)
    count = len(threat.regions(SIZE))
    every = torch.arange(count)[:, None]
    inside, boxes = place_pixels(threat, SIZE, every)[:, None], place_boxes(threat, SIZE, every)
    seen = set()
    for image, found in zip(images, shown, strict=True):
        pasted = tested.paste(image.expand(count, -1, -1, -1), inside, boxes)
        far = (pasted - found).flatten(1).abs().amax(1)
        assert far.min() < 1e-5
        seen.add(int(far.argmin()))
    assert len(seen) > 20


def test_turns_are_counterclockwise_and_scales_are_of_sides() -> None:
    content = 0.6 + 0.4 * torch.rand(3, 4, 4)
    images = torch.zeros(1, 3, 12, 12)
    alpha = torch.ones(1, 4, 4)

    def shown(degrees: float, scale: float) -> torch.Tensor:
        settings = replace(UPRIGHT, degrees=(degrees,) * 2, scale=(scale,) * 2, batch_size=1)
        maps = random_maps(np.random.default_rng(2), settings, (12, 12), (4, 4))
        return blended(images, content, alpha, maps)[0]

    def cut(image: torch.Tensor) -> torch.Tensor:
        first, last = (
            (image.amin(0) > 0.45).nonzero().aminmax(dim=0)
        )  # edges of scaled ones are soft
        (top, left), (bottom, right) = first.tolist(), last.tolist()
        return image[:, top : bottom + 1, left : right + 1]

    torch.testing.assert_close(cut(shown(90.0, 1.0)), content.rot90(1, (1, 2)), atol=1e-5, rtol=0)
    assert cut(shown(0.0, 2.0)).shape == (3, 8, 8)


@pytest.mark.parametrize("size", [(20, 30), (9, 40)])
def test_patches_are_inside_the_image_whole(size: tuple[int, int]) -> None:
    settings = UniversalTraining(scale=(0.5, 1.5), degrees=(-90, 90), batch_size=300)
    maps = random_maps(np.random.default_rng(0), settings, size, (3, 5))
    corners = torch.tensor([[x, y, 1.0] for x in (-1, 1) for y in (-1, 1)])
    square = torch.cat([maps, torch.tensor([[[0.0, 0.0, 1.0]]]).expand(300, 1, 3)], 1)
    there = (torch.linalg.inv(square) @ corners.T)[:, :2]  # in the image's coordinates
    assert there.abs().max() <= 1 + 1e-4
    assert (there.amax((0, 2)) > 0.9).all()
    assert (there.amin((0, 2)) < -0.9).all()


@pytest.mark.parametrize("target", [None, 2])
def test_a_trained_patch_beats_random_ones_on_other_images(target: int | None) -> None:
    model = convolutional()
    images, labels = examples(120, model)
    victim, threat = Victim.of_model(model), pp.SquarePatch(4)
    settings = UniversalTraining(target=target, steps=40, batch_size=16, step_size=0.1)
    steps: list[tuple[int, float]] = []
    trained = train_universal_patch(
        victim,
        images[:60],
        labels[:60],
        threat=threat,
        settings=settings,
        progress=lambda step, found: steps.append((step, found)),
    )
    assert [step for step, _ in steps] == list(range(1, 41))
    assert np.mean([found for _, found in steps[-10:]]) > np.mean([f for _, f in steps[:10]])
    tested = labels[60:] != (-1 if target is None else target)
    images, labels = images[60:][tested], labels[60:][tested]
    targets = None if target is None else torch.full_like(labels, target)

    def broken(content: PrintablePatch) -> int:
        attack = UniversalAttack(patch=content, places=PlaceSearch("random", count=2))
        result = attack.run(victim, images, labels, threat=threat, targets=targets)
        return int((result.broken if target is None else result.hit_target).sum())

    random = [PrintablePatch(torch.rand(trained.content.shape), trained.mask) for _ in range(5)]
    assert broken(trained) > max(map(broken, random))


def test_training_is_repeatable_and_smooth_where_it_is_asked_to_be() -> None:
    model = convolutional()
    images, labels = examples(30, model)

    def trained(**values: Any) -> PrintablePatch:
        return train_universal_patch(
            Victim.of_model(model),
            images,
            labels,
            threat=pp.StencilPatch.diamond(5),
            settings=UniversalTraining(steps=15, batch_size=8, **values),
        )

    rough, again, smooth = trained(), trained(), trained(variation=20.0)
    assert torch.equal(rough.content, again.content)
    assert not torch.equal(rough.content, trained(seed=1).content)
    alpha = rough.mask.float()[None]
    assert total_variation(smooth.content, alpha) < total_variation(rough.content, alpha) / 2
    assert torch.equal((rough.content * 255).round() / 255, rough.content)
    assert rough.content[:, ~rough.mask].max() == 0


def test_total_variation_is_of_pixels_of_the_patch_alone() -> None:
    content = torch.tensor([[[0.0, 0.5, 9.0], [1.0, 0.5, 9.0]]])
    alpha = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]])
    assert total_variation(content, alpha).item() == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)


def test_success_is_a_log_probability() -> None:
    scores = torch.tensor([[1.0, 2.0, 4.0], [100.0, 0.0, 0.0]])
    shares = scores.double().softmax(1)
    labels = torch.tensor([2, 0])
    not_label = success(scores, labels, None).exp().double()
    assert not_label[0] == pytest.approx(1 - shares[0, 2].item(), rel=1e-5)
    assert success(scores, labels, None)[1] == pytest.approx(-100 + np.log(2), rel=1e-5)
    assert success(scores, labels, 1).exp()[0] == pytest.approx(shares[0, 1].item(), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["square", "corners", "two dots"])
def test_a_saved_picture_is_read_as_it_was(tmp_path: Path, name: str, channels: int) -> None:
    shape = THREATS[name].shapes(SIZE)[0].pixels
    tested = patch(shape, channels)
    tested.save(tmp_path / "patch.png", width_cm=8.0)
    found = PrintablePatch.load(tmp_path / "patch.png")
    assert torch.equal(found.mask, shape)
    assert torch.equal(found.content, tested.content)
    with Image.open(tmp_path / "patch.png") as picture:
        assert max(picture.size) >= 1200
        assert picture.size[0] / picture.info["dpi"][0] * 2.54 == pytest.approx(8.0, abs=0.01)


def test_a_page_is_as_large_as_the_print(tmp_path: Path) -> None:
    tested = patch(torch.ones(2, 4, dtype=torch.bool))
    tested.save(tmp_path / "patch.pdf", width_cm=12.7)
    page = (tmp_path / "patch.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[([^]]*)\]", page)
    assert box is not None
    assert [float(part) for part in box[1].split()] == pytest.approx([0, 0, 360, 180])
    tested.save(tmp_path / "again.pdf", width_cm=12.7)
    assert (tmp_path / "again.pdf").read_bytes() == page


def test_a_picture_that_was_resized_is_read_all_the_same(tmp_path: Path) -> None:
    tested = patch(torch.ones(3, 5, dtype=torch.bool))
    tested.save(tmp_path / "patch.png")
    with Image.open(tmp_path / "patch.png") as picture:
        text = PngInfo()
        text.add_text("patchproof:pixels", picture.info["patchproof:pixels"])
        picture.resize((173, 101), Image.Resampling.NEAREST).save(
            tmp_path / "smaller.png", pnginfo=text
        )
    assert torch.equal(PrintablePatch.load(tmp_path / "smaller.png").content, tested.content)


def test_any_picture_can_be_a_patch(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "other.png")
    found = PrintablePatch.load(tmp_path / "other.png")
    assert found.mask.shape == (5, 7)
    assert found.mask.all()
    assert torch.equal((found.content * 255).round().byte().permute(1, 2, 0), torch.tensor(pixels))


def test_mistakes_with_pictures_are_told(tmp_path: Path) -> None:
    tested = patch(torch.ones(2, 2, dtype=torch.bool))
    (tmp_path / "text.png").write_text("no picture")
    for mistake, message in (
        (lambda: tested.save(tmp_path / "patch.jpg"), "expected a .png or .pdf file"),
        (lambda: tested.save(tmp_path / "patch.pdf", width_cm=0.0), "expected cm above 0"),
        (lambda: patch(tested.mask, 2).save(tmp_path / "patch.png"), "expected 1 or 3 channels"),
        (lambda: PrintablePatch.load(tmp_path / "none.png"), "expected a picture"),
        (lambda: PrintablePatch.load(tmp_path / "text.png"), "expected a picture"),
    ):
        with pytest.raises(PatchproofError, match=message):
            mistake()
    assert [path.name for path in tmp_path.iterdir()] == ["text.png"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"step_size": 0.0}, "step_size: expected in"),
        ({"scale": (1.1, 0.9)}, "scale: expected 0 < smallest <= largest"),
        ({"degrees": (5.0, -5.0)}, "degrees: expected smallest <= largest"),
        ({"variation": -1.0}, "variation: expected a number >= 0"),
    ],
)
def test_bad_settings_of_training_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchproofError, match=message):
        UniversalTraining(**values)


def test_training_that_cannot_be_is_refused() -> None:
    model = linear()
    images, labels = examples(4, model)
    victim = Victim.of_model(model)
    square = pp.SquarePatch(3)

    def train(victim: Victim, threat: pp.Threat, target: int | None = None) -> None:
        settings = UniversalTraining(target=target, steps=1)
        train_universal_patch(victim, images, labels, threat=threat, settings=settings)

    for attempt, message in (
        (lambda: train(victim, THREATS["two sizes"]), "expected one shape"),
        (lambda: train(victim, pp.SparsePixels(2)), "expected one shape"),
        (lambda: train(labels_alone(model), square), "got labels alone"),
        (lambda: train(victim, square, target=3), "target: expected a class below 3, got 3"),
        (lambda: train(victim, square, target=-1), "target: expected a class"),
    ):
        with pytest.raises(PatchproofError, match=message):
            attempt()
    labels.fill_(1)
    with pytest.raises(PatchproofError, match="expected some of another class, got none"):
        train(victim, square, target=1)
