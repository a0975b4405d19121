"""From the options of a command to a model, a defense and a data set."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchproof.cli.feature_defenses import FEATURE_DEFENSES, build_feature_defense
from patchproof.cli.heuristic_defenses import (
    HEURISTIC_DEFENSES,
    WATERMARKING,
    build_heuristic_defense,
)
from patchproof.cli.interval_bounds import INTERVAL_BOUNDS, build_interval_bounds
from patchproof.cli.options import (
    parse_defense_options,
    parse_memory,
    parse_model_options,
    parse_pair,
    parse_threat,
)
from patchproof.cli.randomized_cropping import RANDOMIZED_CROPPING, build_randomized_cropping
from patchproof.errors import PatchproofError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from patchproof.datasets import ImageDataset
    from patchproof.defenses import AnyDefense, NamedDefense
    from patchproof.models import ModelSpec

_OVER_MASKS = ("patchcleanser", "minority-reports")
_HIDING_NOTHING = (
    INTERVAL_BOUNDS,
    RANDOMIZED_CROPPING,
    *(name for name in HEURISTIC_DEFENSES if name != WATERMARKING),
)
_WITH_OPTIONS = (*FEATURE_DEFENSES, INTERVAL_BOUNDS, RANDOMIZED_CROPPING, *HEURISTIC_DEFENSES)
NAMED_DEFENSES = (*_OVER_MASKS, *_WITH_OPTIONS)
"""What ``--defense`` names; anything else is a file."""

_DETECTORS = ("minority-reports", "patchguard++")


@dataclass(frozen=True)
class ModelOptions:
    """Which classifier, as the command line says it."""

    weights: Path | None
    model: str | None
    classes: int | None
    pretrained: bool
    device: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DefenseOptions:
    """Which attacker and which defense, as the command line says it.

    Attributes:
        defense: one of ``NAMED_DEFENSES``, or the name of a file.
        options: the values of ``--defense-option`` by their names; of no defense over masks.
    """

    defense: str
    patch: str | None
    covering: float | None
    locations: str
    masks: str
    multiplicity: str
    layout: Literal["paper", "balanced"]
    shapes: int | None
    inference: Literal["double", "challenger"]
    tau: float | None
    fill: float | None
    tolerance: float | None
    batch_size: int | None
    memory: str | None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path | None:
        """The file that holds the defense; None where it is named."""
        return None if self.defense in NAMED_DEFENSES else Path(self.defense)

    def given(self) -> list[str]:
        """Return the options for attacker and defense that are not at their default."""
        return self.given_for_masks() + [
            option
            for option, is_given in {
                "--patch": self.patch is not None,
                "--covering": self.covering is not None,
                "--locations": self.locations != "anywhere",
                "--tau": self.tau is not None,
                "--fill": self.fill is not None,
                "--tolerance": self.tolerance is not None,
                "--defense-option": bool(self.options),
            }.items()
            if is_given
        ]

    def given_for_masks(self) -> list[str]:
        """Return the options for defenses over masks that are not at their default."""
        return [
            option
            for option, is_given in {
                "--masks": self.masks != "6",
                "--multiplicity": self.multiplicity != "1",
                "--layout": self.layout != "paper",
                "--shapes": self.shapes is not None,
                "--inference": self.inference != "double",
            }.items()
            if is_given
        ]


def chosen_options(given: Mapping[str, Any]) -> tuple[ModelOptions, DefenseOptions]:
    """Return which classifier, attacker and defense the arguments of a command name.

    Args:
        given: the arguments by their names, those of ``cli.options``; others are not read.

    Raises:
        PatchproofError: an option of the model or the defense that is not NAME=JSON.
    """
    own = [entry.name for entry in fields(DefenseOptions) if entry.name != "options"]
    return (
        ModelOptions(
            given["weights"],
            given["model"],
            given["classes"],
            given["pretrained"],
            given["device"],
            parse_model_options(given["model_option"]),
        ),
        DefenseOptions(
            **{name: given[name] for name in own},
            options=parse_defense_options(given["defense_option"]),
        ),
    )


@dataclass(frozen=True)
class Classifier:
    """A model with what is known about it.

    Attributes:
        model: from images to logits, in eval mode.
        spec: what it was built from.
        card: how it was made; empty where nobody says.
    """

    model: nn.Module
    spec: ModelSpec
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fill(self) -> float | None:
        """The grey level of the masked pixels that it was trained with."""
        fill = self.card.get("made", {}).get("fill")
        return None if fill is None else float(fill)

    @property
    def class_names(self) -> list[str] | None:
        """The names of its classes, by label."""
        names = self.card.get("made", {}).get("class_names")
        return None if names is None else [str(name) for name in names]


def defend(
    model_options: ModelOptions,
    defense_options: DefenseOptions,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    classes: int | None = None,
) -> tuple[AnyDefense, Classifier]:
    """Load a saved defense, or build one around the classifier that the options name.

    Args:
        model_options: the classifier to build.
        defense_options: the defense to build, or its file.
        image_size: (H, W) of the images; None for what the weights were made for.
        channels: of the images; None for what the weights were made for.
        classes: of the data, for models that the options give no number of classes.

    Raises:
        PatchproofError: options that contradict each other or the images, or a file that is not
            there.
        RunError: weights that are damaged or of another architecture.
    """
    if (file := defense_options.file) is not None:
        defense, classifier = _load_defense(file, model_options, defense_options)
        _check_shape(file, classifier.spec, image_size, channels)
        return defense, classifier
    classifier = build_classifier(model_options, image_size, channels, classes)
    return build_defense(defense_options, classifier, classifier.spec.image_size), classifier


def certifying(defense: AnyDefense) -> NamedDefense:
    """Return a defense that certifies.

    Raises:
        PatchproofError: one that does not.
    """
    from patchproof.defenses.preprocessed import PreprocessedDefense

    if isinstance(defense, PreprocessedDefense):
        raise PatchproofError(
            f"--defense: expected one with a certificate, got {type(defense).__name__}, of which "
            "nothing is proved: patchproof attack tells what it withstands"
        )
    return defense


def build_classifier(
    options: ModelOptions,
    image_size: tuple[int, int] | None = None,
    channels: int | None = None,
    classes: int | None = None,
) -> Classifier:
    """Build the model, and move it to its device.

    Args:
        options: which one.
        image_size: (H, W) of the images; None for what the weights were made for.
        channels: of the images; None for what the weights were made for.
        classes: of the data, for models that the options give no number of classes.

    Raises:
        PatchproofError: options that contradict each other or the images, or a file that is not
            there.
        RunError: weights that are damaged or of another architecture.
    """
    from patchproof.models import ModelSpec, build_model, load_classifier, load_weights

    if options.options and options.model is None:
        raise PatchproofError("expected --model-option with --model, got it alone")
    if options.weights is not None and options.model is None:
        model, card = load_classifier(options.weights)
        spec = ModelSpec.from_dict(card["model"])
        _check_shape(options.weights, spec, image_size, channels)
        return Classifier(model.to(pick_device(options.device)), spec, card)
    if options.model is None:
        raise PatchproofError("expected --weights FILE, --model NAME or --defense FILE, got none")
    brings_weights = options.model.startswith(("python:", "onnx:"))
    if options.weights is None and not options.pretrained and not brings_weights:
        raise PatchproofError(
            f"expected --weights FILE or --pretrained for {options.model}, got neither"
        )
    if options.weights is not None and options.pretrained:
        raise PatchproofError("expected one of --weights and --pretrained, got both")
    if options.weights is not None and options.model.startswith("onnx:"):
        raise PatchproofError(f"expected no --weights for {options.model}, which holds its own")
    classes = options.classes or classes
    if classes is None or image_size is None or channels is None:
        raise PatchproofError(f"expected --classes for {options.model}, got none")
    spec = ModelSpec(options.model, classes, channels, image_size, options.options)
    model = build_model(spec, pretrained=options.pretrained)
    if options.weights is not None:
        load_weights(model, options.weights)
    return Classifier(model.eval().to(pick_device(options.device)), spec)


def build_defense(
    options: DefenseOptions, classifier: Classifier, image_size: tuple[int, int]
) -> AnyDefense:
    """Defend a classifier, with the fill that it was trained with unless the options say another.

    Raises:
        PatchproofError: an option with a value that cannot be read, out of range, or of another
            defense.
    """
    from patchproof.defenses import MinorityReports, PatchCleanser
    from patchproof.defenses.minority_reports import DEFAULT_TAU
    from patchproof.defenses.saved import DEFAULT_FILL, DEFAULT_TOLERANCE

    _check_options(options)
    threat = parse_threat(options.patch, options.covering, options.locations, image_size)
    shared: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": options.batch_size,
        "memory_budget": None if options.memory is None else parse_memory(options.memory),
    }
    if options.defense in _HIDING_NOTHING and options.tolerance is not None:
        shared["tolerance"] = options.tolerance
    if options.defense == RANDOMIZED_CROPPING:
        return build_randomized_cropping(classifier.model, threat, options.options, **shared)
    if options.defense == INTERVAL_BOUNDS:
        shared["channels"] = classifier.spec.channels
        return build_interval_bounds(classifier.model, threat, options.options, **shared)
    if options.defense not in _HIDING_NOTHING:
        fills = (options.fill, classifier.fill, DEFAULT_FILL)
        shared["fill"] = next(fill for fill in fills if fill is not None)
    if options.defense in HEURISTIC_DEFENSES:
        return build_heuristic_defense(
            options.defense, classifier.model, threat, options.options, **shared
        )
    shared["tolerance"] = DEFAULT_TOLERANCE if options.tolerance is None else options.tolerance
    if options.defense in FEATURE_DEFENSES:
        own = dict(options.options)
        if options.tau is not None:
            own["tau"] = options.tau
        return build_feature_defense(options.defense, classifier.model, threat, own, **shared)
    masks: dict[str, Any] = {
        "masks_per_side": parse_pair("--masks", options.masks),
        "multiplicity": parse_pair("--multiplicity", options.multiplicity),
        "layout": options.layout,
        "shapes": options.shapes,
    }
    if options.defense == "minority-reports":
        tau = DEFAULT_TAU if options.tau is None else options.tau
        return MinorityReports(classifier.model, threat, tau=tau, **masks, **shared)
    return PatchCleanser(classifier.model, threat, inference=options.inference, **masks, **shared)


def _check_options(options: DefenseOptions) -> None:
    """Raise for options of another defense than the one that is named."""
    if options.tau is not None and options.defense not in _DETECTORS:
        raise PatchproofError(
            f"--tau: expected with --defense {' or '.join(_DETECTORS)} only, got {options.defense}"
        )
    if options.tau is not None and "tau" in options.options:
        raise PatchproofError("expected one of --tau and --defense-option tau, got both")
    if options.fill is not None and options.defense in _HIDING_NOTHING:
        raise PatchproofError(
            f"--fill: expected with a defense that hides pixels, got {options.defense}"
        )
    if options.tolerance is not None and options.defense in HEURISTIC_DEFENSES:
        raise PatchproofError(
            f"--tolerance: expected with a defense that certifies, got {options.defense}"
        )
    if options.defense in _WITH_OPTIONS:
        if extra := options.given_for_masks():
            raise PatchproofError(
                f"{', '.join(extra)}: expected with --defense {' or '.join(_OVER_MASKS)} only, "
                f"got {options.defense}"
            )
        return
    if options.options:
        raise PatchproofError(
            f"--defense-option: expected with --defense {', '.join(_WITH_OPTIONS)} only, "
            f"got {options.defense}"
        )
    if options.inference != "double" and options.defense != "patchcleanser":
        raise PatchproofError("--inference: expected with --defense patchcleanser only")


def _load_defense(
    path: Path, model_options: ModelOptions, defense_options: DefenseOptions
) -> tuple[AnyDefense, Classifier]:
    from patchproof.defenses import load
    from patchproof.models import ModelSpec, read_card

    if not path.is_file():
        raise PatchproofError(
            f"--defense: expected {', '.join(NAMED_DEFENSES)} or a file, got {str(path)!r}"
        )
    extra = [
        *(["--weights"] if model_options.weights is not None else []),
        *(["--model"] if model_options.model is not None else []),
        *(["--model-option"] if model_options.options else []),
        *defense_options.given(),
    ]
    if extra:
        raise PatchproofError(f"expected --defense FILE without {', '.join(extra)}, got both")
    card = read_card(path)
    defense = load(path, device=str(pick_device(model_options.device)))
    defense.batch_size = defense_options.batch_size
    if defense_options.memory is not None:
        defense.memory_budget = parse_memory(defense_options.memory)
    return defense, Classifier(defense.model, ModelSpec.from_dict(card["model"]), card)


def _check_shape(
    file: Path, spec: ModelSpec, image_size: tuple[int, int] | None, channels: int | None
) -> None:
    """Raise unless the images, as far as they are known, are what the file's model is for."""
    expected = (*spec.image_size, spec.channels)
    got = (*(image_size or spec.image_size), channels or spec.channels)
    if got != expected:
        resize = f"; --image-size {_by(spec.image_size)} resizes them"
        raise PatchproofError(
            f"{file}: expected images of {_by(expected)} (height, width, channels), got {_by(got)}"
            + (resize if got[2] == expected[2] else "")
        )


