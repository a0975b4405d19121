"""The analyses of the PatchGuard paper (Section 5.3, Appendices A, D and F), as tables.

Each is a function from classifiers whose features are recorded to a table with a row for each
setting. An accuracy ``x`` comes with the ends of its 95% Wilson interval, ``x_low`` and ``x_high``,
and is a share of the ``count`` images of its row. They are those of ``Summary``: vanilla, clean,
certified, and paper (the paper's condition, Algorithm 2).

Everything that can be refused is refused before anything is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from patchproof.aggregation import (
    ClippedSum,
    CountedVotes,
    FeatureAggregation,
    Logits,
    Prediction,
    RobustMasking,
    SpatialVotes,
    Windows,
    median,
    trimmed_sum,
    without_largest,
)
from patchproof.aggregation.evidence import LARGEST, Evidence
from patchproof.defenses.derandomized_smoothing import DEFAULT_VOTE_THRESHOLD
from patchproof.defenses.feature_windows import choose_windows
from patchproof.defenses.over_features import (
    Feature,
    FeatureViews,
    default_feature,
    evidence_of,
)
from patchproof.errors import PatchproofError
from patchproof.evaluation.feature_recording import Attack, FeatureRecording, Part
from patchproof.evaluation.local_attack import RandomPlaceAttack
from patchproof.evaluation.summary import Proportion
from patchproof.results import Corruption, Verdict
from patchproof.threat import SquarePatch, Threat
from patchproof.threat.regions import ImageSize
from patchproof.views import LocalFeatureViews
from patchproof.views.cells import CellViews

UNBOUNDED = LARGEST
"""Clipping bounds this far from 0 clip nothing: they stand for infinity."""

Aggregator = Literal[
    "patchguard",
    "clipped-bagnet",
    "derandomized-smoothing",
    "bagcert",
    "median",
    "trimmed-mean",
    "top-masking",
]
"""The defenses that recover the label from features, by their names on the command line."""

Bounds = tuple[float, float]
"""The lower and the upper clipping bound of logits."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A classifier that is analysed.

    Attributes:
        name: in the tables.
        views: its local features, or the ablations that it looks at; places of the last feature
            map of a network with large receptive fields, for ``attacked_logits`` alone.
        record: returns what it says, on clean or on attacked images; makes the recording if need
            be.
        image_size: (H, W) in pixels.
        tolerance: how far (logits) rounding may move a score of a view.
        card: how it was made.
    """

    name: str
    views: FeatureViews | CellViews
    record: Callable[[Attack | None], FeatureRecording]
    image_size: ImageSize
    tolerance: float
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def small(self) -> FeatureViews:
        """The views, each of which sees a small part of the image.

        Raises:
            PatchproofError: they do not.
        """
        if isinstance(self.views, CellViews):
            raise PatchproofError(
                f"expected features that each see a small part of the image, got {self.sees} pixels"
            )
        return self.views

    def corruption(self, threat: Threat) -> Corruption:
        """Return which views each patch region corrupts."""
        return self.small.corruption(threat)

    def masking(
        self,
        threat: Threat,
        *,
        feature: Feature | None = None,
        threshold: float = 0.0,
        mask_for: Threat | None = None,
        top: int = 1,
    ) -> Trial:
        """Return robust masking as ``PatchGuard`` builds it, to be tried on the recording.

        Args:
            threat: one patch.
            feature: by default the paper's.
            threshold: T in [0, 1].
            mask_for: the patch that the windows are made for; None for ``threat``.
            top: the label stays among this many classes.

        Raises:
            PatchproofError: as ``PatchGuard`` does.
        """
        corruption = self.corruption(threat)
        windows = choose_windows(self.small, corruption, threat, self.image_size, mask_for=mask_for)
        evidence = evidence_of(default_feature(self.small, feature))
        aggregation = RobustMasking(
            windows, evidence, threshold=threshold, tolerance=self.tolerance
        )
        return Trial(aggregation, corruption.patterns, top)

    def without_masking(self, threat: Threat) -> str:
        """Say why there is no robust masking against a patch; nothing where there is."""
        try:
            self.masking(threat)
        except PatchproofError as error:
            return str(error)
        return ""

    def trial(self, name: Aggregator, threat: Threat, feature: Feature | None = None) -> Trial:
        """Return a defense over these views as its class builds it by default.

        Args:
            name: as the command line has it.
            threat: what the attacker may do.
            feature: by default the paper's; of the defenses that can take another.

        Raises:
            PatchproofError: as the defense does.
        """
        if name == "patchguard":
            return self.masking(threat, feature=feature)
        patterns = self.corruption(threat).patterns
        evidence = evidence_of(default_feature(self.small, feature))
        most, views = int(patterns.sum(1).max()), self.views.count
        aggregation: FeatureAggregation
        match name:
            case "clipped-bagnet":
                aggregation = ClippedSum(self.tolerance)
            case "derandomized-smoothing":
                aggregation = CountedVotes(DEFAULT_VOTE_THRESHOLD, self.tolerance)
            case "bagcert":
                aggregation = SpatialVotes(Prediction(), self.tolerance)
            case "median":
                aggregation = median(evidence, views, self.tolerance)
            case "trimmed-mean":
                aggregation = trimmed_sum(evidence, views, most, self.tolerance)
            case "top-masking":
                aggregation = without_largest(evidence, views, most, self.tolerance)
        return Trial(aggregation, patterns)

    @property
    def sees(self) -> str:
        """What a view sees, such as 7x7 pixels."""
        if isinstance(self.views, CellViews):
            return _by(self.views.size)
        if isinstance(self.views, LocalFeatureViews):
            return _by(self.views.fields.size)
        return _by(self.views.ablation.block(self.image_size))

    @property
    def stride(self) -> str:
        """Pixels between neighbouring views."""
        if isinstance(self.small, LocalFeatureViews):
            return _side(self.small.fields.stride)
        return "1"


@dataclass(frozen=True, eq=False)
class Trial:
    """An aggregation and what it is certified against.

    Attributes:
        aggregation: from the features to a label.
        patterns: (P, V) bool, the views that each kind of patch region corrupts.
        top: the label stays among this many classes.
    """

    aggregation: FeatureAggregation
    patterns: Tensor
    top: int = 1

    @property
    def window(self) -> str:
        """The views in a window; empty without windows."""
        if isinstance(self.aggregation, RobustMasking):
            return _by(self.aggregation.windows.size)
        return ""

    def hits(self, part: Part) -> dict[str, Tensor]:
        """Return which images are right, certified, and meet the paper's condition, (n,) each."""
        outputs, right = part.outputs, part.right
        if self.top == 1:
            clean = self.aggregation.predict(outputs)[0] == right
        else:
            clean = (self.aggregation.top(outputs, self.top) == right[:, None]).any(1)
        certified = torch.zeros_like(clean)
        chosen = clean.nonzero().squeeze(1)  # no other image can be certified
        verdicts = self.aggregation.certify(
            outputs.select(chosen), right[chosen], self.patterns, top=self.top
        )
        certified[chosen] = (verdicts == Verdict.HOLDS).all(1)
        hits = {"vanilla": _among(part.whole, right, self.top), "clean": clean}
        hits["certified"] = certified
        if self.top == 1 and self.aggregation.paper is not None:
            hits["paper"] = self.aggregation.paper_condition(outputs, right, self.patterns)
        return hits


