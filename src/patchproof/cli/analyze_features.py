"""``patchproof analyze``: the PatchGuard paper's analyses of local features and ablations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from patchproof.cli import options as opt
from patchproof.cli.feature_bench import FeatureBench, on_feature_bench, on_local_bench

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from patchproof.defenses.over_features import Feature
    from patchproof.evaluation.feature_analyses import Aggregator, Bounds, Subject
    from patchproof.threat import Threat

_SETUPS = "Setups"
_ACCURACIES = ("vanilla", "clean", "certified", "paper")

PatchList = Annotated[
    str,
    typer.Option(
        metavar="PATCHES",
        help="Patches in pixels of your images, as --patch of certify takes one: 2,5, a range of "
        "squares such as 1-8, 3x5, or shares as papers name them such as 0.4%,2.4%.",
        rich_help_panel=_SETUPS,
    ),
]
Locations = Annotated[
    str,
    typer.Option(
        metavar="WHERE",
        help="Where the patch may be: anywhere, corners, or a box of pixels top,left,height,width "
        "that it stays in.",
        rich_help_panel=_SETUPS,
    ),
]
FeatureOption = Annotated[
    Literal["logits", "confidence", "prediction"] | None,
    typer.Option(
        help="What a view says for a class; by default logits of local features and confidence of "
        "ablations.",
        rich_help_panel=_SETUPS,
    ),
]


@on_feature_bench
def clipping(
    bench: FeatureBench,
    bounds: Annotated[
        str,
        typer.Option(
            metavar="LOW:HIGH,...",
            help="Clipping bounds of local logits, one row of the table each; inf and -inf clip "
            "nothing.",
            rich_help_panel=_SETUPS,
        ),
    ] = "-inf:inf,0:inf,0:50,0:15,0:5",
) -> None:
    """How undefended models bear clipped local logits (PatchGuard, Table 6)."""
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.report.feature_figures import clipping_figure

    pairs = parse_bounds(bounds)
    bench.run(
        "clipping",
        {"bounds": [[str(low), str(high)] for low, high in pairs]},
        lambda subjects: {"clipping": analyses.clipping(subjects, pairs)},
        lambda tables: {"clipping": clipping_figure(tables["clipping"])},
        {"clipping": ("model", "receptive_field", "clipped_below", "clipped_above", "vanilla")},
    )


@on_feature_bench
def windows(
    bench: FeatureBench,
    sizes: Annotated[
        str,
        typer.Option(
            metavar="FEATURES",
            help="Sides of the windows, in features; 0 leaves nothing out.",
            rich_help_panel=_SETUPS,
        ),
    ] = "0,2,4,6,8",
    feature: FeatureOption = None,
) -> None:
    """How undefended models bear windows of features that are left out (PatchGuard, Table 7)."""
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.report.feature_figures import windows_figure

    sides = parse_sizes(sizes)
    for subject in bench.subjects():
        analyses.check_windows(subject, sides)
    shown = ("model", "window", "windows", "masked_accuracy", "images_wrong", "windows_changed")
    bench.run(
        "windows",
        {"sizes": sides, "feature": feature},
        lambda subjects: {"windows": analyses.masked_windows(subjects, sides, feature)},
        lambda tables: {"windows": windows_figure(tables["windows"])},
        {"windows": shown},
    )


@on_feature_bench
def receptive_fields(
    bench: FeatureBench,
    patches: PatchList,
    locations: Locations = "anywhere",
    feature: FeatureOption = None,
) -> None:
    """Several classifiers by what their features see: accuracies against patches (Table 8).

    Give --weights once for each classifier.
    """
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.report.feature_figures import receptive_field_figure

    _against(
        bench,
        "receptive-fields",
        parse_patches(patches, locations, bench.image_size),
        {"feature": feature},
        lambda pairs: analyses.robustness(pairs, feature),
        receptive_field_figure,
        ("model", "receptive_field", "threat", "window", *_ACCURACIES),
    )


@on_feature_bench
def training(
    bench: FeatureBench,
    patches: PatchList,
    locations: Locations = "anywhere",
    feature: FeatureOption = None,
) -> None:
    """Several classifiers by how they were trained: accuracies against patches (Table 14).

    Give --weights once for each classifier.
    """
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.report.feature_figures import training_figure

    _against(
        bench,
        "training",
        parse_patches(patches, locations, bench.image_size),
        {"feature": feature},
        lambda pairs: analyses.robustness(pairs, feature),
        training_figure,
        ("model", "recipe", "threat", "window", *_ACCURACIES),
    )


@on_feature_bench
def patch_sizes(
    bench: FeatureBench,
    patches: PatchList,
    locations: Locations = "anywhere",
    feature: FeatureOption = None,
) -> None:
    """How far robust masking goes as the patch grows (PatchGuard, Figure 8).

    Patches too large for any window are left out with a word.
    """
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.report.feature_figures import patch_size_figure

    _against(
        bench,
        "patch-sizes",
        parse_patches(patches, locations, bench.image_size),
        {"feature": feature},
        lambda pairs: analyses.robustness(pairs, feature),
        lambda table: patch_size_figure(table, bench.image_size),
        ("model", "threat", "window", *_ACCURACIES),
    )


@on_feature_bench
def aggregations(
    bench: FeatureBench,
    patches: PatchList,
    defenses: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Those to compare: all, or some of patchguard, clipped-bagnet, "
            "derandomized-smoothing, bagcert, median, trimmed-mean and top-masking.",
            rich_help_panel=_SETUPS,
        ),
    ] = "all",
    locations: Locations = "anywhere",
    feature: FeatureOption = None,
) -> None:
    """All defenses that recover the label from features, on the same ones (Section 6, Table 4).

    Patches too large for a defense are left out for it with a word.
    """
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.report.feature_figures import aggregation_figure

    names = parse_defenses(defenses)
    threats = parse_patches(patches, locations, bench.image_size)
    for name in names:
        refusals = analyses.possible(bench.subjects(), threats, name)[1]
        _report([f"{name} of {refusal}" for refusal in refusals])
    shown = ("model", "defense", "threat", "clean", "certified", "paper")
    bench.run(
        "aggregations",
        {
            "patches": [threat.to_dict() for threat in threats],
            "defenses": names,
            "feature": feature,
        },
        lambda subjects: {"aggregations": analyses.aggregations(subjects, threats, names, feature)},
        lambda tables: {"aggregations": aggregation_figure(tables["aggregations"])},
        {"aggregations": shown},
    )


@on_feature_bench
def thresholds(
    bench: FeatureBench,
    patches: PatchList,
    values: Annotated[
        str,
        typer.Option(
            metavar="SHARES",
            help="Thresholds T from 0 to 1, one row of the table each.",
            rich_help_panel=_SETUPS,
        ),
    ] = "0,0.2,0.4,0.6,0.8,1",
    locations: Locations = "anywhere",
    feature: FeatureOption = None,
) -> None:
    """What a detection threshold above 0 does, and its false positives (PatchGuard, Table 9)."""
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.report.feature_figures import threshold_figure

    shares = parse_shares(values)
    _against(
        bench,
        "thresholds",
        parse_patches(patches, locations, bench.image_size),
        {"feature": feature, "values": shares},
        lambda pairs: analyses.thresholds(pairs, shares, feature),
        threshold_figure,
        ("model", "threat", "threshold", "clean", "certified", "paper", "false_positives"),
    )


@on_feature_bench
def feature_types(
    bench: FeatureBench,
    patches: PatchList,
    features: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Of logits, confidence and prediction, those to compare.",
            rich_help_panel=_SETUPS,
        ),
    ] = "logits,confidence,prediction",
    locations: Locations = "anywhere",
) -> None:
    """Logits, confidences and predictions as features (PatchGuard, Tables 10 and 11)."""
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.report.feature_figures import feature_type_figure

    names = parse_features(features)
    _against(
        bench,
        "feature-types",
        parse_patches(patches, locations, bench.image_size),
        {"features": names},
        lambda pairs: analyses.feature_types(pairs, names),
        feature_type_figure,
        ("model", "feature", "threat", "window", "clean", "certified", "paper"),
    )


@on_feature_bench
def overlarge_masks(
    bench: FeatureBench,
    patches: Annotated[
        str,
        typer.Option(
            metavar="PIXELS",
            help="Sides of the actual square patches: 2,5, or a range such as 2-5.",
            rich_help_panel=_SETUPS,
        ),
    ],
    masks: Annotated[
        str,
        typer.Option(
            metavar="PIXELS",
            help="Sides of the square patches that the windows are made for, one row each; those "
            "smaller than the actual patch are left out for it.",
            rich_help_panel=_SETUPS,
        ),
    ],
    feature: FeatureOption = None,
) -> None:
    """Windows for a larger patch than the actual one (PatchGuard, Table 12)."""
    from patchproof.cli.analyze import parse_list
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.report.feature_figures import overlarge_mask_figure

    sides, made_for = parse_list("--patches", patches), parse_list("--masks", masks)
    for subject in bench.subjects():
        analyses.check_masks(subject, sides, made_for)
    bench.run(
        "overlarge-masks",
        {"patches": sides, "masks": made_for, "feature": feature},
        lambda subjects: {
            "overlarge-masks": analyses.overlarge_masks(subjects, sides, made_for, feature)
        },
        lambda tables: {"overlarge-masks": overlarge_mask_figure(tables["overlarge-masks"])},
        {
            "overlarge-masks": (
                *("model", "mask_side", "patch_side", "window"),
                *("clean", "certified", "paper"),
            )
        },
    )


@on_feature_bench
def top_k(
    bench: FeatureBench,
    patches: PatchList,
    k: Annotated[
        str,
        typer.Option(
            "--k",
            metavar="COUNTS",
            help="How many classes the right one must be among: 1,3,5, or a range such as 1-5.",
            rich_help_panel=_SETUPS,
        ),
    ] = "1-5",
    locations: Locations = "anywhere",
    feature: FeatureOption = None,
) -> None:
    """The right class among the k of most evidence, whatever a patch shows (Table 15)."""
    from patchproof.cli.analyze import parse_list
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.report.feature_figures import top_k_figure

    counts = parse_list("--k", k)
    _against(
        bench,
        "top-k",
        parse_patches(patches, locations, bench.image_size),
        {"feature": feature, "k": counts},
        lambda pairs: analyses.top_classes(pairs, counts, feature),
        top_k_figure,
        ("model", "threat", "k", "vanilla", "clean", "certified"),
    )


@on_local_bench
def local_logits(
    bench: FeatureBench,
    patch: Annotated[
        str,
        typer.Option(
            metavar="PATCH",
            help="The patch, as --patch of certify takes it.",
            rich_help_panel=_SETUPS,
        ),
    ],
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of the attack.", rich_help_panel=_SETUPS)
    ] = 40,
    step_size: Annotated[
        float,
        typer.Option(
            help="How far a step moves a pixel's value, in [0, 1].", rich_help_panel=_SETUPS
        ),
    ] = 0.05,
    attack_seed: Annotated[
        int,
        typer.Option(help="Seed of the places of the patches.", rich_help_panel=_SETUPS),
    ] = 0,
    bins: Annotated[
        int, typer.Option(min=2, help="Bars of the histogram.", rich_help_panel=_SETUPS)
    ] = 60,
) -> None:
    """What a patch does to local logits: wrong ones, and how large they get (Table 2, Figure 3).

    A gradient attack on the undefended model puts one patch at a random place of every image. It
    runs the model and its gradient --steps times an image: take --count. Networks whose features
    see much of the image, such as small-resnet, may stand beside those with small ones.
    """
    from patchproof.evaluation import feature_analyses as analyses
    from patchproof.evaluation.local_attack import RandomPlaceAttack
    from patchproof.report.feature_figures import large_logit_figure, local_logit_figure

    threat = opt.parse_threat(patch, None, "anywhere", bench.image_size)
    attack = RandomPlaceAttack(threat, steps, step_size, attack_seed)
    for subject in bench.subjects():
        if refusal := subject.without_masking(threat):
            typer.echo(f"patchproof: no robust masking of {subject.name}: {refusal}", err=True)

    def tables(subjects: list[Subject]) -> dict[str, pd.DataFrame]:
        made = analyses.attacked_logits(subjects, attack, bins)
        return {
            "local-logits": made.histogram,
            "attack": made.summary,
            "wrong": made.wrong,
        }

    shown = ("model", "image", "vanilla", "clean", "largest_true", "largest_malicious")
    wrong = ("wrong_attacked", "wrong_original", "wrong_more", "wrong_global")
    bench.run(
        "local-logits",
        {"attack": attack.to_dict(), "bins": bins},
        tables,
        lambda tables: {
            "local-logits": local_logit_figure(tables["local-logits"]),
            "large-logits": large_logit_figure(tables["local-logits"]),
        },
        {"attack": shown, "wrong": ("model", "receptive_field", "features", *wrong)},
        attack,
    )


ANALYSES: dict[str, tuple[Callable[..., None], str]] = {
    "clipping": (clipping, ""),
    "windows": (windows, ""),
    "receptive-fields": (receptive_fields, "--patches 2,5"),
    "thresholds": (thresholds, "--patches 5"),
    "feature-types": (feature_types, "--patches 2,5"),
    "overlarge-masks": (overlarge_masks, "--patches 2,5 --masks 2,5,8"),
    "training": (training, "--patches 2,5"),
    "top-k": (top_k, "--patches 2,5"),
    "local-logits": (local_logits, "--patch 5"),
    "patch-sizes": (patch_sizes, "--patches 1-16"),
    "aggregations": (aggregations, "--patches 2,5"),
}
"""The commands by their names, in the order of the paper, with what their examples say."""


def add_to(app: typer.Typer, panel: str) -> None:
    """Add the analyses to ``patchproof analyze``."""
    for name, (command, options) in ANALYSES.items():
        words = ["patchproof analyze", name, "--data cifar10 --weights bagnet.safetensors"]
        if name in ("receptive-fields", "training"):
            words.append("--weights other.safetensors")
        words += [options, "--out runs/cifar10"]
        example = " ".join(filter(None, words))
        app.command(name, epilog=f"Example: {example}", rich_help_panel=panel)(command)


def _against(
    bench: FeatureBench,
    name: str,
    threats: Sequence[Threat],
    parameters: dict[str, object],
    table: Callable[[list[tuple[Subject, Threat]]], pd.DataFrame],
    figure: Callable[[pd.DataFrame], Figure],
    shown: Sequence[str],
) -> None:
    """Make one table of classifiers and patches, and its figure; patches too large are left out."""
    from patchproof.evaluation.feature_analyses import possible

    _report(possible(bench.subjects(), threats)[1])
    bench.run(
        name,
        {"patches": [threat.to_dict() for threat in threats], **parameters},
        lambda subjects: {name: table(possible(subjects, threats)[0])},
        lambda tables: {name: figure(tables[name])},
        {name: shown},
    )


def _report(refusals: Sequence[str]) -> None:
    for refusal in refusals:
        typer.echo(f"patchproof: left out {refusal}", err=True)


def parse_patches(text: str, locations: str, image_size: tuple[int, int]) -> list[Threat]:
    """Return ``2,5``, ``1-8`` or ``0.4%,2.4%`` as patches, each once, in the order given.

    Raises:
        PatchproofError: something else, or a patch that does not fit.
    """
    from patchproof.cli.analyze import parse_list

    words = []
    for word in text.split(","):
        if re.fullmatch(r"\s*\d+\s*-\s*\d+\s*", word):
            words += [str(side) for side in parse_list("--patches", word)]
        else:
            words.append(word)
    threats = [opt.parse_threat(word, None, locations, image_size) for word in words]
    if len(set(threats)) < len(threats):
        raise _misuse("--patches", "each patch once", text)
    return threats


def parse_bounds(text: str) -> list[Bounds]:
    """Return ``0:50,-inf:inf`` as pairs of numbers.

    Raises:
        PatchproofError: something else, or a lower bound that is not below the upper.
    """
    pairs = []
    for word in text.split(","):
        try:
            low, high = map(float, word.split(":"))
        except ValueError:
            low = high = 0.0
        if not low < high:
            raise _misuse("--bounds", "lower:upper such as 0:50,-inf:inf", text)
        pairs.append((low, high))
    return pairs


def parse_sizes(text: str) -> list[int]:
    """Return ``0,2,4`` as whole numbers from 0, each once.

    Raises:
        PatchproofError: something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{1,4}", word) for word in words) or len(set(words)) < len(words):
        raise _misuse("--sizes", "numbers from 0 such as 0,2,4, each once", text)
    return [int(word) for word in words]


