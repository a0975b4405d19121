"""What the analyses of ``patchproof analyze`` share: options, progress, files, tables."""

from __future__ import annotations

import inspect
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchproof.cli import options as opt

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from patchproof.cli.building import Classifier
    from patchproof.datasets import ImageDataset
    from patchproof.evaluation.analyses import Study
    from patchproof.evaluation.feature_recording import FeatureRecording
    from patchproof.evaluation.recording import Recording, RecordingProgress, ShardedArchive
    from patchproof.threat import MaskSet

    AnyRecording = Recording | FeatureRecording

_OUTPUT = "Output"
_DATA = "Data"
_ROWS_SHOWN = 40

RECORDINGS = "recordings"
"""The folder of the recordings in that of the analyses."""

Out = Annotated[
    Path,
    typer.Option(
        help="Folder of the analyses. What the classifier says is kept in its folder recordings, "
        "for all analyses with the same --out; a command that was stopped goes on when it is given "
        "again.",
        rich_help_panel=_OUTPUT,
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        help="Folder inside --out for the tables and figures; by default the name of the analysis.",
        rich_help_panel=_OUTPUT,
    ),
]


@dataclass(frozen=True)
class Bench:
    """A classifier, the images that it is analysed on, and where the results go.

    Attributes:
        out: the folder of the analyses.
        name: the folder in it for tables and figures; None for the name of the analysis.
        dataset: the images.
        classifier: the model.
        fill: the value of masked pixels.
        tolerance: a view whose margin (logits) is not larger counts as corrupted.
        batch_size: views in one forward pass; None to measure which is fastest.
        seed: of the sample of the images.
    """

    out: Path
    name: str | None
    dataset: ImageDataset
    classifier: Classifier
    fill: float
    tolerance: float
    batch_size: int | None
    seed: int

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.dataset.image_size

    def run(
        self,
        analysis: str,
        parameters: Mapping[str, Any],
        recordings: int,
        table: Callable[[Study], pd.DataFrame],
        figures: Callable[[pd.DataFrame], Mapping[str, Figure]],
        shown: Sequence[str],
    ) -> None:
        """Record what is missing, then write and show a table and its figures.

        Args:
            analysis: its name.
            parameters: what decides the table beside model, data and defense, as JSON values.
            recordings: how many the table is made of.
            table: makes it.
            figures: of the table, by the name of their files.
            shown: the columns to print.

        Raises:
            PatchproofError: the folder holds something else.
            RunError: it cannot be written.
            typer.Exit: Ctrl-C, after what is recorded is written.
        """
        from patchproof.evaluation.analyses import Study
        from patchproof.evaluation.recording import Archive
        from patchproof.report.analysis import AnalysisFolder

        check_out(self.out)
        archive = Archive(
            self.out / RECORDINGS,
            self.classifier.model,
            self.dataset,
            fill=self.fill,
            spec=self.classifier.spec,
            batch_size=self.batch_size,
        )
        identity = {
            "analysis": analysis,
            "parameters": dict(parameters),
            "model": archive.model_identity,
            **self.identity(archive),
        }
        folder = AnalysisFolder(self.out / (self.name or analysis), identity)
        folder.check()
        used: list[Recording] = []
        with recording_bar(archive.folder, len(self.dataset), recordings) as bar:

            def record(mask_set: MaskSet) -> Recording:
                used.append(archive.record(mask_set, bar.next(f"{len(mask_set)} masks")))
                return used[-1]

            made = table(Study(record, self.image_size, self.fill, self.tolerance))
        about = self.about(used, archive.forwards) | {"model_card": dict(self.classifier.card)}
        folder.write({analysis: made}, figures(made), about)
        show(f"{analysis} of {len(used[0]):,} images of {self.dataset.name}", made, shown)
        tell_cost(about)
        typer.echo(f"Tables and figures: {folder.path}")

    def identity(self, archive: ShardedArchive) -> dict[str, Any]:
        """Return what decides a table beside analysis and model, as JSON values."""
        return {
            "dataset": {
                "name": self.dataset.name,
                "split": self.dataset.split,
                "image_size": list(self.image_size),
                **archive.dataset_identity,
            },
            "fill": self.fill,
            "tolerance": self.tolerance,
            "precision": "float32",
            "patchproof": version("patchproof"),
        }

    def about(self, used: Sequence[AnyRecording], spent: int) -> dict[str, Any]:
        """Return how tables were made, as JSON values.

        Args:
            used: the recordings that they were made of.
            spent: the forward passes in this run.
        """
        forwards = sum(recording.forwards for recording in used)
        return made_now() | {
            "seed": self.seed,
            "corrupt_images": used[0].corrupt,
            "forwards_recorded": forwards,
            "forwards_in_this_run": spent,
            "seconds_per_forward": sum(recording.seconds for recording in used) / forwards,
            "timed_on": sorted({words for recording in used for words in recording.machines}),
        }


