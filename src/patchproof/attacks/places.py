"""Where an attacker puts the patch: all places, some of them, or those that gradients favour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from patchproof.defenses.inference import default_batch_size
from patchproof.errors import PatchproofError
from patchproof.threat import Regions, SparsePixels, Threat
from patchproof.threat.regions import ImageSize
from patchproof.views.crops import box_sums

Search = Literal["gradient", "trial", "open", "random", "strided", "corners", "all"]
"""How places are chosen, see ``PlaceSearch``."""

_MOST_PLACES = 2**20
_MOST_AT_ONCE = 256
"""Forwards of images that are scored at once to choose places."""
_SEEN = 0.25
"""What is left of the saliency of pixels that a place chosen before covers."""


@dataclass(frozen=True)
class PlaceSearch:
    """Which places of the patch are tried, the most promising first.

    - ``"gradient"``: where the gradients of the objective are largest, summed over the patch, of
      the clean image and of the image under uniform noise; places that overlap earlier ones less.
    - ``"trial"``: where black, white and random contents do most harm, at every place of a stride.
    - ``"open"``: as ``"trial"``, but first of all where the defense has no certificate, which is
      where an attack can succeed, if its certificates are sound.
    - ``"random"``: drawn for each image.
    - ``"strided"``: every ``stride``-th row and column, and the last ones.
    - ``"corners"``: those nearest to the corners of the image (the weak adversary of Chiang et
      al., 2020, Section 3).
    - ``"all"``: every one.

    Of several patches, and of pixels anywhere, the last four draw sets of such places at random.

    Attributes:
        search: how.
        count: the most places for an image; None for as many as there are (``"strided"``,
            ``"corners"``, ``"all"``), else 4.
        stride: of ``"strided"``, ``"trial"`` and ``"open"``, in pixels, from the first place on.

    Raises:
        PatchproofError: another search, or numbers out of range.
    """

    search: Search = "gradient"
    count: int | None = None
    stride: int = 2

    def __post_init__(self) -> None:
        if self.search not in (known := get_args(Search)):
            raise PatchproofError(f"places: expected {' or '.join(known)}, got {self.search!r}")
        for name, number in (("count", self.count), ("stride", self.stride)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise PatchproofError(f"{name} of places: expected at least 1, got {number!r}")

    def choose(
        self,
        threat: Threat,
        scores: nn.Module | None,
        images: Tensor,
        labels: Tensor,
        seeds: Tensor,
        open_regions: Tensor | None = None,
    ) -> Tensor:
        """Choose places for each image.

        Args:
            threat: what the attacker may do.
            scores: a surrogate, for ``"gradient"``, ``"trial"`` and ``"open"``; without one they
                are random.
            images: (N, C, H, W).
            labels: (N,) int64.
            seeds: (N,) int64, one for each image's random numbers.
            open_regions: (N, R) bool, the regions of one patch that have no certificate, for
                ``"open"``; None where nothing is known.

        Returns:
            (N, K, P) int64: of P patches the numbers of their regions; of sparse pixels, of P
            pixels their numbers, row by row.
        """
        size = (images.shape[2], images.shape[3])
        if isinstance(threat, SparsePixels):
            candidates, each = torch.arange(size[0] * size[1]), threat.count
        else:
            regions = threat.regions(size)
            candidates, each = self._candidates(regions), threat.patches
        each = min(each, len(candidates))
        count = self.count
        if count is None:
            listed = self.search in ("strided", "corners", "all") and each == 1
            count = len(candidates) if listed else 4
        if each == 1:
            count = min(count, len(candidates))
        if len(images) * count * each > _MOST_PLACES:
            raise PatchproofError(
                f"places: expected at most {_MOST_PLACES:,} for a batch of {len(images)} images, "
                f"got {count:,} each: give a count, or a larger stride"
            )
        if self.search in ("gradient", "trial", "open") and scores is not None:
            return self._promising(
                threat, candidates, each, count, scores, images, labels, seeds, open_regions
            )
        if self.search in ("strided", "corners", "all") and each == 1:
            return candidates[:count].expand(len(images), -1)[..., None]
        everywhere = candidates.expand(len(images), -1)
        if each > 1:
            return _combinations(everywhere, each, count, seeds)
        return _shuffled(everywhere, seeds)[:, :count, None]

    def to_dict(self) -> dict[str, Any]:
        """Return the search as JSON values."""
        return {"search": self.search, "count": self.count, "stride": self.stride}

    def _candidates(self, regions: Regions) -> Tensor:
        """Return the numbers of the regions that the search looks at, (n,) int64."""
        boxes = _around(regions.parts)
        start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        # Shapes of several sizes have last places of their own, all with the same last pixels.
        first, last = start - start.amin(0), end == end.amax(0)
        if self.search == "corners":
            return ((first == 0) | last).all(1).nonzero().squeeze(1)
        if self.search in ("strided", "trial", "open"):
            return ((first % self.stride == 0) | last).all(1).nonzero().squeeze(1)
        return torch.arange(len(regions))

    def _promising(
        self,
        threat: Threat,
        candidates: Tensor,
        each: int,
        count: int,
        scores: nn.Module,
        images: Tensor,
        labels: Tensor,
        seeds: Tensor,
        open_regions: Tensor | None,
    ) -> Tensor:
        size = (images.shape[2], images.shape[3])
        regions = threat.regions(size)
        if self.search != "gradient" and not isinstance(threat, SparsePixels):
            harm = _harm_of_trials(threat, candidates, scores, images, labels, seeds)
            if open_regions is not None:
                harm = _first(open_regions[:, candidates], harm)
            if each == 1:
                return candidates[harm.topk(count, dim=1).indices][..., None]
            return candidates[_apart(harm, regions.parts[candidates], size, each, count)]
        saliency = _saliency(scores, images, labels, seeds)
        if isinstance(threat, SparsePixels):
            best = saliency.flatten(1).topk(min(4 * each, len(candidates)), dim=1).indices
            first = best[:, None, :each]
            others = _combinations(best, each, count - 1, seeds) if count > 1 else first[:, :0]
            return torch.cat([first, others], 1)
        chosen = []
        taken = torch.zeros(len(images), len(candidates), dtype=torch.bool)
        for _ in range(count):
            places = []
            left = saliency.clone()
            if each > 1:  # sets may have a place in common
                taken.zero_()
            for _ in range(each):
                sums = box_sums(left, regions.parts)[:, candidates].masked_fill(taken, -torch.inf)
                best = sums.argmax(1)
                taken.scatter_(1, best[:, None], True)
                place = candidates[best]
                places.append(place)
                covered = region_pixels(regions, place[:, None])
                left = left.masked_fill(covered, 0.0)
                saliency = torch.where(covered, _SEEN * saliency, saliency)
            chosen.append(torch.stack(places, 1))
        return torch.stack(chosen, 1)


def images_at_once(scores: nn.Module | None, image: Tensor, most: int) -> int:
    """Return how many images like ``image``, (C, H, W), go through a surrogate together.

    These are ``most``, or as many as are usual for images of that size if these are fewer, shared
    by the ``forwards`` that the surrogate takes for each.
    """
    each = int(getattr(scores, "forwards", 1))
    return max(1, min(most, default_batch_size(image, image.device)) // each)


def place_pixels(threat: Threat, size: ImageSize, places: Tensor) -> Tensor:
    """Return the pixels that the attacker may change at some places, (B, H, W) bool.

    Args:
        threat: what the attacker may do.
        size: (H, W) in pixels.
        places: (B, P) int64, as ``PlaceSearch.choose`` returns them.
    """
    if isinstance(threat, SparsePixels):
        flat = torch.zeros(len(places), size[0] * size[1], dtype=torch.bool)
        return flat.scatter_(1, places, True).view(-1, *size)
    return region_pixels(threat.regions(size), places)


def place_boxes(threat: Threat, size: ImageSize, places: Tensor) -> Tensor:
    """Return the smallest box (top, left, height, width) around each patch, (B, P, 4) int64.

    Args:
        threat: what the attacker may do.
        size: (H, W) in pixels.
        places: (B, P) int64, as ``PlaceSearch.choose`` returns them.
    """
    if isinstance(threat, SparsePixels):
        rows, columns = places // size[1], places % size[1]
        one = torch.ones_like(places)
        return torch.stack([rows, columns, one, one], -1)
    return _around(threat.regions(size).parts[places])


def region_pixels(regions: Regions, places: Tensor) -> Tensor:
    """Return the pixels in the union of some regions, (B, H, W) bool, of (B, P) int64."""
    top, left, height, width = regions.parts[places].flatten(1, 2).unbind(2)
    rows, columns = (torch.arange(length) for length in regions.image_size)
    in_rows = (rows >= top[..., None]) & (rows < (top + height)[..., None])
    in_columns = (columns >= left[..., None]) & (columns < (left + width)[..., None])
    met = torch.einsum("bph,bpw->bhw", in_rows.float(), in_columns.float())
    return met > 0


def margins(scores: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the best wrong class leads the label, (N,), of scores (N, classes)."""
    chosen = labels[:, None]
    others = scores.scatter(1, chosen, -torch.inf).amax(1)
    return others - scores.gather(1, chosen).squeeze(1)