Row = dict[str, Any]
"""The columns of a row that say what it is about."""


def possible(
    subjects: Iterable[Subject], threats: Iterable[Threat], name: Aggregator = "patchguard"
) -> tuple[list[tuple[Subject, Threat]], list[str]]:
    """Return with which patches a defense can be built, and for all others why it cannot.

    Raises:
        PatchproofError: with none.
    """
    pairs, refusals = [], []
    first: PatchproofError | None = None
    for subject in subjects:
        for threat in threats:
            try:
                subject.trial(name, threat)
            except PatchproofError as error:
                first = first or error
                refusals.append(f"{subject.name}, {threat.label()}: {error}")
            else:
                pairs.append((subject, threat))
    if not pairs and first is not None:
        raise first
    return pairs, refusals


def check_masks(subject: Subject, patches: Sequence[int], masks: Sequence[int]) -> None:
    """Raise ``PatchproofError`` unless ``overlarge_masks`` can be made."""
    for mask, side in _large_enough(patches, masks):
        subject.masking(SquarePatch(side), mask_for=SquarePatch(mask))


def check_windows(subject: Subject, sides: Sequence[int]) -> None:
    """Raise ``PatchproofError`` unless ``masked_windows`` can be made."""
    for side in sides:
        _sliding(subject, side)


