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
    done = 0
    promise = CERTIFIED[defense.kind].replace("_", " ")
    columns = (
        TextColumn("certifying"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("", total=len(dataset), state="")

    def show(progress: RunProgress) -> None:
        nonlocal done
        done = progress.done
        bar.start()
        bar.update(task, completed=done, state=_state(progress, promise))

    try:
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
    except KeyboardInterrupt as interrupt:
        _stop(bar)
        typer.echo(
            f"patchproof: stopped after {done} of {len(dataset)} images, which are in {out}; "
            "the same command goes on from there",
            err=True,
        )
        raise typer.Exit(130) from interrupt
    finally:
        _stop(bar)
    Console().print(_table(summary, defense))
    return summary


def _stop(bar: Progress) -> None:
    """Stop the bar if it was shown; stopping prints a line."""
    if bar.live.is_started:
        bar.stop()


def _state(progress: RunProgress, promise: str) -> str:
    if progress.done == progress.total:
        return "finishing"
    if not progress.images_per_second:
        return ""
    return (
        f"{progress.images_per_second:.3g} images/s, {_duration(progress.seconds_left)} left, "
        f"clean {progress.clean_accuracy:.1%}, {promise} {progress.certified_share:.1%}"
    )


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
        + f"{summary.images_per_second:.3g} images/s"
        + (f"; {summary.corrupt} corrupt, left out" if summary.corrupt else "")
    )
    table.caption_justify = "left"
    return table
