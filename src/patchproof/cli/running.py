"""Run a certification on a terminal: progress, Ctrl-C, a table of the figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from patchproof.aggregation.base import Stop
from patchproof.datasets import ImageDataset
from patchproof.defenses import IntervalBoundPropagation
from patchproof.evaluation import (
    DetectionSummary,
    ProbableSummary,
    Proportion,
    certify_dataset,
)
from patchproof.evaluation import Progress as RunProgress
from patchproof.evaluation.certifier import Certifier
from patchproof.evaluation.store import CERTIFIED
from patchproof.evaluation.summary import AnySummary
from patchproof.results import Paper

if TYPE_CHECKING:
    from patchproof.models import ModelSpec

_PAPER: dict[Paper | None, str] = {
    "sound": "the paper's condition",
    "unsound": "the paper's condition (not sound)",
    None: "",
}


def certify_and_show(
    defense: Certifier,
    dataset: ImageDataset,
    out: Path,
    *,
    stop: Stop,
    gallery: int,
    spec: ModelSpec | None,
    about: Mapping[str, Any],
) -> AnySummary:
    """Certify a data set with a progress bar on stderr, and print the figures.

    Raises:
        typer.Exit: Ctrl-C, after what is finished is written.
    """
    promise = CERTIFIED[defense.kind].replace("_", " ")
    with RunBar("certifying", len(dataset), out) as bar:

        def show(progress: RunProgress) -> None:
            state = ""
            if progress.images_per_second:
                state = (
                    f"clean {progress.clean_accuracy:.1%}, {promise} {progress.certified_share:.1%}"
                )
            bar.show(progress.done, progress.images_per_second, progress.seconds_left, state)

        summary = certify_dataset(
            defense,
            dataset,
            out,
            stop=stop,
            gallery=gallery,
            spec=spec,
            about=about,
            progress=show,
        )
    Console().print(_table(summary, defense))
    return summary


class RunBar:
    """The progress of a run that writes a results folder, on stderr; says what Ctrl-C keeps.

    Raises:
        typer.Exit: at the end of its block after Ctrl-C.
    """

    def __init__(self, doing: str, total: int, out: Path) -> None:
        columns = (
            TextColumn(doing),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=total, state="")
        self._done, self._total, self._out = 0, total, out

    def show(self, done: int, rate: float, seconds_left: float, state: str) -> None:
        """Show that ``done`` images are finished, how fast, and a few words."""
        self._done = done
        self._bar.start()
        pace = f"{per_second(rate)} images/s, {_duration(seconds_left)} left" if rate else ""
        text = ", ".join(filter(None, (pace, state)))
        finished = done == self._total
        self._bar.update(self._task, completed=done, state="finishing" if finished else text)

    def __enter__(self) -> RunBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar.live.is_started:  # stopping prints a line
            self._bar.stop()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            typer.echo(
                f"patchproof: stopped after {self._done} of {self._total} images, which are in "
                f"{self._out}; the same command goes on from there",
                err=True,
            )
            raise typer.Exit(130)


def per_second(rate: float) -> str:
    """Return a rate in three digits, or in whole numbers."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _table(summary: AnySummary, defense: Certifier) -> Table:
    title = f"{summary.count} images against {defense.threat.describe()}; {defense.describe()}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("95% interval", justify="right")
    shares: dict[str, Proportion | None] = {"undefended, clean image": summary.vanilla_accuracy}
    if isinstance(summary, DetectionSummary):
        shares |= {
            "defended, clean image: right and no alert": summary.clean_accuracy,
            "alert on the clean image": summary.alert_rate,
            "certified detection: right or an alert whatever the patch shows": (
                summary.certified_detection_accuracy
            ),
        }
    else:
        promise = (
            {
                "certified with probability: right so often whatever the patch shows": (
                    summary.certified_with_probability_accuracy
                )
            }
            if isinstance(summary, ProbableSummary)
            else {"certified: right whatever the patch shows": summary.certified_accuracy}
        )
        shares |= {
            "defended, clean image": summary.clean_accuracy,
            **promise,
            _PAPER[summary.paper]: summary.paper_accuracy,
        }
    for name, share in shares.items():
        if share is None:
            continue
        table.add_row(name, f"{share.value:.1%}", f"{share.low:.1%} to {share.high:.1%}")
    table.caption = (
        f"{summary.forwards_per_image:.1f} model forwards per image, "
        + ("bounds not counted, " if isinstance(defense, IntervalBoundPropagation) else "")
        + f"{per_second(summary.images_per_second)} images/s"
        + (f"; {summary.corrupt} corrupt, left out" if summary.corrupt else "")
    )
    table.caption_justify = "left"
    return table