def robustness(
    pairs: Sequence[tuple[Subject, Threat]], feature: Feature | None = None
) -> pd.DataFrame:
    """Tell what robust masking achieves against patches (Tables 8 and 14, Figure 8).

    Returns:
        A row for each pair: ``model``, ``receptive_field`` (pixels that a view sees), ``stride``,
        ``recipe`` (of its training), ``threat``, ``patch_side`` (pixels, the longest), ``window``
        (views), and the accuracies.
    """
    return _tried(
        [
            (
                subject,
                {
                    "model": subject.name,
                    "receptive_field": subject.sees,
                    "stride": subject.stride,
                    "recipe": str(subject.card.get("made", {}).get("recipe", "")),
                }
                | _patch(subject, threat),
                subject.masking(threat, feature=feature),
            )
            for subject, threat in pairs
        ]
    )


def aggregations(
    subjects: Sequence[Subject],
    threats: Sequence[Threat],
    names: Sequence[Aggregator],
    feature: Feature | None = None,
) -> pd.DataFrame:
    """Compare secure aggregations of the same features (Section 6, Table 4).

    Patches that are too large for a defense are left out for it.

    Returns:
        A row for each defense, model and patch: ``model``, ``defense``, ``threat``,
        ``patch_side``, ``window``, and the accuracies; ``paper`` is missing where the paper states
        no condition.
    """
    return _tried(
        [
            (
                subject,
                {"model": subject.name, "defense": name} | _patch(subject, threat),
                subject.trial(name, threat, feature),
            )
            for name in names
            for subject, threat in possible(subjects, threats, name)[0]
        ]
    )


def feature_types(
    pairs: Sequence[tuple[Subject, Threat]], features: Sequence[Feature]
) -> pd.DataFrame:
    """Compare logits, confidences and predictions as evidence (Tables 10 and 11).

    Returns:
        A row for each feature and pair: ``model``, ``feature``, ``threat``, ``patch_side``,
        ``window``, and the accuracies.
    """
    return _tried(
        [
            (
                subject,
                {"model": subject.name, "feature": feature} | _patch(subject, threat),
                subject.masking(threat, feature=feature),
            )
            for feature in features
            for subject, threat in pairs
        ]
    )


def overlarge_masks(
    subjects: Sequence[Subject],
    patches: Sequence[int],
    masks: Sequence[int],
    feature: Feature | None = None,
) -> pd.DataFrame:
    """Tell what windows for a larger patch than the actual one achieve (Table 12).

    Args:
        subjects: classifiers.
        patches: sides of square patches, in pixels.
        masks: sides of the square patches that the windows are made for; those smaller than a patch
            are left out for it.
        feature: by default the paper's.

    Returns:
        A row for each model, side of the mask and patch: ``model``, ``mask_side`` (pixels),
        ``threat``, ``patch_side``, ``window``, and the accuracies. ``paper`` is Algorithm 2, which
        proves the same for every patch up to the mask.

    Raises:
        PatchproofError: no mask is as large as any patch, or as ``PatchGuard`` does.
    """
    return _tried(
        [
            (
                subject,
                {"model": subject.name, "mask_side": mask} | _patch(subject, SquarePatch(side)),
                subject.masking(SquarePatch(side), feature=feature, mask_for=SquarePatch(mask)),
            )
            for subject in subjects
            for mask, side in _large_enough(patches, masks)
        ]
    )


def top_classes(
    pairs: Sequence[tuple[Subject, Threat]],
    counts: Sequence[int],
    feature: Feature | None = None,
) -> pd.DataFrame:
    """Certify that the label stays among the k classes of most evidence (Appendix D, Table 15).

    Returns:
        A row for each pair and k: ``model``, ``threat``, ``patch_side``, ``window``, ``k``, and
        vanilla, clean and certified accuracy among k classes.
    """
    return _tried(
        [
            (
                subject,
                {"model": subject.name} | _patch(subject, threat) | {"k": count},
                subject.masking(threat, feature=feature, top=count),
            )
            for subject, threat in pairs
            for count in counts
        ]
    ).drop(columns=["paper", "paper_low", "paper_high"], errors="ignore")


