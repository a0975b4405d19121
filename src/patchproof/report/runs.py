"""One run in words: what its manifest and figures say to a reader."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from patchproof.errors import PatchproofError
from patchproof.evaluation.store import Result, RunKind, run_paper
from patchproof.evaluation.summary import (
    AttackSummary,
    DetectionSummary,
    ProbableSummary,
    Proportion,
    Summary,
)
from patchproof.results import ALERT
from patchproof.threat import SparsePixels, Threat, threat_from_dict
from patchproof.threat.masks import Mask, unlisted_masks

MEASURES: dict[RunKind, dict[str, str]] = {
    "recovery": {
        "certified": "The defense is right, and provably stays right whatever the patch shows.",
        "paper condition": "What the paper's criterion states; for comparison with published "
        "figures.",
        "clean": "The defense is right on the clean image.",
        "vanilla": "The undefended model is right on the clean image.",
    },
    "detection": {
        "certified detection": "The defense is right on the clean image without an alert, and "
        "provably stays right or alerts whatever the patch shows.",
        "clean": "The defense is right on the clean image, without an alert.",
        "alert": "The defense alerts on the clean image, which is false.",
        "vanilla": "The undefended model is right on the clean image.",
    },
    "probable": {
        "certified with probability": "A prediction, for which crops are drawn anew, is provably "
        "right with the probability that was asked for, or a higher one, whatever the patch shows; "
        "where vote shares are sampled, with the confidence that the run names.",
        "paper condition": "What the paper's criterion states; for comparison with published "
        "figures.",
        "clean": "One prediction of the defense is right on the clean image.",
        "vanilla": "The undefended model is right on the clean image.",
    },
    "attack": {
        "not broken": "The defense is right on the clean image, and right or alerts on the "
        "attacked one: what holds against every patch is no more than this.",
        "right under attack": "The defense is right on the attacked image; an alert is not.",
        "hit target": "Of the images with a target, those that get it.",
        "clean": "The defense is right on the clean image.",
        "vanilla": "The undefended model is right on the clean image.",
    },
}
"""The measures of a run of each kind in the order of its tables, certificates first, with what they
say."""

_NUMBERS = {
    "tau": "tau",
    "threshold": "T",
    "vote_threshold": "votes from",
    "trim": "trim",
    "count": "masking",
}
"""Settings of defenses, with the word for each in the name of a run; not said where 0 or None."""


@dataclass(frozen=True)
class Run:
    """A result with its words.

    Attributes:
        result: what the results folder holds.
    """

    result: Result

    def __post_init__(self) -> None:
        try:
            _ = (self.defense["type"], self.threat, self.image_size, self.dataset["name"])
            _ = (self.dataset["split"], self.dataset["count"], self.model["digest"])
        except (KeyError, TypeError) as error:
            raise PatchproofError(
                f"{self.result.folder / 'manifest.json'}: expected the identity of a run, "
                f"got one without {error}"
            ) from error

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the verdicts."""
        return dict(self.result.manifest["identity"])

    @property
    def kind(self) -> RunKind:
        """What the certificates promise, or that the run attacks."""
        return self.result.kind

    @property
    def about(self) -> dict[str, Any]:
        """How the run was made."""
        return dict(self.result.manifest.get("about", {}))

    @property
    def defense(self) -> dict[str, Any]:
        """The defense as JSON values."""
        return dict(self.identity["defense"])

    @property
    def attack(self) -> dict[str, Any]:
        """The attack as JSON values; empty for a run that certifies."""
        return dict(self.identity.get("attack", {}))

    @property
    def dataset(self) -> dict[str, Any]:
        """The data set as JSON values."""
        return dict(self.identity["dataset"])

    @property
    def model(self) -> dict[str, Any]:
        """The model as JSON values."""
        return dict(self.identity["model"])

    @cached_property
    def threat(self) -> Threat:
        """What the attacker may do."""
        return threat_from_dict(self.identity["threat"])

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images, in the pixels that the threat counts."""
        height, width = self.identity["image_size"]
        return int(height), int(width)

    @property
    def space(self) -> str:
        """The image size as ``"32x32"``."""
        return _times(self.image_size)

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks, each a union of boxes; none for defenses without."""
        return unlisted_masks(self.defense.get("masks", []))

    @property
    def budget(self) -> int | None:
        """Masks per side, where it is one number."""
        sides = _pair(self.defense.get("masks_per_side"))
        return sides[0] if sides and sides[0] == sides[1] else None

    @property
    def patch_in_short(self) -> str:
        """The patch without its space: ``"5x5 square"``."""
        return self.threat.label()

    @property
    def patch(self) -> str:
        """The patch with its space: ``"5x5 square of 32x32"``."""
        return f"{self.patch_in_short} of {self.space}"

    @property
    def system(self) -> str:
        """The defense in short: ``"PatchCleanser, k=6"``."""
        parts = [str(self.defense["type"])]
        if self.defense.get("inference", "double") != "double":
            parts.append(str(self.defense["inference"]))
        if sides := _pair(self.defense.get("masks_per_side")):
            parts.append(f"k={_once(sides)}")
        if (several := _pair(self.defense.get("multiplicity"))) and max(several) > 1:
            parts.append(f"multiplicity {_once(several)}")
        if self.defense.get("layout") == "balanced":
            parts.append("balanced")
        if self.defense.get("method", "interval") != "interval":
            parts.append(f"{self.defense['method']} bounds")
        if crop := _pair(self.defense.get("crop_size")):
            number = f"{self.defense['crops']} " if "crops" in self.defense else ""
            parts.append(f"{number}{self.defense['mode']} of {crop[0]}x{crop[1]}")
            if not self.defense.get("replacement", True):
                parts.append("without replacement")
            parts += [
                f"{name} {self.defense[name]:g}"
                for name in ("probability", "confidence")
                if name in self.defense
            ]
        if ablation := self.defense.get("ablation"):
            parts.append(f"{ablation['kind']} {ablation['size']}")
        parts += [
            str(self.defense[name]) for name in ("statistic", "feature") if name in self.defense
        ]
        if window := _pair(self.defense.get("window")):
            parts.append(f"window {_once(window)}")
        parts += [
            f"{word} {self.defense[name]:g}"
            for name, word in _NUMBERS.items()
            if self.defense.get(name)
        ]
        if self.kind == "attack":
            parts[-1] += f" under {self.attack.get('name', 'attack')}"
        return ", ".join(parts)

    @property
    def model_name(self) -> str:
        """What the model was built from."""
        spec = self.model.get("spec") or self.model.get("source") or "a model"
        return str(spec["name"] if isinstance(spec, dict) and "name" in spec else spec)

    @property
    def expected(self) -> int:
        """How many images the run is of, finished or not."""
        return int(self.dataset["count"])

    @property
    def missing(self) -> int:
        """How many of them have no result yet."""
        return self.expected - len(self.result.examples)

    def accuracies(self) -> dict[str, Proportion]:
        """Return the share of the images of each of ``MEASURES`` that the run has."""
        summary = self.result.summary
        if isinstance(summary, AttackSummary):
            attacked = {
                "not broken": summary.robust_accuracy,
                "right under attack": summary.attacked_accuracy,
                "hit target": summary.hit_target,
                "clean": summary.clean_accuracy,
                "vanilla": summary.vanilla_accuracy,
            }
            return {measure: share for measure, share in attacked.items() if share is not None}
        if isinstance(summary, DetectionSummary):
            return {
                "certified detection": summary.certified_detection_accuracy,
                "clean": summary.clean_accuracy,
                "alert": summary.alert_rate,
                "vanilla": summary.vanilla_accuracy,
            }
        promise = (
            {"certified with probability": summary.certified_with_probability_accuracy}
            if isinstance(summary, ProbableSummary)
            else {"certified": summary.certified_accuracy}
        )
        shares = promise | {
            "paper condition": summary.paper_accuracy,
            "clean": summary.clean_accuracy,
            "vanilla": summary.vanilla_accuracy,
        }
        return {measure: share for measure, share in shares.items() if share is not None}

    def caveat(self, measure: str) -> str:
        """Return what to bear in mind about one of the accuracies in a word, or nothing."""
        if measure == "paper condition" and run_paper(self.result.manifest) == "unsound":
            return "not sound"
        return ""

    def certified_share(self) -> Proportion:
        """Return the share of the images with a certificate of the run's kind."""
        return next(iter(self.accuracies().values()))

    def threat_words(self) -> str:
        """Say what the attacker may do, with the pixels and what they are pixels of."""
        if isinstance(self.threat, SparsePixels):
            words = self.threat.describe()
            share = self.threat.count / math.prod(self.image_size)
            return (
                f"{words[0].upper()}{words[1:]}. The image has {self.space} pixels: these are "
                f"{share:.2%} of them."
            )
        places = len(self.threat.regions(self.image_size))
        area = max(shape.area for shape in self.threat.shapes(self.image_size))
        share = area / math.prod(self.image_size)
        words = self.threat.describe()
        each = "each patch" if self.threat.patches > 1 else "the patch"
        return (
            f"{words[0].upper()}{words[1:]}. The image has {self.space} pixels: {each} hides up to "
            f"{share:.2%} of them and has {places:,} possible place{'' if places == 1 else 's'}."
        )

    def facts(self) -> list[tuple[str, str]]:
        """Return what was run on what, as terms and descriptions."""
        summary = self.result.summary
        facts = [("Threat", self.threat_words()), ("Defense", self._defense_words())]
        if self.attack:
            facts.append(("Attack", _settings(self.attack)))
        if self.masks:
            facts.append(("Mask set", self._mask_words()))
        facts.append(("Model", f"{self.model_name}, weights {str(self.model['digest'])[:12]}"))
        note = self.about.get("dataset_note")
        facts.append(
            (
                "Data",
                f"{self.dataset['name']}, {self.dataset['split']} split, {self.expected:,} images"
                + (f". {note}" if note else ""),
            )
        )
        certified = None
        if isinstance(summary, Summary):
            certified = summary.forwards_per_certified_image
        facts.append(
            (
                "Cost",
                f"{summary.forwards_per_image:,.1f} "
                f"{'surrogate' if self.attack else 'model'} forwards per image"
                + ("" if certified is None else f" ({certified:,.1f} per certified image)")
                + (", bounds not counted" if self._is_of_bounds else "")
                + f", {summary.images_per_second:,.1f} images/s",
            )
        )
        cases = ", ".join(f"{name} {count:,}" for name, count in summary.cases.items())
        facts.append(("Cases", cases))
        return facts

    def warnings(self) -> list[str]:
        """Say plainly what is missing from the figures."""
        warnings = []
        if self.missing > 0:
            warnings.append(
                f"Unfinished run: {len(self.result.examples):,} of {self.expected:,} images have a "
                f"result. The figures are of these; they may change."
            )
        elif not self.result.finished:
            warnings.append("Unfinished run: every image has a result, but the run did not end.")
        if corrupt := self.result.summary.corrupt:
            warnings.append(
                f"{corrupt:,} image{'' if corrupt == 1 else 's'} could not be read and "
                f"{'is' if corrupt == 1 else 'are'} in no accuracy."
            )
        return warnings

    def made(self) -> list[tuple[str, str]]:
        """Return how the run was made, as terms and descriptions."""
        about = self.about
        versions = {"patchproof": self.identity.get("patchproof")} | about.get("versions", {})
        command = about.get("command", [])
        rows = {
            "Command": shlex.join(command) if isinstance(command, list) else command,
            "Started": about.get("started"),
            "Versions": ", ".join(f"{name} {value}" for name, value in versions.items() if value),
            "Device": about.get("device"),
            "Threads": about.get("threads"),
            "Precision": self.identity.get("precision"),
            "Batch size": about.get("batch_size"),
            "Seed": about.get("seed"),
            "Stop": self.identity.get("stop"),
            "Model digest": self.model["digest"],
            "Data digest": self.dataset.get("digest"),
            "Rows digest": self.dataset.get("indices_digest"),
            "Results folder": self.result.folder.name,
        }
        return [(term, str(value)) for term, value in rows.items() if value not in (None, "")]

    def model_card(self) -> str:
        """Return the card of the model as JSON text; empty without one."""
        card = self.about.get("model_card")
        return json.dumps(card, indent=2, ensure_ascii=False) if card else ""

    def class_name(self, label: int) -> str:
        """Return the name of a class, or that it is an alert."""
        if label == ALERT:
            return "alert"
        names: Sequence[Any] = self.about.get("class_names") or []
        return str(names[label]) if 0 <= label < len(names) else f"class {label}"

    def but_for_defense(self) -> str:
        """Return what is equal in runs of other defenses on the same model, threat and images."""
        shared = ("threat", "image_size", "model", "dataset")
        return json.dumps({name: self.identity[name] for name in shared}, sort_keys=True)

    def but_for_tau(self) -> str:
        """Return what is equal in runs that differ only in the confidence for an alert."""
        defense = {name: value for name, value in self.defense.items() if name != "tau"}
        return json.dumps(self.identity | {"defense": defense}, sort_keys=True)

    def but_for_budget_and_patch(self) -> str:
        """Return what is equal in runs that differ only in the budget or the patch."""
        left_out = {"threat", "masks", "masks_per_side"}
        identity = {name: value for name, value in self.identity.items() if name != "threat"}
        identity["defense"] = {
            name: value for name, value in self.defense.items() if name not in left_out
        }
        return json.dumps(identity, sort_keys=True)

    @property
    def _is_of_bounds(self) -> bool:
        """Whether the defense bounds the margins of one network."""
        return "method" in self.defense

    def _defense_words(self) -> str:
        inference = {"double": "double masking", "challenger": "the challenger game"}
        parts = [str(self.defense["type"])]
        if "inference" in self.defense:
            parts.append(inference.get(self.defense["inference"], str(self.defense["inference"])))
        if self.masks and "tau" in self.defense:
            parts.append(
                "an alert where a masked image gets another label than the unmasked one, with a "
                f"confidence of at least {self.defense['tau']:g}"
            )
        if not self.masks and (words := self.about.get("defense_words")):
            parts.append(str(words))
        if "fill" in self.defense and (self.masks or self.defense.get("ablation")):
            parts.append(f"hidden pixels take the value {self.defense['fill']:g} of [0, 1]")
        if "tolerance" in self.defense:
            logits = f"up to {self.defense['tolerance']:g} logits"
            parts.append(
                f"margins {logits} count as lost in a certificate"
                if self.masks or self._is_of_bounds or "crop_size" in self.defense
                else f"certificates hold if rounding moves scores by {logits}"
            )
        return "; ".join(parts)

    def _mask_words(self) -> str:
        boxes = [box for mask in self.masks for box in mask]
        sizes = [
            _times((end(box.height for box in boxes), end(box.width for box in boxes)))
            for end in (min, max)
        ]
        unions = any(len(mask) > 1 for mask in self.masks)
        words = f"{len(self.masks)} masks" + (", unions of boxes" if unions else "")
        words += f" of {' to '.join(dict.fromkeys(sizes))} pixels"
        if sides := _pair(self.defense.get("masks_per_side")):
            words += f"; budget {_once(sides)} per side"
        if self.defense.get("layout") == "balanced":
            words += ", balanced"
        if shapes := self.defense.get("shapes"):
            words += f"; {shapes} covering shapes"
        if several := _pair(self.defense.get("multiplicity")):
            times = math.prod(several)
            words += (
                f"; multiplicity {_once(several)}: each patch region lies inside at least "
                f"{times} mask{'' if times == 1 else 's'}"
            )
        return words


def _settings(values: Mapping[str, Any]) -> str:
    """Return JSON values in words: ``"pgd, steps 40, places (all, stride 2)"``."""
    parts = []
    for name, value in values.items():
        if isinstance(value, dict):
            parts.append(f"{name} ({_settings(value)})")
        elif isinstance(value, list):
            parts.append(f"{name} {' '.join(map(str, value))}")
        elif name in ("name", "type", "kind"):
            parts.insert(0, str(value))
        elif value is not None:
            parts.append(f"{name} {f'{value:g}' if isinstance(value, float) else value}")
    return ", ".join(parts).replace("_", " ")


def _pair(value: Any) -> tuple[int, int] | None:
    """Return a value for rows and columns; None where there is none."""
    match value:
        case int(both) | [int(both)]:
            return both, both
        case [int(rows), int(columns)]:
            return rows, columns
    return None


def _times(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _once(pair: tuple[int, int]) -> str:
    """Return one number for two equal ones."""
    return str(pair[0]) if pair[0] == pair[1] else _times(pair)