def _around(parts: Tensor) -> Tensor:
    """Return the smallest box around each union, (..., 4), of (..., B, 4) boxes, some all 0."""
    start, end = parts[..., :2], parts[..., :2] + parts[..., 2:]
    used = parts[..., 2:3] > 0
    first = start.masked_fill(~used, torch.iinfo(torch.int64).max).amin(-2)
    return torch.cat([first, end.amax(-2) - first], -1)


def _saliency(scores: nn.Module, images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
    """Return how much each pixel moves the margin, (N, H, W): clean and under noise."""
    noise = torch.stack(
        [
            torch.rand(images.shape[1:], generator=torch.Generator().manual_seed(seed))
            for seed in seeds.tolist()
        ]
    ).to(images.device)
    total = torch.zeros(len(images), *images.shape[2:], dtype=torch.float64)
    at_once = images_at_once(scores, images[0], _MOST_AT_ONCE)
    for seen in (images, 0.7 * images + 0.3 * noise):
        for rows in torch.split(torch.arange(len(images)), at_once):
            given = seen[rows].detach().requires_grad_()
            with torch.enable_grad():
                lead = margins(scores(given), labels[rows]).sum()
                (slope,) = torch.autograd.grad(lead, given)
            # What a pixel can do is its slope times how far it can move that way.
            room = torch.where(slope > 0, 1.0 - given, given).detach()
            total[rows] += (slope.abs() * room).sum(1).nan_to_num().cpu()
    return total


@torch.no_grad()
def _harm_of_trials(
    threat: Threat,
    candidates: Tensor,
    scores: nn.Module,
    images: Tensor,
    labels: Tensor,
    seeds: Tensor,
) -> Tensor:
    """Return the largest margin of a wrong class with trial contents, (N, candidates)."""
    size = (images.shape[2], images.shape[3])
    harm = torch.full((len(images), len(candidates)), -torch.inf)
    inside = place_pixels(threat, size, candidates[:, None]).to(images.device)[:, None]
    at_once = images_at_once(scores, images[0], _MOST_AT_ONCE)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        generator = torch.Generator().manual_seed(int(seeds[number]))
        random = torch.rand(image.shape, generator=generator).round().to(images.device)
        for content in (torch.zeros_like(image), torch.ones_like(image), random):
            for start in range(0, len(candidates), at_once):
                part = inside[start : start + at_once]
                given = torch.where(part, content, image)
                found = margins(scores(given), label.expand(len(part))).cpu()
                those = slice(start, start + len(part))
                harm[number, those] = torch.maximum(harm[number, those], found.nan_to_num())
    return harm


def _apart(values: Tensor, parts: Tensor, size: ImageSize, each: int, count: int) -> Tensor:
    """Return sets of regions of high value, of which none overlap where there is room.

    Args:
        values: (N, R), of each region alone.
        parts: (R, B, 4), the regions.
        size: (H, W) in pixels.
        each: regions in a set.
        count: sets; a region that meets those of an earlier set is worth less.

    Returns:
        (N, count, each) int64.
    """
    regions = Regions(size, parts)
    values = (values - values.amin(1, keepdim=True)).nan_to_num(posinf=0.0)
    sets = []
    for _ in range(count):
        left, chosen = values.clone(), []
        for _ in range(each):
            best = left.argmax(1, keepdim=True)
            chosen.append(best)
            met = box_sums(region_pixels(regions, best).int(), parts) > 0
            left = torch.where(met, left.clamp(max=0.0) - 1.0, left)
            left.scatter_(1, best, -torch.inf)
            values = torch.where(met, _SEEN * values, values)
        sets.append(torch.cat(chosen, 1))
    return torch.stack(sets, 1)


def _shuffled(places: Tensor, seeds: Tensor) -> Tensor:
    """Return the places of each image, (N, n), in an order that its seed draws."""
    rows = [
        np.random.default_rng((seed, 0)).permutation(row.numpy())
        for seed, row in zip(seeds.tolist(), places, strict=True)
    ]
    return torch.from_numpy(np.stack(rows))


def _first(chosen: Tensor, values: Tensor) -> Tensor:
    """Return numbers in the order of the values, (N, n), those that are chosen above all others."""
    order = values.argsort(1)
    order = order.gather(1, chosen.gather(1, order).int().argsort(dim=1, stable=True))
    places = torch.arange(values.shape[1], dtype=values.dtype).expand_as(values)
    return torch.empty_like(values).scatter_(1, order, places)


def _combinations(places: Tensor, each: int, count: int, seeds: Tensor) -> Tensor:
    """Draw ``count`` sets of ``each`` of the places of each image, (N, count, each), of (N, n)."""
    sets = [_shuffled(places, seeds + (number << 32))[:, :each] for number in range(1, count + 1)]
    return torch.stack(sets, 1)