def thresholds(
    pairs: Sequence[tuple[Subject, Threat]],
    values: Sequence[float],
    feature: Feature | None = None,
) -> pd.DataFrame:
    """Tell what a threshold T above 0 does (Table 9).

    Returns:
        A row for each pair and T: ``model``, ``threat``, ``patch_side``, ``window``, ``threshold``,
        the accuracies, and ``false_positives``: in how many clean images a window is detected in
        the evidence of the class that is returned.
    """
    return _tried(
        [
            (
                subject,
                {"model": subject.name} | _patch(subject, threat) | {"threshold": float(value)},
                subject.masking(threat, feature=feature, threshold=value),
            )
            for subject, threat in pairs
            for value in values
        ],
        detections=True,
    )


def clipping(subjects: Sequence[Subject], bounds: Sequence[Bounds]) -> pd.DataFrame:
    """Tell how undefended models bear clipped local logits (Table 6).

    Args:
        subjects: classifiers.
        bounds: lower and upper, infinite ones included.

    Returns:
        A row for each model and pair of bounds: ``model``, ``receptive_field``, ``clipped_below``,
        ``clipped_above``, and ``vanilla``: the class of the largest sum of the clipped logits is
        right.

    Raises:
        PatchproofError: a lower bound that is not below the upper.
    """
    evidences = [Logits(*np.clip(pair, -UNBOUNDED, UNBOUNDED).tolist()) for pair in bounds]
    rows = []
    for subject in subjects:
        hits: list[list[Tensor]] = [[] for _ in bounds]
        for part in subject.record(None).parts():
            for of_bounds, evidence in zip(hits, evidences, strict=True):
                label = evidence.values(part.outputs).sum(1).argmax(1)
                of_bounds.append(label == part.right)
        for (low, high), of_bounds in zip(bounds, hits, strict=True):
            right = torch.cat(of_bounds)
            rows.append(
                {
                    "model": subject.name,
                    "receptive_field": subject.sees,
                    "clipped_below": low,
                    "clipped_above": high,
                    "count": len(right),
                }
                | accuracies(vanilla=right)
            )
    return pd.DataFrame(rows)


def masked_windows(
    subjects: Sequence[Subject], sides: Sequence[int], feature: Feature | None = None
) -> pd.DataFrame:
    """Tell how undefended models bear windows of features that are left out (Table 7).

    Logits are not clipped.

    Args:
        subjects: classifiers.
        sides: of the windows, in views along each axis that has several; 0 leaves nothing out.
        feature: by default the paper's.

    Returns:
        A row for each model and side: ``model``, ``window_side``, ``window``, ``windows`` (how
        many), ``masked_accuracy`` (mean over images and windows), ``images_wrong`` (images for
        which some window leaves a wrong prediction) and ``windows_changed`` (mean over images of
        the share of windows that change the prediction).

    Raises:
        PatchproofError: a window that leaves nothing.
    """
    trials = [(subject, side, _sliding(subject, side)) for subject in subjects for side in sides]
    rows = []
    for subject in subjects:
        own = [(side, windows) for other, side, windows in trials if other is subject]
        evidence = _unclipped(default_feature(subject.small, feature))
        masked: list[list[Tensor]] = [[] for _ in own]
        changed: list[list[Tensor]] = [[] for _ in own]
        for part in subject.record(None).parts():
            values = evidence.values(part.outputs)
            whole = values.sum(1).argmax(1)[:, None]
            for number, (_, windows) in enumerate(own):
                label = whole
                if windows is not None:
                    label = windows.outside(values).argmax(3).flatten(1)
                masked[number].append((label == part.right[:, None]).double())
                changed[number].append((label != whole).double().mean(1))
        for number, (side, windows) in enumerate(own):
            right = torch.cat(masked[number])
            rows.append(
                {
                    "model": subject.name,
                    "window_side": side,
                    "window": "none" if windows is None else _by(windows.size),
                    "windows": right.shape[1] if windows is not None else 0,
                    "count": len(right),
                    "masked_accuracy": float(right.mean()),
                }
                | accuracies(images_wrong=(right < 1).any(1))
                | {"windows_changed": float(torch.cat(changed[number]).mean())}
            )
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class AttackedLogits:
    """What an attack does to local logits.

    Attributes:
        histogram: a row for each model, kind of image, kind of evidence and bin: ``model``,
            ``image`` (clean or attacked), ``evidence`` (true or malicious class), ``bin_low``,
            ``bin_high`` (logits, half-open) and ``features`` (how many).
        summary: a row for each model and kind of image: ``vanilla``, ``clean`` (robust masking
            is right; on attacked images too; missing where no windows can be had), and
            ``wrong_features`` (share of local predictions that are wrong), and the largest local
            logit of either class.
        wrong: a row for each model: ``receptive_field``, ``features`` (of an image), the shares of
            wrong local predictions on attacked and on clean images (``wrong_attacked``,
            ``wrong_original``), their difference ``wrong_more``, and the shares of wrong
            predictions of the undefended model, ``wrong_global`` on attacked and
            ``wrong_global_original`` on clean images.
    """

    histogram: pd.DataFrame
    summary: pd.DataFrame
    wrong: pd.DataFrame