def parse_shares(text: str) -> list[float]:
    """Return ``0,0.2,1`` as numbers in [0, 1], each once.

    Raises:
        PatchproofError: something else.
    """
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0.0 <= value <= 1.0 for value in values):
        raise _misuse("--values", "shares from 0 to 1 such as 0,0.2,1", text)
    if len(set(values)) < len(values):
        raise _misuse("--values", "each threshold once", text)
    return values


def parse_features(text: str) -> list[Feature]:
    """Return ``logits,confidence`` as names of features, each once.

    Raises:
        PatchproofError: another name, or one twice.
    """
    from patchproof.defenses.over_features import Feature

    names = [word.strip() for word in text.split(",")]
    if not set(names) <= set(get_args(Feature)) or len(set(names)) < len(names):
        raise _misuse("--features", "some of logits, confidence, prediction", text)
    return cast("list[Feature]", names)


def parse_defenses(text: str) -> list[Aggregator]:
    """Return ``median,bagcert`` as names of defenses, each once; ``all`` as all of them.

    Raises:
        PatchproofError: another name, or one twice.
    """
    from patchproof.evaluation.feature_analyses import Aggregator

    known = get_args(Aggregator)
    names = list(known) if text.strip() == "all" else [word.strip() for word in text.split(",")]
    if not set(names) <= set(known) or len(set(names)) < len(names):
        raise _misuse("--defenses", f"all, or some of {', '.join(known)}", text)
    return cast("list[Aggregator]", names)


def _misuse(option: str, expected: str, got: str) -> Exception:
    from patchproof.errors import PatchproofError

    return PatchproofError(f"{option}: expected {expected}, got {got!r}")
