"""Universal patches: one for many images, to paste or to print (Brown et al., 2017)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from patchproof.attacks.base import PatchAttack, Problem
from patchproof.attacks.printing import read_picture, write_picture
from patchproof.attacks.victim import Victim
from patchproof.defenses.checks import check_images, check_labels
from patchproof.errors import PatchproofError
from patchproof.threat import SparsePixels, Threat

_LEVELS = 255


@dataclass(frozen=True, eq=False)
class PrintablePatch:
    """The contents of a patch of any shape.

    Attributes:
        content: (C, h, w) float32 in [0, 1].
        mask: (h, w) bool, the pixels of the patch.

    Raises:
        PatchproofError: other shapes or types, or contents out of range.
    """

    content: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        check_images(self.content[None], (self.mask.shape[-2], self.mask.shape[-1]))
        if self.mask.dtype != torch.bool or not self.mask.any():
            raise PatchproofError("mask of a patch: expected at least one pixel, as bool, got none")

    def check_fit(self, size: tuple[int, ...], channels: int) -> None:
        """Raise ``PatchproofError`` unless it has this size, (h, w) in pixels, and channels."""
        if tuple(self.mask.shape) != size:
            raise PatchproofError(
                f"patch image: expected the {size[0]}x{size[1]} pixels of the threat, "
                f"got {self.mask.shape[0]}x{self.mask.shape[1]}"
            )
        if channels != len(self.content):
            raise PatchproofError(
                f"patch image: expected the {channels} channels of the images, "
                f"got {len(self.content)}"
            )

    def paste(self, images: Tensor, inside: Tensor, boxes: Tensor) -> Tensor:
        """Show the patch in images, pixel by pixel, at the places of a threat's patches.

        Args:
            images: (B, C, H, W) in [0, 1].
            inside: (B, 1, H, W) bool, the pixels that may change.
            boxes: (B, P, 4) int64, the box (top, left, height, width) of each of P patches.

        Returns:
            (B, C, H, W).

        Raises:
            PatchproofError: a box of another size, or images of other channels.
        """
        size = tuple(self.mask.shape)
        for box in {tuple(box) for box in boxes[..., 2:].flatten(0, 1).tolist()}:
            self.check_fit(box, images.shape[1])
        content, mask = self.content.to(images.device), self.mask.to(images.device)
        down, across = (torch.arange(side, device=images.device) for side in images.shape[2:])
        for top, left, _, _ in boxes.permute(1, 2, 0)[..., None]:
            rows, columns = down - top, across - left  # (B, H) and (B, W), in the patch
            met = ((rows >= 0) & (rows < size[0]))[:, :, None]
            met = met & ((columns >= 0) & (columns < size[1]))[:, None]
            at = rows.clamp(0, size[0] - 1)[:, :, None], columns.clamp(0, size[1] - 1)[:, None]
            shown = inside & (met & mask[at])[:, None]
            images = torch.where(shown, content[:, at[0], at[1]].transpose(0, 1), images)
        return images

    def save(self, path: Path | str, *, width_cm: float = 10.0) -> None:
        """Write a picture of the patch for its print, pixels as sharp squares, no frame.

        Args:
            path: ``.png``, which ``load`` reads again, or ``.pdf``; pixels that are not of the
                patch are transparent.
            width_cm: how wide the print is: the PDF's page has this width, and the PNG says it.

        Raises:
            PatchproofError: another ending, another number of channels than 1 or 3, or a width that
                is not above 0.
            RunError: the file cannot be written.
        """
        if len(self.content) not in (1, 3):
            raise PatchproofError(
                f"patch image: expected 1 or 3 channels to print, got {len(self.content)}"
            )
        levels = (self.content * _LEVELS).round().to(torch.uint8).permute(1, 2, 0)
        alpha = self.mask[..., None].to(torch.uint8) * _LEVELS
        write_picture(Path(path), torch.cat([levels, alpha], 2).numpy(), width_cm)

    @classmethod
    def load(cls, path: Path | str) -> PrintablePatch:
        """Read the PNG that ``save`` wrote; of any other picture each pixel is one of the patch.

        Contents that are multiples of 1/255, such as those of training, come back as they were.

        Raises:
            PatchproofError: no such file, or not a picture.
        """
        pixels = torch.from_numpy(read_picture(Path(path)))
        content = pixels[..., :-1].permute(2, 0, 1).float() / _LEVELS
        return cls(content.contiguous(), pixels[..., -1] > _LEVELS // 2)

    def to_dict(self) -> dict[str, Any]:
        """Return the size of the patch and a digest of its pixels, as JSON values."""
        digest = hashlib.sha256(self.mask.numpy().tobytes())
        digest.update(self.content.cpu().contiguous().numpy().tobytes())
        return {"pixels": list(self.mask.shape), "digest": digest.hexdigest()}


@dataclass(frozen=True, kw_only=True)
class UniversalAttack(PatchAttack):
    """Pastes one patch into every image, at each place that ``places`` chooses.

    The first aim alone takes part, for its scores.

    Attributes:
        patch: what is pasted, of the size of the threat's patch; several patches show the same.
    """

    patch: PrintablePatch

    name: ClassVar[str] = "universal"
    needs_scores: ClassVar[bool] = False
    optimises: ClassVar[bool] = False

    def check(self, threat: Threat, shape: tuple[int, ...]) -> None:
        """Raise ``PatchproofError`` unless the patch has the size of the threat's, and channels."""
        channels, height, width = shape
        self.patch.check_fit(tuple(_shape(threat, (height, width)).shape), channels)

    def optimise(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Paste the patch."""
        attacked = self.patch.paste(problem.images, problem.inside, problem.boxes)
        return attacked, problem.lead(attacked)

    def to_dict(self) -> dict[str, Any]:
        """Return all that decides what the attack finds, as JSON values."""
        return {**super().to_dict(), "patch": self.patch.to_dict()}


@dataclass(frozen=True, kw_only=True)
class UniversalTraining:
    """How a universal patch is trained: by the expectation over images and transformations.

    Attributes:
        target: the class that the patch is to call forth; None for any wrong one.
        steps: of the ascent (Adam).
        batch_size: images in a step, drawn at random.
        step_size: of Adam, in [0, 1].
        scale: smallest and largest factor of the patch's sides.
        degrees: smallest and largest turn, counterclockwise.
        variation: weight of the patch's total variation, which makes it smooth; 0 for none.
        seed: of all draws.

    Raises:
        PatchproofError: numbers out of range.
    """

    target: int | None = None
    steps: int = 300
    batch_size: int = 64
    step_size: float = 0.05
    scale: tuple[float, float] = (0.9, 1.1)
    degrees: tuple[float, float] = (-10.0, 10.0)
    variation: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, number in (("steps", self.steps), ("batch_size", self.batch_size)):
            if not isinstance(number, int) or number < 1:
                raise PatchproofError(f"{name}: expected at least 1, got {number!r}")
        if not 0.0 < self.step_size <= 1.0:
            raise PatchproofError(f"step_size: expected in (0, 1], got {self.step_size!r}")
        if not 0.0 <= self.variation < math.inf:
            raise PatchproofError(f"variation: expected a number >= 0, got {self.variation!r}")
        if not 0.0 < self.scale[0] <= self.scale[1] < math.inf:
            raise PatchproofError(f"scale: expected 0 < smallest <= largest, got {self.scale!r}")
        if not -math.inf < self.degrees[0] <= self.degrees[1] < math.inf:
            raise PatchproofError(f"degrees: expected smallest <= largest, got {self.degrees!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {"scale": list(self.scale), "degrees": list(self.degrees)}


def train_universal_patch(
    victim: Victim,
    images: Tensor,
    labels: Tensor,
    *,
    threat: Threat,
    settings: UniversalTraining | None = None,
    aim: str | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> PrintablePatch:
    """Train one patch for many images (Brown et al., 2017, Section 2).

    It ascends the mean log-probability of a success, of the target or of any class but the label,
    over images, and over places anywhere on the image, scales and turns of the patch.

    Args:
        victim: with scores that are differentiable.
        images: (N, C, H, W) float32 in [0, 1], not those that the patch is tested on.
        labels: (N,) integers, the right classes; images of the target's class are left out.
        threat: of one shape, which becomes that of the patch.
        settings: by default, those of ``UniversalTraining``.
        aim: name of the victim's surrogate; None for the first.
        progress: called after each step with its number, from 1, and its mean log-probability.

    Returns:
        The patch, in multiples of 1/255, so that it can be saved as it is.

    Raises:
        PatchproofError: images or labels of another shape, type or range, a threat without the one
            shape, a victim without scores, or a target that is no class, or that of all images.
    """
    settings = UniversalTraining() if settings is None else settings
    size = (images.shape[-2], images.shape[-1])
    check_images(images, size)
    labels = check_labels(labels, len(images))
    scores = victim.aims(None if aim is None else (aim,))[0]
    mask = _shape(threat, size)
    used = labels != (-1 if settings.target is None else settings.target)
    if not used.any():
        raise PatchproofError("images to train a patch: expected some of another class, got none")
    images, labels = images[used], labels[used]
    random = np.random.default_rng((settings.seed, 4))
    content = torch.from_numpy(random.random((images.shape[1], *mask.shape), dtype=np.float32)).to(
        victim.device
    )
    content.requires_grad_()
    alpha = mask.float()[None].to(victim.device)
    optimiser = torch.optim.Adam([content], settings.step_size)
    for step in range(1, settings.steps + 1):
        rows = torch.from_numpy(random.integers(len(images), size=settings.batch_size))
        maps = random_maps(random, settings, size, tuple(mask.shape)).to(victim.device)
        with torch.enable_grad():
            given = blended(images[rows].to(victim.device), content, alpha, maps)
            found = success(scores(given), labels[rows].to(victim.device), settings.target).mean()
            loss = settings.variation * total_variation(content, alpha) - found
        (slope,) = torch.autograd.grad(loss, content)
        content.grad = slope
        optimiser.step()
        content.data.clamp_(0.0, 1.0)
        if progress is not None:
            progress(step, found.item())
    levels = (content.detach().cpu() * _LEVELS).round() / _LEVELS
    return PrintablePatch(torch.where(mask, levels, 0.0), mask)


def success(scores: Tensor, labels: Tensor, target: int | None) -> Tensor:
    """Return the log-probability of the target, or of not being the label, (N,), of scores.

    Raises:
        PatchproofError: a target that is no class.
    """
    logits = scores.log_softmax(1)
    if target is None:
        return logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    if not 0 <= target < scores.shape[1]:
        raise PatchproofError(f"target: expected a class below {scores.shape[1]}, got {target}")
    return logits[:, target]


def total_variation(content: Tensor, alpha: Tensor) -> Tensor:
    """Return the mean difference of neighbouring pixels, of (C, h, w), where (1, h, w) is 1."""
    down = (content.diff(dim=1).abs() * alpha[:, 1:] * alpha[:, :-1]).sum()
    across = (content.diff(dim=2).abs() * alpha[:, :, 1:] * alpha[:, :, :-1]).sum()
    return (down + across) / (alpha.sum() * len(content))


def random_maps(
    random: np.random.Generator,
    settings: UniversalTraining,
    size: tuple[int, int],
    patch: tuple[int, ...],
) -> Tensor:
    """Draw where patches are, (B, 2, 3): from an image's coordinates to the patch's, in [-1, 1].

    The patch is scaled, turned about its centre, and anywhere where it is inside the image whole,
    so that its upright box starts at a whole pixel.

    Args:
        random: what draws.
        settings: bounds, and the number B.
        size: (H, W) of the image in pixels.
        patch: (h, w) of the patch in pixels.
    """
    count = settings.batch_size
    scale = random.uniform(*settings.scale, count)
    turn = np.radians(random.uniform(*settings.degrees, count))
    cos, sin = np.cos(turn), np.sin(turn)
    (height, width), (patch_height, patch_width) = size, patch
    centres = []
    for length, along, other in (
        (height, abs(cos) * patch_height, abs(sin) * patch_width),
        (width, abs(cos) * patch_width, abs(sin) * patch_height),
    ):
        spans = scale * (along + other)
        room = np.maximum(np.floor(length - spans + 1e-6), 0.0)
        corner = np.floor(random.random(count) * (room + 1))
        centres.append(2 * np.where(spans > length, length / 2, corner + spans / 2) / length - 1)
    row, column = centres
    # Rows go down: a point of the image, about the centre in pixels, is turned back, and scaled.
    across = np.stack([cos * width, -sin * height], 1) / (scale * patch_width)[:, None]
    down = np.stack([sin * width, cos * height], 1) / (scale * patch_height)[:, None]
    centre = np.stack([column, row], 1)
    maps = [np.c_[part, -(part * centre).sum(1)] for part in (across, down)]
    return torch.from_numpy(np.stack(maps, 1)).float()


def blended(images: Tensor, content: Tensor, alpha: Tensor, maps: Tensor) -> Tensor:
    """Show the patch in images, (B, C, H, W), differentiable in its content.

    Args:
        images: (B, C, H, W).
        content: (C, h, w).
        alpha: (1, h, w), 1 for the pixels of the patch, else 0.
        maps: (B, 2, 3), as of ``random_maps``.
    """
    count = len(images)
    grid = functional.affine_grid(maps, [count, *images.shape[1:]], align_corners=False)
    shown, cover = (
        functional.grid_sample(
            part.expand(count, *part.shape),
            grid,
            padding_mode=padding,
            align_corners=False,
        )
        for part, padding in ((content, "border"), (alpha, "zeros"))
    )
    return images + cover * (shown - images)


def _shape(threat: Threat, size: tuple[int, int]) -> Tensor:
    """Return the pixels of the one shape of a threat, (h, w) bool."""
    shapes = () if isinstance(threat, SparsePixels) else threat.shapes(size)
    if len(shapes) != 1:
        raise PatchproofError(
            f"threat of a universal patch: expected one shape, got {threat.describe()}"
        )
    return shapes[0].pixels
