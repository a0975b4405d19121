"""What the analyses of features share: several classifiers on the same images, files, tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchproof.cli import options as opt
from patchproof.cli.bench import (
    RECORDINGS,
    Bench,
    bench_options,
    check_out,
    load_classifier,
    make_command,
    open_bench,
    recording_bar,
    show,
    tell_cost,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from patchproof.cli.bench import RecordingBar
    from patchproof.cli.building import Classifier
    from patchproof.defenses.over_features import FeatureViews
    from patchproof.evaluation.feature_analyses import Subject
    from patchproof.evaluation.feature_recording import (
        Attack,
        FeatureArchive,
        FeatureRecording,
        RecordedViews,
    )
    from patchproof.views.cells import CellViews

    Tables = dict[str, pd.DataFrame]
    Record = Callable[[Attack | None], FeatureRecording]

_MODEL = "Model"

ManyWeights = Annotated[
    list[Path] | None,
    typer.Option(
        help="Classifier file made by `patchproof train`; with --model, a state dictionary. May be "
        "given several times: each classifier gets its rows of the table, under the name of its "
        "file, or of its folder for a file model.safetensors.",
        rich_help_panel=_MODEL,
    ),
]
AblationOption = Annotated[
    str | None,
    typer.Option(
        "--ablation",
        metavar="KIND:PIXELS",
        help="Show the classifier one band or block of the image at a time: column:4, row:4 or "
        "block:8. By default its local features, or the ablation that it was made for.",
        rich_help_panel=_MODEL,
    ),
]


@dataclass(frozen=True, eq=False)
class RecordedBench:
    """Classifiers with the parts of the image that each looks at.

    Attributes:
        bench: the images, where the results go, and the first classifier.
        classifiers: by name.
        views: of each.
    """

    bench: Bench
    classifiers: Mapping[str, Classifier]
    views: Mapping[str, RecordedViews]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.bench.image_size

    def record_and_write(
        self,
        analysis: str,
        parameters: Mapping[str, Any],
        tables: Callable[[Callable[[str], Record]], Tables],
        figures: Callable[[Tables], Mapping[str, Figure]],
        shown: Mapping[str, Sequence[str]],
        attack: Attack | None = None,
    ) -> None:
        """Record what is missing, then write and show tables and their figures.

        Args:
            analysis: its name.
            parameters: what decides the tables beside models, data and defense, as JSON values.
            tables: makes them, by the names of their files, from what records a classifier.
            figures: of the tables, by the names of their files.
            shown: of some tables, the columns to print.
            attack: is recorded too; None for clean images alone.

        Raises:
            PatchproofError: the folder holds something else.
            RunError: it cannot be written.
            typer.Exit: Ctrl-C, after what is recorded is written.
        """
        from patchproof.evaluation.feature_recording import FeatureArchive, describe_views
        from patchproof.report.analysis import AnalysisFolder

        bench = self.bench
        check_out(bench.out)
        archives = {
            name: FeatureArchive(
                bench.out / RECORDINGS,
                classifier.model,
                bench.dataset,
                self.views[name],
                spec=classifier.spec,
                batch_size=bench.batch_size,
            )
            for name, classifier in self.classifiers.items()
        }
        first = next(iter(archives.values()))
        identity = {
            "analysis": analysis,
            "parameters": dict(parameters),
            "models": {
                name: archive.model_identity | {"views": describe_views(archive.views)}
                for name, archive in archives.items()
            },
            **bench.identity(first),
        }
        folder = AnalysisFolder(bench.out / (bench.name or analysis), identity)
        folder.check()
        recordings = len(archives) * (1 if attack is None else 2)
        with recording_bar(first.folder, len(bench.dataset), recordings) as bar:
            recorder = _Recorder(archives, bar)
            made = tables(recorder.of)
        about = bench.about(
            list(recorder.made.values()), sum(archive.forwards for archive in archives.values())
        ) | {"model_cards": {name: dict(one.card) for name, one in self.classifiers.items()}}
        folder.write(made, figures(made), about)
        images = len(next(iter(recorder.made.values())))
        for name, columns in shown.items():
            chosen = [
                column for column in columns if column != "model" or len(self.classifiers) > 1
            ]
            show(f"{name} of {images:,} images of {bench.dataset.name}", made[name], chosen)
        tell_cost(about)
        typer.echo(f"Tables and figures: {folder.path}")


@dataclass(frozen=True, eq=False)
class FeatureBench(RecordedBench):
    """Classifiers with their local features, or the ablations that each looks at."""

    views: Mapping[str, FeatureViews | CellViews]

    def subjects(self) -> list[Subject]:
        """Return the classifiers without anything recorded, to check what is possible."""
        return [self._subject(name, _nothing) for name in self.classifiers]

    def run(
        self,
        analysis: str,
        parameters: Mapping[str, Any],
        tables: Callable[[list[Subject]], Tables],
        figures: Callable[[Tables], Mapping[str, Figure]],
        shown: Mapping[str, Sequence[str]],
        attack: Attack | None = None,
    ) -> None:
        """Do what ``record_and_write`` does, with tables made from subjects."""
        self.record_and_write(
            analysis,
            parameters,
            lambda record: tables([self._subject(name, record(name)) for name in self.classifiers]),
            figures,
            shown,
            attack,
        )

    def _subject(self, name: str, record: Record) -> Subject:
        from patchproof.evaluation.feature_analyses import Subject

        return Subject(
            name,
            self.views[name],
            record,
            self.image_size,
            self.bench.tolerance,
            self.classifiers[name].card,
        )


class _Recorder:
    """Makes recordings when they are asked for, each once."""

    def __init__(self, archives: Mapping[str, FeatureArchive], bar: RecordingBar) -> None:
        self._archives = archives
        self._bar = bar
        self.made: dict[tuple[str, Attack | None], FeatureRecording] = {}

    def of(self, name: str) -> Callable[[Attack | None], FeatureRecording]:
        """Return what records a classifier."""

        def record(attack: Attack | None) -> FeatureRecording:
            if (name, attack) not in self.made:
                what = name if attack is None else f"{name} attacked"
                self.made[name, attack] = self._archives[name].record(self._bar.next(what), attack)
            return self.made[name, attack]

        return record


def on_feature_bench(analysis: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function whose first argument is a ``FeatureBench``.

    The command has the function's other options, and those of ``open_bench`` with several weights.
    """
    return make_command(analysis, open_feature_bench, options_of(open_feature_bench))