def attacked_logits(
    subjects: Sequence[Subject], attack: RandomPlaceAttack, bins: int = 60
) -> AttackedLogits:
    """Compare the local logits of clean and attacked images (Figure 3, Table 2).

    The malicious class is the wrong class that the undefended model scores highest on the attacked
    image, also on the clean image.

    Args:
        subjects: classifiers.
        attack: of a patch; robust masking is made for it where that is possible.
        bins: of the histogram.
    """
    histograms, summaries, wrong = [], [], []
    for subject in subjects:
        possible = not subject.without_masking(attack.threat)
        trial = subject.masking(attack.threat) if possible else None
        attacked = subject.record(attack)
        malicious: dict[int, int] = {}
        for part in attacked.parts():
            others = part.whole.scatter(1, part.right[:, None], -torch.inf)
            malicious.update(zip(part.index.tolist(), others.argmax(1).tolist(), strict=True))
        logits: dict[tuple[str, str], Tensor] = {}
        undefended: dict[str, Row] = {}
        for image, recording in (("clean", subject.record(None)), ("attacked", attacked)):
            summary, evidence = _local_logits(recording, malicious, trial)
            summaries.append({"model": subject.name, "image": image} | summary)
            undefended[image] = summary
            logits |= {(image, name): values for name, values in evidence.items()}
        wrong.append(_wrong(subject, undefended["attacked"], undefended["clean"]))
        ends = torch.stack([end for values in logits.values() for end in values.aminmax()])
        edges = np.linspace(float(ends.min()), float(ends.max()), bins + 1)
        for (image, name), values in logits.items():
            counts, _ = np.histogram(values.numpy(), edges)
            histograms.append(
                pd.DataFrame(
                    {
                        "model": subject.name,
                        "image": image,
                        "evidence": name,
                        "bin_low": edges[:-1],
                        "bin_high": edges[1:],
                        "features": counts,
                    }
                )
            )
    return AttackedLogits(
        pd.concat(histograms, ignore_index=True), pd.DataFrame(summaries), pd.DataFrame(wrong)
    )


def _wrong(subject: Subject, attacked: Row, clean: Row) -> Row:
    """Return the row of ``AttackedLogits.wrong`` from those of its summary."""
    return {
        "model": subject.name,
        "receptive_field": subject.sees,
        "features": subject.views.count,
        "count": attacked["count"],
        "wrong_attacked": attacked["wrong_features"],
        "wrong_original": clean["wrong_features"],
        "wrong_more": attacked["wrong_features"] - clean["wrong_features"],
        "wrong_global": 1 - attacked["vanilla"],
        "wrong_global_low": 1 - attacked["vanilla_high"],
        "wrong_global_high": 1 - attacked["vanilla_low"],
        "wrong_global_original": 1 - clean["vanilla"],
    }


def _local_logits(
    recording: FeatureRecording, malicious: Mapping[int, int], trial: Trial | None
) -> tuple[Row, dict[str, Tensor]]:
    """Return the summary of a recording, and the finite logits of two classes, (M,) each."""
    vanilla, clean, wrong = [], [], []
    logits: dict[str, list[Tensor]] = {"true class": [], "malicious class": []}
    for part in recording.parts():
        scores = part.outputs.scores
        assert scores is not None, "recordings hold them"
        vanilla.append(part.vanilla)
        if trial is not None:
            clean.append(trial.aggregation.predict(part.outputs)[0] == part.right)
        wrong.append((part.outputs.labels != part.right[:, None]).double().mean(1))
        classes = {
            "true class": part.right,
            "malicious class": torch.tensor([malicious[index] for index in part.index.tolist()]),
        }
        for name, chosen in classes.items():
            own = scores.gather(2, chosen[:, None, None].expand(-1, scores.shape[1], 1))
            logits[name].append(own[own.isfinite()])
    joined = {name: torch.cat(values) for name, values in logits.items()}
    missing = dict.fromkeys(("clean", "clean_low", "clean_high"), float("nan"))
    row = {
        "count": len(recording),
        **accuracies(vanilla=torch.cat(vanilla)),
        **(accuracies(clean=torch.cat(clean)) if clean else missing),
        "wrong_features": float(torch.cat(wrong).mean()),
        "largest_true": float(joined["true class"].max()),
        "largest_malicious": float(joined["malicious class"].max()),
    }
    return row, joined


