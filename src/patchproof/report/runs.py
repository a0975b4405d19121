"""One run in words: what its manifest and figures say to a reader."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from patchproof.evaluation.store import Result
from patchproof.evaluation.summary import Proportion
from patchproof.results import PatchproofError
from patchproof.threat import Box, Threat, threat_from_dict

MEASURES = {
    "certified": "The defense is right, and provably stays right whatever the patch shows.",
    "paper condition": "What the paper's criterion states; for comparison with published figures.",
    "clean": "The defense is right on the clean image.",
    "vanilla": "The undefended model is right on the clean image.",
}
"""The measures of a run in the order of its tables, with what they say."""


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
    def about(self) -> dict[str, Any]:
        """How the run was made."""
        return dict(self.result.manifest.get("about", {}))

    @property
    def defense(self) -> dict[str, Any]:
        """The defense as JSON values."""
        return dict(self.identity["defense"])

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
    def masks(self) -> list[Box]:
        """The masks; none for defenses without."""
        return [Box(*box) for box in self.defense.get("masks", [])]

    @property
    def budget(self) -> int | None:
        """Masks per side, where it is one number."""
        sides = _pair(self.defense.get("masks_per_side"))
        return sides[0] if sides and sides[0] == sides[1] else None

    @property
    def patch_in_short(self) -> str:
        """The patch without its space: ``"5x5 square"``."""
        height, width = self.threat.extent()
        place = self.identity["threat"].get("locations", "anywhere")
        where = {"anywhere": "", "corners": " in a corner"}
        shape = "square" if height == width else "rectangle"
        return f"{height}x{width} {shape}" + (
            where[place] if isinstance(place, str) else " in a box"
        )

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
        """Return the accuracy of each of ``MEASURES``."""
        summary = self.result.summary
        return {
            "certified": summary.certified_accuracy,
            "paper condition": summary.paper_accuracy,
            "clean": summary.clean_accuracy,
            "vanilla": summary.vanilla_accuracy,
        }

    def threat_words(self) -> str:
        """Say what the attacker may do, with the pixels and what they are pixels of."""
        places = len(self.threat.regions(self.image_size))
        height, width = self.threat.extent()
        share = height * width / math.prod(self.image_size)
        words = self.threat.describe()
        return (
            f"{words[0].upper()}{words[1:]}. The image has {self.space} pixels: the patch hides "
            f"{share:.2%} of them and has {places:,} possible place{'' if places == 1 else 's'}."
        )

    def facts(self) -> list[tuple[str, str]]:
        """Return what was run on what, as terms and descriptions."""
        summary = self.result.summary
        facts = [("Threat", self.threat_words()), ("Defense", self._defense_words())]
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
        certified = summary.forwards_per_certified_image
        facts.append(
            (
                "Cost",
                f"{summary.forwards_per_image:,.1f} model forwards per image"
                + ("" if certified is None else f" ({certified:,.1f} per certified image)")
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
        """Return the name of a class."""
        names: Sequence[Any] = self.about.get("class_names") or []
        return str(names[label]) if 0 <= label < len(names) else f"class {label}"

    def but_for_budget_and_patch(self) -> str:
        """Return what is equal in runs that differ only in the budget or the patch."""
        left_out = {"threat", "masks", "masks_per_side"}
        identity = {name: value for name, value in self.identity.items() if name != "threat"}
        identity["defense"] = {
            name: value for name, value in self.defense.items() if name not in left_out
        }
        return json.dumps(identity, sort_keys=True)

    def _defense_words(self) -> str:
        inference = {"double": "double masking", "challenger": "the challenger game"}
        parts = [str(self.defense["type"])]
        if "inference" in self.defense:
            parts.append(inference.get(self.defense["inference"], str(self.defense["inference"])))
        if "fill" in self.defense:
            parts.append(f"masked pixels take the value {self.defense['fill']:g} of [0, 1]")
        if "tolerance" in self.defense:
            parts.append(
                f"margins up to {self.defense['tolerance']:g} logits count as lost in a certificate"
            )
        return "; ".join(parts)

    def _mask_words(self) -> str:
        heights, widths = zip(*((box.height, box.width) for box in self.masks), strict=True)
        sizes = [_times((min(heights), min(widths))), _times((max(heights), max(widths)))]
        words = f"{len(self.masks)} masks of {' to '.join(dict.fromkeys(sizes))} pixels"
        if sides := _pair(self.defense.get("masks_per_side")):
            words += f"; budget {_once(sides)} per side"
        if several := _pair(self.defense.get("multiplicity")):
            times = math.prod(several)
            words += (
                f"; multiplicity {_once(several)}: each patch region lies inside at least "
                f"{times} mask{'' if times == 1 else 's'}"
            )
        return words


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