def on_local_bench(analysis: Callable[..., None]) -> Callable[..., None]:
    """Do what ``on_feature_bench`` does, and let in networks with large receptive fields."""
    return make_command(analysis, open_local_bench, options_of(open_local_bench))


def options_of(opened: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the options of ``open_bench``, changed and joined by a function's own."""
    own = inspect.signature(opened, eval_str=True).parameters
    return {
        name: own.get(name, parameter)
        for name, parameter in (bench_options() | dict(own)).items()
        if name != "shared"
    }


def open_feature_bench(
    weights: ManyWeights = None, ablation: AblationOption = None, **shared: Any
) -> FeatureBench:
    """Load the images and the classifiers, and find out what their views see.

    Raises:
        PatchproofError: two classifiers of the same name, or one without small views.
    """
    return _open(weights, ablation, large=False, **shared)


def open_local_bench(
    weights: ManyWeights = None, ablation: AblationOption = None, **shared: Any
) -> FeatureBench:
    """Do what ``open_feature_bench`` does, and let in networks with large receptive fields.

    Raises:
        PatchproofError: two classifiers of the same name, or one without features.
    """
    return _open(weights, ablation, large=True, **shared)


def _open(
    weights: list[Path] | None, ablation: str | None, *, large: bool, **shared: Any
) -> FeatureBench:
    from patchproof.defenses.over_features import choose_views
    from patchproof.views.cells import CellViews

    kept = None if ablation is None else opt.parse_ablation("--ablation", ablation)
    bench, classifiers = open_classifiers(weights, **shared)
    views: dict[str, FeatureViews | CellViews] = {}
    for name, one in classifiers.items():
        small = kept is not None or hasattr(one.model, "ablation")
        if large and not small and hasattr(one.model, "cell_logits"):
            views[name] = CellViews(one.model, bench.image_size, bench.dataset.channels)
        else:
            views[name] = choose_views(one.model, bench.image_size, kept, fill=bench.fill)
    return FeatureBench(bench, classifiers, views)


def open_classifiers(
    weights: list[Path] | None, **shared: Any
) -> tuple[Bench, dict[str, Classifier]]:
    """Load the images, and the classifiers by their names.

    Raises:
        PatchproofError: two classifiers of the same name.
    """
    from patchproof.errors import PatchproofError

    files: list[Path | None] = [*weights] if weights else [None]
    names = [str(shared["model"]) if file is None else name_of(file) for file in files]
    if twice := {name for name in names if names.count(name) > 1}:
        raise PatchproofError(
            f"--weights: expected files of different names, got {min(twice)} more than once"
        )
    bench = open_bench(weights=files[0], **shared)
    options = inspect.signature(load_classifier).parameters
    same = {name: value for name, value in shared.items() if name in options}
    classifiers = [
        bench.classifier,
        *(load_classifier(bench.dataset, file, **same) for file in files[1:]),
    ]
    return bench, dict(zip(names, classifiers, strict=True))


def name_of(weights: Path) -> str:
    """Return the name of a classifier by its file: the folder's for ``model.safetensors``."""
    path = weights.absolute()
    return path.parent.name if path.stem == "model" else path.stem


def _nothing(attack: Attack | None) -> FeatureRecording:
    raise AssertionError("what is possible follows from the views alone")