def accuracies(**hits: Tensor) -> dict[str, float]:
    """Return the share of True of each (N,) bool, with the ends of its interval."""
    columns: dict[str, float] = {}
    for name, values in hits.items():
        share = Proportion.of(int(values.sum()), len(values))
        columns |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
    return columns


def _large_enough(patches: Sequence[int], masks: Sequence[int]) -> list[tuple[int, int]]:
    """Return the pairs of a mask and a patch that is not larger, or raise if there is none."""
    chosen = [(mask, side) for mask in masks for side in patches if mask >= side]
    if not chosen:
        raise PatchproofError(
            f"masks: expected some of at least the {min(patches)} pixels of a patch's side, got "
            f"{', '.join(map(str, masks))}"
        )
    return chosen


def _tried(rows: Sequence[tuple[Subject, Row, Trial]], detections: bool = False) -> pd.DataFrame:
    """Return a table of trials; each recording is read once.

    Args:
        rows: of each row the classifier, the columns that say what it is, and the trial.
        detections: tell in how many clean images a window is detected.
    """
    hits: list[dict[str, list[Tensor]]] = [{} for _ in rows]
    for subject in dict.fromkeys(subject for subject, _, _ in rows):
        own = [number for number, row in enumerate(rows) if row[0] is subject]
        for part in subject.record(None).parts():
            for number in own:
                trial = rows[number][2]
                made = trial.hits(part)
                if detections:
                    label = trial.aggregation.predict(part.outputs)[0]
                    assert isinstance(trial.aggregation, RobustMasking), "it alone detects"
                    detected = trial.aggregation.detected(part.outputs)
                    made["false_positives"] = detected.gather(1, label[:, None])[:, 0]
                for name, values in made.items():
                    hits[number].setdefault(name, []).append(values)
    table = []
    for (_, row, trial), of_row in zip(rows, hits, strict=True):
        joined = {name: torch.cat(values) for name, values in of_row.items()}
        count = {"window": trial.window, "count": len(joined["clean"])}
        table.append(row | count | accuracies(**joined))
    return pd.DataFrame(table)


def _among(scores: Tensor, right: Tensor, count: int) -> Tensor:
    """Return whether the right class is among the ``count`` of highest scores, (n,) bool."""
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return (best == right[:, None]).any(1) & scores.isfinite().all(1)


def _sliding(subject: Subject, side: int) -> Windows | None:
    """Return windows of so many views a side; None for 0.

    Raises:
        PatchproofError: views that are not on a grid, or windows that leave nothing.
    """
    grid = subject.small.grid
    if grid is None:
        raise PatchproofError("windows: expected views on a grid, got combinations of bands")
    if side == 0:
        return None
    size = (1 if grid[0] == 1 else side, 1 if grid[1] == 1 else side)
    if size == grid or any(part > whole for part, whole in zip(size, grid, strict=True)):
        raise PatchproofError(
            f"windows: expected less than the {_by(grid)} views of {subject.name}, got {side} a "
            "side, which would leave nothing"
        )
    return Windows(grid, size, subject.small.wraps)


def _unclipped(feature: Feature) -> Evidence:
    return Logits(-UNBOUNDED, UNBOUNDED) if feature == "logits" else evidence_of(feature)


def _patch(subject: Subject, threat: Threat) -> Row:
    shapes = threat.shapes(subject.image_size)
    return {
        "threat": threat.label(),
        "patch_side": max(max(shape.height, shape.width) for shape in shapes),
    }


def _side(lengths: tuple[int, int]) -> str:
    return str(lengths[0]) if lengths[0] == lengths[1] else _by(lengths)


def _by(lengths: tuple[int, int]) -> str:
    return "x".join(map(str, lengths))
