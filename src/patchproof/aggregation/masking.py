"""Robust masking: of every class, the window of largest evidence is left out (PatchGuard)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchproof.aggregation.evidence import Bounds, Evidence
from patchproof.aggregation.features import FeatureAggregation, ahead
from patchproof.aggregation.windows import Windows
from patchproof.errors import PatchproofError
from patchproof.results import Outputs, distinct_rows

_MOST_ENTRIES = 2**22
"""Float64 values of evidence times patterns at once."""

_CACHED = 2**17
"""Float64 values of evidence at once: all classes of an image may not fit into caches."""

_NEAR_LARGEST = 0.05
"""Windows whose evidence is within this share of the largest count with it, for attackers."""

_NEAR_THRESHOLD = 0.05
"""Shares of evidence within this of the threshold are detected in part, for attackers."""

_OUTWARD = 1e-12
"""Share by which a bound is widened where it is compared with a product of the threshold."""


class RobustMasking(FeatureAggregation):
    """Leave out the window of largest evidence, class by class (PatchGuard, Algorithm 1).

    For each class the window of largest evidence is found. If it holds more than the share
    ``threshold`` of the class's evidence, it is detected and left out of the sum. The label is the
    class of the largest remaining sum. Evidence is at least 0, as Lemma 1 needs it.

    **Certificate.** Let A be the cells that a region corrupts, t_c the evidence of class c outside
    A, q_c(v) its evidence in window v outside A, T the threshold, and h the most evidence of a
    cell. Write |v & A| for the number of cells that both hold. The region holds if lower(y) >
    upper(c) for every other class c, or equal with y the lower index, where

        lower(y) = t_y - max q_y(v) over the windows v that can be detected:
                   q_y(v) + h |v & A| > T (t_y + h |v & A|)
        upper(c) = min over the windows v that contain A of
                   min(o / (1 - T), o + h |v|), where o = t_c - q_c(v)

    *lower.* All that is left out is one window, at most. It is detected only if its share, with
    whatever the attacker puts into its corrupted cells, is above T; most of all if these are full
    and the other corrupted cells empty.

    *upper.* Let e be the evidence in v of which A is part, the attacker's included, so that o + e
    is the total. If a window is left out, it holds at least e, so at most o stays. If none is, e <=
    T (o + e), and so o + e <= o / (1 - T); and e <= h |v| in any case. This is Lemma 1, and Lemma 2
    where windows are larger than A. The paper's Algorithm 2 lets benign windows alone be detected
    in the label's evidence: with T > 0 the attacker can make others fire, so its condition
    (``paper_condition``) is unsound; with T = 0 it is sound but for ties.

    The certificate is necessary at T = 0 and large h against attackers who set the evidence of all
    classes independently, as of logits. Of confidences and predictions it is sufficient.

    **Tolerance.** The proof holds for any evidence between ``Evidence.bounds``: t_y and q_y(v) in
    lower(y) take the least of each cell, and upper(c) the most. Whether a window can be detected is
    asked with the most in v and the least elsewhere.

    Args:
        windows: sliding windows over the views.
        evidence: of at least 0.
        threshold: T in [0, 1].
        tolerance: how far rounding may move a score of a view.

    Raises:
        PatchproofError: a threshold outside [0, 1], or evidence that may be negative.
    """

    def __init__(
        self, windows: Windows, evidence: Evidence, *, threshold: float = 0.0, tolerance: float
    ) -> None:
        super().__init__(evidence, tolerance)
        if not 0.0 <= threshold <= 1.0:
            raise PatchproofError(
                f"threshold: expected a share of the evidence in [0, 1], got {threshold!r}"
            )
        if evidence.low != 0.0:
            raise PatchproofError(
                "expected evidence clipped at 0 from below, without which a window of negative "
                f"evidence would hide others, got {evidence.low}"
            )
        self.windows = windows
        self.threshold = float(threshold)
        self.paper = "sound" if threshold == 0.0 else "unsound"
        self._overlaps: dict[int, tuple[Tensor, Overlaps]] = {}

    def class_scores(self, outputs: Outputs) -> Tensor:
        """Return the masked evidence of each class, (N, C) float64 (Algorithm 1, line 6)."""
        scores = torch.empty(len(outputs.labels), outputs.classes, dtype=torch.float64)
        for chunk in self._chunks(outputs, self.windows.members):
            scores[chunk] = self.combine(self.evidence.values(outputs.select(chunk)))
        return scores

    def combine(self, values: Tensor) -> Tensor:
        """Return the evidence without the window that is detected, (N, C) float64."""
        detected, window = self._detect(values)
        masked = self.windows.outside(values).flatten(1, 2).gather(1, window[:, None])[:, 0]
        return torch.where(detected, masked, values.sum(1))

    def undetected_scores(self, scores: Tensor) -> Tensor:
        """Return what counts as long as no window stands out, (N, C), of finite scores (N, V, C).

        A smooth maximum of the windows is left out, as much as its share of the evidence is above
        the threshold: whoever raises a class gains most by evidence in many windows, none of them
        the largest or detected.
        """
        values = self.evidence.soft(scores)
        inside, total = self.windows.inside(values).flatten(1, 2), values.sum(1)
        largest = inside.amax(1)
        width = _NEAR_LARGEST * largest.detach().clamp(min=1e-6)
        smooth = ((inside - largest[:, None]) / width[:, None]).logsumexp(1) * width + largest
        share = largest / total.clamp(min=1e-6)
        above = (share - self.threshold) / _NEAR_THRESHOLD
        detected = above.sigmoid() if self.threshold > 0 else torch.ones_like(above)
        return (total - detected * smooth) / scores.shape[1]

    def detected(self, outputs: Outputs) -> Tensor:
        """Return whether a window of each class's evidence is left out, (N, C) bool."""
        return self._detect(self.evidence.values(outputs))[0]

    def paper_condition(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> Tensor:
        """Algorithm 2 as printed, (N,) bool: over all windows as what the patch corrupts.

        Ties hold, and only windows of enough benign evidence can be detected in the label's.
        """
        holds = torch.zeros(len(labels), dtype=torch.bool)
        if self.threshold == 1.0:  # the paper has T < 1
            return holds
        windows = self.windows.members
        for chunk in self._chunks(outputs, windows):
            values = self.evidence.values(outputs.select(chunk))
            y = labels[chunk]
            of_label = values.gather(2, y[:, None, None].expand(-1, values.shape[1], 1)).squeeze(2)
            total = of_label @ (~windows).double().T
            removed = self._overlaps_of(windows).most(of_label, of_label, total, self.threshold, 0)
            upper = self.windows.outside(values).flatten(1, 2) / (1.0 - self.threshold)
            upper.scatter_(2, y[:, None, None].expand(-1, upper.shape[1], 1), -torch.inf)
            holds[chunk] = (upper.amax(2) <= total - removed).all(1)
        return holds & outputs.known.all(1)

    def _detect(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether a window is detected and which has most evidence, (N, C) each."""
        most, window = self.windows.inside(values).flatten(1, 2).max(1)
        return most > self.threshold * values.sum(1), window

    def bounds(self, outputs: Outputs, labels: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
        """Return lower(y), (N, P), and upper(c) of every class, (N, P, C)."""
        at = self.evidence.bounds(outputs, labels, self.tolerance)
        at_most = self._at_most(self._outside(at.high(slice(None))))
        return self._lower(at, patterns), self._overlaps_of(patterns).least(at_most)

    def _holds(self, outputs: Outputs, labels: Tensor, patterns: Tensor, top: int) -> Tensor:
        """Compare the bounds, a few classes at a time, and of these those that come near."""
        at = self.evidence.bounds(outputs, labels, self.tolerance)
        lowest = self._lower(at, patterns)
        overlaps = self._overlaps_of(patterns)
        before = torch.zeros_like(lowest, dtype=torch.int64)
        at_once = max(1, _CACHED // outputs.labels.numel())
        for start in range(0, outputs.classes, at_once):
            high = at.high(slice(start, start + at_once))
            classes = torch.arange(start, start + high.shape[2]).expand(len(labels), -1)
            # The total of a class bounds what stays of it if a window holds what is corrupted, and
            # few come near the label.
            near = ~(self._at_most(high.sum(1)) < lowest.amin(1, keepdim=True))
            near |= not overlaps.all_contained
            most = int((near & (classes != labels[:, None])).sum(1).max())
            if most == 0:
                continue
            if 2 * most < high.shape[2]:
                chosen = (near & (classes != labels[:, None])).int().topk(most, dim=1).indices
                high = high.gather(2, chosen[:, None].expand(-1, high.shape[1], -1))
                classes = chosen + start
            at_most = self._at_most(self._outside(high))
            if top == 1 and overlaps.unique:  # then the largest of all classes can be taken first
                own = classes == labels[:, None]
                others = at_most.masked_fill_(own[:, None, None], -torch.inf)
                largest = overlaps.least(others.amax(3, keepdim=True))[..., 0]
                if not (largest == lowest).any():  # no tie, so that its class matters
                    before += largest > lowest
                    continue
            before += ahead(lowest, overlaps.least(at_most), labels, classes)
        return before < top

    def _lower(self, at: Bounds, patterns: Tensor) -> Tensor:
        """Return lower(y), (N, P)."""
        total = at.low @ (~patterns).double().T
        return total - self._overlaps_of(patterns).most(
            at.low,
            at.high_of_label,
            total,
            self.threshold * (1.0 - _OUTWARD),
            self.evidence.high,
        )

    def _outside(self, high: Tensor) -> Tensor:
        """Return the sums outside of each window, of clean images: sums of evidence are exact."""
        return high.sum(1)[:, None, None] - self.windows.inside(high)

    def _at_most(self, outside: Tensor) -> Tensor:
        """Return upper(c) for one window around A, given the evidence outside of it."""
        if self.threshold == 0.0:
            return outside
        cells = self.windows.size[0] * self.windows.size[1]
        full = outside + self.evidence.high * cells
        if self.threshold == 1.0:
            return full
        rest = 1.0 - self.threshold
        return torch.minimum(outside / rest * (1.0 + _OUTWARD / rest), full)

    def _overlaps_of(self, patterns: Tensor) -> Overlaps:
        """Return what is to know about windows and patterns, made once for the same tensor."""
        held = self._overlaps.get(id(patterns))
        if held is None or held[0] is not patterns:  # a copy of this object has ids of before
            held = self._overlaps[id(patterns)] = (patterns, Overlaps(self.windows, patterns))
        return held[1]


class Overlaps:
    """Which windows meet and which hold the corrupted cells of each pattern.

    Args:
        windows: W windows over V cells.
        patterns: (P, V) bool.

    Attributes:
        unique: each pattern is in one window alone.
        all_contained: each pattern is in some window.
    """

    def __init__(self, windows: Windows, patterns: Tensor) -> None:
        self.windows = windows
        self.patterns = patterns
        on_grid = patterns.view(-1, *windows.grid)
        rows, self._row = distinct_rows(on_grid.any(2))
        columns, self._column = distinct_rows(on_grid.any(1))
        boxes = rows[self._row][:, :, None] & columns[self._column][:, None]
        self._are_boxes = bool((boxes == on_grid).all())
        self._axes = tuple(
            _Axis.of(windows.along(axis), sets) for axis, sets in enumerate((rows, columns))
        )
        self._at_once = max(1, _MOST_ENTRIES // patterns.numel())
        self.unique = all(axis.containing.shape[1] == 1 for axis in self._axes)
        self.all_contained = all(bool(axis.contained.all()) for axis in self._axes)

    def least(self, values: Tensor) -> Tensor:
        """Return the least value of the windows that contain each pattern, infinite if none does.

        Args:
            values: (N, down, across, K).

        Returns:
            (N, P, K).
        """
        rows, columns = self._axes
        values = values[:, rows.containing].amin(2)
        values = values[:, :, columns.containing].amin(3)
        contained = rows.contained[self._row] & columns.contained[self._column]
        least = values[:, self._row, self._column]
        return least.masked_fill(~contained[:, None], torch.inf)

    def most(
        self, low: Tensor, high: Tensor, total: Tensor, threshold: float, largest: float
    ) -> Tensor:
        """Return the largest q(v) over the windows v that can be detected, (N, P); see above.

        Args:
            low: (N, V) evidence of a class, at least: q(v) is its sum in v outside the pattern.
            high: (N, V) evidence of the class, at most.
            total: (N, P), the sum of ``low`` outside the patterns.
            threshold: the share of the evidence that a window is detected above.
            largest: what an attacker can put into a cell.
        """
        if threshold == 0.0:  # every window that holds anything
            return self._most_of_boxes(low) if self._are_boxes else self._most_of_all(low)
        members = self.windows.members.double().T
        filled = largest * (self.patterns.double() @ members)
        benign = (~self.patterns).double()
        most = []
        for chunk in torch.split(torch.arange(len(low)), self._at_once):
            inside = (low[chunk, None] * benign) @ members
            inside_most = (high[chunk, None] * benign) @ members + filled
            rest = total[chunk, :, None] - inside
            possible = inside_most > threshold * (rest + inside_most)
            most.append(inside.masked_fill(~possible, 0.0).amax(2))
        return torch.cat(most)

    def _most_of_all(self, low: Tensor) -> Tensor:
        """Return the largest sum in a window outside each pattern, (N, P)."""
        members, benign = self.windows.members.double().T, (~self.patterns).double()
        chunks = torch.split(low, self._at_once)
        return torch.cat([((chunk[:, None] * benign) @ members).amax(2) for chunk in chunks])

    def _most_of_boxes(self, low: Tensor) -> Tensor:
        """Return the same where every pattern is a box: rows times columns.

        A window either overlaps the box in rows and in columns, or holds nothing of it.
        """
        rows, columns = self._axes
        on_grid = low.view(-1, *self.windows.grid)
        left = torch.cat([rows.only_window @ on_grid, rows.both @ on_grid], 2)
        right = torch.cat([columns.window, columns.only_window], 1)
        overlapping = (left @ right.T).view(-1, *rows.shape, *columns.shape).amax(1).amax(2)
        sums = self.windows.inside(low[..., None])[..., 0]
        apart = torch.maximum(
            _largest(sums.amax(2), rows.apart)[:, :, None],
            _largest(sums.amax(1), columns.apart)[:, None],
        )
        return torch.maximum(overlapping, apart)[:, self._row, self._column]


@dataclass(frozen=True, eq=False)
class _Axis:
    """Windows and sets of rows (or columns) of the grid, along one axis of length n.

    Attributes:
        shape: (K, S): of each set the K windows that overlap it, repeated where there are fewer.
        window: (K * S, n) float64, the rows of these windows.
        both: (K * S, n), those in the set as well.
        only_window: (K * S, n), the others.
        apart: (S, windows) bool, the windows that hold nothing of a set.
        containing: (S, L) int64, of each set the L windows that contain it, repeated.
        contained: (S,) bool, whether there is any.
    """

    shape: tuple[int, int]
    window: Tensor
    both: Tensor
    only_window: Tensor
    apart: Tensor
    containing: Tensor
    contained: Tensor

    @classmethod
    def of(cls, windows: Tensor, sets: Tensor) -> _Axis:
        """Compare windows (W, n) bool with sets (S, n) bool."""
        overlap = (sets[:, None] & windows).any(2)
        contains = ~(sets[:, None] & ~windows).any(2)
        chosen = _listed(overlap).T
        window = windows[chosen]
        return cls(
            shape=(len(chosen), len(sets)),
            window=window.double().flatten(0, 1),
            both=(window & sets).double().flatten(0, 1),
            only_window=(window & ~sets).double().flatten(0, 1),
            apart=~overlap,
            containing=_listed(contains),
            contained=contains.any(1),
        )


def _listed(chosen: Tensor) -> Tensor:
    """Return the indices of the true entries of each row, (S, K), the first repeated to fill up."""
    order = chosen.int().sort(dim=1, descending=True, stable=True).indices
    order = order[:, : max(1, int(chosen.sum(1).max()))]
    return torch.where(chosen.gather(1, order), order, order[:, :1])


def _largest(values: Tensor, allowed: Tensor) -> Tensor:
    """Return the largest of the allowed values, all at least 0, or 0: (N, S) of (N, W), (S, W)."""
    return values[:, None].masked_fill(~allowed, 0.0).amax(2)