def open_bench(
    out: Out,
    name: Name = None,
    data: Annotated[
        str,
        typer.Option(
            help="digits (comes with patchproof), mnist, cifar10, imagenette, imagenet (under "
            "--root), hf:NAME (a data set of the Hugging Face hub), or a folder: one folder of "
            "images a class, or Parquet files.",
            rich_help_panel=_DATA,
        ),
    ] = "digits",
    root: Annotated[
        Path | None,
        typer.Option(help="Folder with torchvision's data sets, for names.", rich_help_panel=_DATA),
    ] = None,
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Fetch the data set if it is not under --root.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    split: Annotated[
        str,
        typer.Option(
            help="train, validation or test; all for a folder without splits.",
            rich_help_panel=_DATA,
        ),
    ] = "test",
    count: Annotated[
        int | None,
        typer.Option(
            help="Analyse this many images, drawn with --seed; by default all.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the sample that --count draws.", rich_help_panel=_DATA)
    ] = 0,
    indices: Annotated[
        Path | None,
        typer.Option(
            help="Analyse these rows of the split: a text file of row numbers from 0, or the "
            "column index of a .csv.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    image_size: opt.ImageSize = None,
    weights: opt.Weights = None,
    model: opt.Model = None,
    model_option: opt.ModelOption = None,
    classes: opt.Classes = None,
    pretrained: opt.Pretrained = False,
    fill: opt.Fill = None,
    tolerance: opt.Tolerance = None,
    batch_size: opt.BatchSize = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
) -> Bench:
    """Load the images and the classifier that the options of every analysis name."""
    from patchproof.cli.building import choose_slice, use_threads
    from patchproof.datasets import load_dataset
    from patchproof.defenses.saved import DEFAULT_FILL, DEFAULT_TOLERANCE

    use_threads(threads)
    size = None if image_size is None else opt.parse_pair("--image-size", image_size)
    dataset = load_dataset(data, split, root=root, image_size=size, download=download)
    dataset = choose_slice(dataset, count, seed, indices)
    classifier = load_classifier(dataset, weights, model, model_option, classes, pretrained, device)
    fills = (fill, classifier.fill, DEFAULT_FILL)
    return Bench(
        out=out,
        name=name,
        dataset=dataset,
        classifier=classifier,
        fill=next(value for value in fills if value is not None),
        tolerance=DEFAULT_TOLERANCE if tolerance is None else tolerance,
        batch_size=batch_size,
        seed=seed,
    )


def load_classifier(
    dataset: ImageDataset,
    weights: Path | None,
    model: str | None,
    model_option: list[str] | None,
    classes: int | None,
    pretrained: bool,
    device: str,
) -> Classifier:
    """Load a classifier of a data set, as the options name it."""
    from patchproof.cli.building import ModelOptions, build_classifier

    return build_classifier(
        ModelOptions(
            weights, model, classes, pretrained, device, opt.parse_model_options(model_option)
        ),
        dataset.image_size,
        dataset.channels,
        len(dataset.class_names),
    )


def on_bench(analysis: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function whose first argument is a ``Bench``.

    The command has the function's other options, and those of ``open_bench``.
    """
    return make_command(analysis, open_bench, bench_options())


def bench_options() -> dict[str, inspect.Parameter]:
    """Return the options of ``open_bench`` by their names."""
    return dict(inspect.signature(open_bench, eval_str=True).parameters)


def make_command(
    analysis: Callable[..., None],
    opened: Callable[..., Any],
    shared: Mapping[str, inspect.Parameter],
) -> Callable[..., None]:
    """Make a command of a function whose first argument is what ``opened`` returns.

    The command has the function's other options, and those in ``shared``, which ``opened`` takes.
    """
    own = list(inspect.signature(analysis, eval_str=True).parameters.values())[1:]

    def command(**values: Any) -> None:
        bench = opened(**{name: values.pop(name) for name in shared})
        analysis(bench, **values)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*own, *shared.values())
    ]
    command.__name__, command.__doc__ = analysis.__name__, analysis.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(command)["__signature__"] = inspect.Signature(parameters)
    return command


def check_out(out: Path) -> None:
    """Raise ``PatchproofError`` if the folder of the analyses is something else."""
    from patchproof.errors import PatchproofError

    if out.exists() and not out.is_dir():
        raise PatchproofError(f"{out}: expected a folder for the analyses, got a file")
    for name in ("manifest.json", "analysis.json"):
        if (out / name).exists():
            raise PatchproofError(
                f"{out}: expected a folder for the analyses, got the results of another command "
                f"({name})"
            )


def made_now() -> dict[str, Any]:
    """Return by which command and versions something is made, as JSON values."""
    import torch

    return {
        "command": ["patchproof", *sys.argv[1:]],
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchvision", "timm", "numpy", "matplotlib")},
        "threads": torch.get_num_threads(),
    }


def show(title: str, table: pd.DataFrame, columns: Iterable[str]) -> None:
    """Print some columns of a table of an analysis, accuracies without their intervals.

    Columns that say how masks are made are left out where all rows have the same.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from patchproof.report.analysis import cells

    how = [name for name in ("multiplicity", "layout") if name in table]
    same = {name for name in how if table[name].nunique() == 1}
    chosen = [name for name in columns if name not in same]
    words = cells(table[chosen], intervals=False)
    printed = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
        caption_justify="left",
    )
    for heading, texts in words.items():
        widest = max(map(len, (*heading.split(), *texts)))
        printed.add_column(heading, justify="right", min_width=widest)
    for row in islice(zip(*words.values(), strict=True), _ROWS_SHOWN):
        printed.add_row(*row)
    if len(table) > _ROWS_SHOWN:
        printed.caption = f"the first {_ROWS_SHOWN} of {len(table):,} rows"
    Console().print(printed)


def tell_cost(about: Mapping[str, Any]) -> None:
    """Print how many images are left out, and what was asked of the models."""
    if corrupt := about["corrupt_images"]:
        typer.echo(f"{corrupt:,} images are corrupt and left out")
    typer.echo(
        f"{about['forwards_recorded']:,} model forwards are recorded, "
        f"{about['forwards_in_this_run']:,} of them in this run"
    )


@contextmanager
def recording_bar(folder: Path, images: int, recordings: int) -> Iterator[RecordingBar]:
    """Show a progress bar on stderr while something is recorded.

    Args:
        folder: of the recordings.
        images: of each recording.
        recordings: how many there are.

    Raises:
        typer.Exit: Ctrl-C, after what is recorded is written.
    """
    bar = RecordingBar(images, recordings)
    try:
        yield bar
    except KeyboardInterrupt as interrupt:
        bar.stop()
        typer.echo(
            f"patchproof: stopped; what is recorded is in {folder}, and the same "
            "command goes on from there",
            err=True,
        )
        raise typer.Exit(130) from interrupt
    finally:
        bar.stop()


class RecordingBar:
    """A progress bar on stderr for one recording after the other."""

    def __init__(self, images: int, recordings: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=images, state="")
        self._recordings = recordings
        self._number = 0

    def next(self, what: str) -> Callable[[RecordingProgress], None]:
        """Begin the next recording, and return what it tells its progress to."""
        self._number += 1
        description = f"recording {self._number} of {self._recordings}, {what}"

        def tell(progress: RecordingProgress) -> None:
            if progress.done == progress.total and not progress.forwards_per_second:
                return  # it was recorded before
            self._bar.start()
            self._bar.update(
                self._task,
                description=description,
                completed=progress.done,
                state=f"{progress.forwards_per_second:,.0f} forwards/s",
            )

        return tell

    def stop(self) -> None:
        """Stop the bar if it was shown; stopping prints a line."""
        if self._bar.live.is_started:
            self._bar.stop()