def pick_device(name: str) -> torch.device:
    """Return the device that ``--device`` names.

    Raises:
        PatchproofError: no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise PatchproofError(
            f"--device: expected a device of this machine, got {name!r}: {first_line}"
        ) from error
    return device


def use_threads(count: int | None) -> None:
    """Use this many processor threads, or PyTorch's choice for None."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def choose_slice(
    dataset: ImageDataset, count: int | None, seed: int, indices: Path | None
) -> ImageDataset:
    """Return the images that ``--count`` and ``--seed``, or ``--indices`` choose.

    Raises:
        PatchproofError: both, a count out of range, or row numbers that the data set does not have.
    """
    if indices is None:
        return dataset if count is None else dataset.sample(count, seed)
    if count is not None:
        raise PatchproofError("expected one of --count and --indices, got both")
    position_of = {index: position for position, index in enumerate(dataset.indices.tolist())}
    rows = read_rows(indices)
    missing = [row for row in rows if row not in position_of]
    if missing:
        raise PatchproofError(
            f"{indices}: expected row numbers of {dataset.name} {dataset.split}, got {missing[0]}"
        )
    return dataset.subset([position_of[row] for row in rows])


def read_rows(path: Path) -> list[int]:
    """Return the row numbers in a text file, or in the column ``index`` (else first) of a ``.csv``.

    Raises:
        PatchproofError: no such file, something that is not a number, or no number.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PatchproofError(f"--indices: expected a text file, got {path}: {error}") from error
    words = text.replace(",", " ").split()
    if path.suffix.lower() == ".csv":
        table = [row for row in csv.reader(text.splitlines()) if row]
        has_header = bool(table) and not table[0][0].strip().isdecimal()
        column = table[0].index("index") if has_header and "index" in table[0] else 0
        words = [row[column].strip() for row in table[has_header:]]
    wrong = [word for word in words if not word.isdecimal()]
    if wrong or not words:
        got = repr(wrong[0]) if wrong else "none"
        raise PatchproofError(f"{path}: expected row numbers from 0, got {got}")
    return [int(word) for word in words]


def _by(lengths: tuple[int, ...]) -> str:
    return "x".join(str(length) for length in lengths)
