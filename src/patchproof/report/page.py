"""The report: one self-contained HTML page of one or more runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from patchproof.errors import PatchproofError
from patchproof.evaluation.sandwich import (
    Sandwich,
    check_consistent,
    compare,
    differences,
    sandwich_table,
)
from patchproof.evaluation.store import CERTIFIED, RunKind, read_attacked, read_result
from patchproof.evaluation.summary import Proportion, trade_off_table
from patchproof.models.weights import write_atomically
from patchproof.report import plots
from patchproof.report.analysis import AnalysisFolder
from patchproof.report.published import SOURCE_NOTES, comparable, load_published
from patchproof.report.runs import MEASURES, Run
from patchproof.results import ALERT
from patchproof.threat.masks import Mask

_ENLARGED_UP_TO = 64
"""Images of at most so many pixels a side are shown with hard pixel edges."""


def write_report(folders: Sequence[Path], out: Path, tables: Path | None = None) -> Path:
    """Write one HTML page that shows one or more runs and needs nothing else to be read.

    Attack runs are joined with the certify runs of the same defense, threat, model and images.

    Args:
        folders: results folders that ``patchproof certify`` or ``attack`` wrote, finished or not.
        out: the page; an existing file is replaced whole.
        tables: a folder for the sandwiches alone, as tables and figures; None for none.

    Returns:
        ``out``.

    Raises:
        PatchproofError: no folders, one of them twice, not a results folder, one without a finished
            image, a folder where the page should be, or tables asked for of runs that do not join.
        RunError: a results folder is damaged, or the page cannot be written; and, when it is
            written, an attack broke a certified image.
    """
    if not folders:
        raise PatchproofError("report: expected at least one results folder, got none")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise PatchproofError("report: expected distinct results folders, got one more than once")
    if out.is_dir():
        raise PatchproofError(f"report: expected the name of a page to write, got the folder {out}")
    runs = [Run(read_result(folder)) for folder in folders]
    sandwiches = _joined(runs)
    if tables is not None:
        _write_tables(tables, runs, sandwiches)
    write_atomically(out, render(runs, sandwiches).encode())
    check_consistent(list(sandwiches.values()))
    return out


def render(runs: Sequence[Run], sandwiches: Mapping[int, Sandwich]) -> str:
    """Return the page of ``runs`` as HTML.

    Args:
        runs: in the order of the page.
        sandwiches: of certify runs with attack runs, by the number of the certify run, from 1.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    published = load_published()
    labels = _labels(runs)
    entries = [
        {
            "number": number,
            "label": label,
            "run": run,
            "accuracies": run.accuracies(),
            "published": _published(run, published),
            "examples": _examples(run),
            "attacked": _attacked(run),
            "masks": _mask_drawing(run),
        }
        for number, (label, run) in enumerate(zip(labels, runs, strict=True), 1)
    ]
    promises = [
        {
            "kind": kind,
            "measures": measures,
            "runs": [entry for entry, run in zip(entries, runs, strict=True) if run.kind == kind],
            "figures": _accuracy_pictures(runs, labels, kind),
        }
        for kind, measures in MEASURES.items()
    ]
    return environment.get_template("page.html.jinja").render(
        runs=entries,
        promises=[promise for promise in promises if promise["runs"]],
        sandwiches=_sandwich_tables(entries, sandwiches),
        unjoined=_unjoined(entries),
        measures=MEASURES,
        figures=[*_budget_pictures(runs), *_trade_off_pictures(runs, labels)],
        scale=plots.heat_scale(),
        enlarged_up_to=_ENLARGED_UP_TO,
    )


def _write_tables(
    path: Path, runs: Sequence[Run], sandwiches: Mapping[int, Sandwich]
) -> list[Path]:
    """Write the sandwiches of each kind as a table and a figure."""
    if not sandwiches:
        raise PatchproofError(
            "tables: expected an attack run on what a certify run certifies, got no such two"
        )
    folder = AnalysisFolder(path, {"analysis": "sandwich"})
    folder.check()
    labels = _labels(runs)
    tables = {}
    for kind in MEASURES:
        own = {labels[number - 1]: one for number, one in sandwiches.items() if one.kind == kind}
        if own:
            tables[f"sandwich-{kind}"] = sandwich_table(own)
    about = {
        labels[number - 1]: {
            "certify": one.certify.folder.name,
            "attacks": [attack.folder.name for attack in one.attacks],
        }
        for number, one in sandwiches.items()
    }
    figures = {name: plots.sandwich_figure(table) for name, table in tables.items()}
    return folder.write(tables, figures, {"runs": about})


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return a short name for each run, told apart by the folder where needed."""
    labels = [f"{run.dataset['name']}, {run.patch}: {run.system}" for run in runs]
    alike: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        alike.setdefault(label, []).append(place)
    for label, places in alike.items():
        if len(places) > 1:
            names = _told_apart([runs[place].result.folder for place in places])
            for place, name in zip(places, names, strict=True):
                labels[place] = f"{label} ({name})"
    return labels


def _told_apart(folders: Sequence[Path]) -> list[str]:
    """Return the last part of the paths in which all differ, whole paths where there is none."""
    ends = (folder.resolve().parts[::-1] for folder in folders)
    for names in zip(*ends, strict=False):
        if len(set(names)) == len(names):
            return list(names)
    return [str(folder) for folder in folders]


def _joined(runs: Sequence[Run]) -> dict[int, Sandwich]:
    """Join each certify run with all attack runs on the same, by the certify run's number."""
    attacks = [run.result for run in runs if run.kind == "attack"]
    sandwiches = {}
    for number, run in enumerate(runs, 1):
        if run.kind == "attack":
            continue
        if own := [attack for attack in attacks if not differences(run.result, attack)]:
            sandwiches[number] = compare(run.result, own)
    return sandwiches


def _sandwich_tables(
    entries: Sequence[dict[str, Any]], sandwiches: Mapping[int, Sandwich]
) -> list[dict[str, Any]]:
    """Return the sandwiches of certify runs of each kind, as rows of a table and as a picture."""
    attacks = {entry["run"].result.folder: entry for entry in entries}
    groups = []
    for kind in MEASURES:
        joined = {
            entries[number - 1]["label"]: (entries[number - 1], sandwich)
            for number, sandwich in sandwiches.items()
            if sandwich.kind == kind
        }
        if not joined:
            continue
        table = sandwich_table({label: sandwich for label, (_, sandwich) in joined.items()})
        words = ", ".join(
            f"{label}: certified {_percent(sandwich.certified.value)}, empirical "
            f"{_percent(sandwich.empirical.value)}"
            for label, (_, sandwich) in joined.items()
        )
        rows = [
            {
                "entry": entry,
                "attacks": [attacks[attack.folder] for attack in sandwich.attacks],
                "sandwich": sandwich,
                "numbers": numbers,
            }
            for (entry, sandwich), numbers in zip(
                joined.values(), table.to_dict("records"), strict=True
            )
        ]
        picture = _picture(
            partial(plots.sandwich_figure, table),
            f"Certified and empirical accuracy over the attacked images. {words}.",
            "What is known of the attacked images: the share that is right under every attack lies "
            "between the numbers on the right, in percent. What is missing to the right of a bar "
            "is wrong without a patch.",
        )
        groups.append({"kind": kind, "rows": rows, "picture": picture})
    return groups


def _unjoined(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the attack runs that no certify run on the page is about, and why."""
    certify = [entry for entry in entries if entry["run"].kind != "attack"]
    unjoined = []
    for entry in entries:
        if entry["run"].kind != "attack" or not certify:
            continue
        reasons = [differences(other["run"].result, entry["run"].result) for other in certify]
        nearest = min(range(len(certify)), key=lambda place: len(reasons[place]))
        if reasons[nearest]:
            others = " and another ".join(reasons[nearest])
            unjoined.append({"entry": entry, "nearest": certify[nearest], "others": others})
    return unjoined


def _accuracy_pictures(
    runs: Sequence[Run], labels: Sequence[str], kind: RunKind
) -> list[dict[str, str]]:
    """Draw the accuracies of the runs of one kind, if there are any."""
    table = pd.DataFrame(
        {"run": label, "measure": measure, **_interval(accuracy)}
        for label, run in zip(labels, runs, strict=True)
        if run.kind == kind
        for measure, accuracy in run.accuracies().items()
    )
    if table.empty:
        return []
    caption = "Accuracies with 95% Wilson intervals."
    if kind in ("recovery", "probable"):
        caption += " The hollow squares show what the paper's criterion states."
    return [
        _picture(
            partial(plots.accuracy_figure, table),
            "Accuracies of each run with 95% intervals, in percent: the figures of the table "
            "above.",
            caption,
        )
    ]


def _budget_pictures(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Draw certified accuracy over the budget for runs that differ only in budget and patch."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.kind == "recovery" and run.budget is not None:
            groups.setdefault(run.but_for_budget_and_patch(), []).append(run)
    pictures = []
    for group in groups.values():
        if len({run.budget for run in group}) < 2:
            continue
        table = pd.DataFrame(
            {
                "patch": run.patch,
                "budget": run.budget,
                **_interval(run.certified_share()),
            }
            for run in group
        )
        points = ", ".join(
            f"{run.patch} at {run.budget}: {_percent(run.certified_share().value)}" for run in group
        )
        first = group[0]
        pictures.append(
            _picture(
                partial(plots.budget_figure, table),
                f"Certified accuracy over masks per side. {points}.",
                f"Certified accuracy over the budget of {first.defense['type']} on "
                f"{first.dataset['name']}, with 95% Wilson intervals; the same model and images.",
            )
        )
    return pictures


def _trade_off_pictures(runs: Sequence[Run], labels: Sequence[str]) -> list[dict[str, str]]:
    """Draw certified detection over clean accuracy, a figure for each model, threat and images.

    Runs that differ only in tau lie on one curve. Runs of recovery on the same are drawn beside it,
    as in PatchCleanser, Figure 9.
    """
    groups: dict[str, list[tuple[Run, str]]] = {}
    for run, label in zip(runs, labels, strict=True):
        if run.kind not in ("recovery", "detection"):
            continue
        groups.setdefault(run.but_for_defense(), []).append((run, label))
    pictures = []
    for group in groups.values():
        detecting = [run for run, _ in group if run.kind == "detection"]
        if not detecting:
            continue
        curves = {run.but_for_tau(): run for run in reversed(detecting)}
        tables = [
            trade_off_table(run.result.examples).assign(curve=place)
            for place, run in enumerate(curves.values())
        ]
        points = pd.DataFrame(
            {
                "run": run.system,
                "kind": run.kind,
                "clean": run.accuracies()["clean"].value,
                "certified": run.certified_share().value,
            }
            for run, _ in group
        )
        words = ", ".join(
            f"{run.system}: clean {_percent(run.accuracies()['clean'].value)}, "
            f"certified {run.kind} {_percent(run.certified_share().value)}"
            for run, _ in group
        )
        first = detecting[0]
        pictures.append(
            _picture(
                partial(plots.trade_off_figure, pd.concat(tables), points),
                f"Certified detection accuracy over clean accuracy. {words}.",
                f"Certified detection accuracy over clean accuracy on {first.dataset['name']}, "
                f"{first.patch}, at every tau from 0 to 1: the curves are all that other values of "
                "tau give on the same images."
                + (
                    " Recovery, hollow, is the stronger promise: no alerts."
                    if len(detecting) < len(group)
                    else ""
                ),
            )
        )
    return pictures


def _picture(draw: Callable[[plots.Ink], Figure], alt: str, caption: str) -> dict[str, str]:
    """Return a figure for light and for dark pages."""
    return {
        "light": plots.data_uri(plots.figure_png(draw(plots.ON_LIGHT))),
        "dark": plots.data_uri(plots.figure_png(draw(plots.ON_DARK))),
        "alt": alt,
        "caption": caption,
    }


def _published(run: Run, table: pd.DataFrame) -> dict[str, Any]:
    """Return the published rows to set beside a run, and what to bear in mind."""
    name = str(run.dataset["name"]).lower()
    if name not in set(table["dataset"]):  # imagenette160 is a size of imagenette
        name = name.rstrip("0123456789-_")
    rows = comparable(name, run.identity["threat"], run.image_size, table)
    caveats = []
    if spaces := sorted(set(rows["space"]) - {"", run.space}):
        caveats.append(
            f"Another coordinate space: some rows count the patch on images resized to "
            f"{' or '.join(spaces)}; this run's is a {run.patch} pixels. These are different "
            "threat models, and neither figure bounds the other."
        )
    sources = set(rows["source"])
    caveats += [f"{name}: {note}" for name, note in SOURCE_NOTES.items() if name in sources]
    if note := run.about.get("dataset_note"):
        caveats.append(f"Data of this run: {note}")
    records = rows.to_dict("records")
    return {
        "headlines": [row for row in records if row["headline"]],
        "others": [row for row in records if not row["headline"]],
        "caveats": caveats,
    }


def _examples(run: Run) -> list[dict[str, Any]]:
    """Return the pictures of the gallery, each with its words and drawings."""
    gallery = run.result.gallery
    if gallery is None:
        return []
    rows = run.result.examples.set_index("index")
    examples = []
    for index, image, vulnerability in zip(
        gallery.index.tolist(), gallery.image, gallery.vulnerability, strict=True
    ):
        if index not in rows.index:
            continue
        row = rows.loc[index]
        label, vanilla, prediction = (int(row[name]) for name in ("label", "vanilla", "prediction"))
        examples.append(
            {
                "index": index,
                "label": run.class_name(label),
                "vanilla": run.class_name(vanilla),
                "vanilla_right": vanilla == label,
                "prediction": run.class_name(prediction),
                "right": prediction == label,
                "case": row["case"],
                "certified": bool(row[CERTIFIED[run.kind]]),
                "image": plots.data_uri(plots.png(_rgb(image))),
                "heat": plots.data_uri(plots.png(plots.heat(vulnerability))),
                "worst": float(vulnerability.max()),
            }
        )
    return examples


def _attacked(run: Run) -> list[dict[str, Any]]:
    """Return the attacked images to look at, successes and failures, each with its words."""
    gallery = read_attacked(run.result.folder) if run.kind == "attack" else None
    if gallery is None:
        return []
    rows = run.result.examples.set_index("index")
    groups = []
    for title, wanted in (("Patches that succeed", True), ("Patches that fail", False)):
        pictures = []
        for index, image, attacked, broken in zip(
            gallery.index.tolist(), gallery.image, gallery.attacked, gallery.broken, strict=True
        ):
            if bool(broken) != wanted or index not in rows.index:
                continue
            row = rows.loc[index]
            label, prediction = int(row["label"]), int(row["attacked_prediction"])
            pictures.append(
                {
                    "index": index,
                    "label": run.class_name(label),
                    "prediction": run.class_name(prediction),
                    "held": prediction in (label, ALERT),
                    "target": run.class_name(int(row["target"])) if row["target"] >= 0 else "",
                    "boxes": json.loads(row["regions"] or "[]"),
                    "image": plots.data_uri(plots.png(_rgb(image))),
                    "attacked": plots.data_uri(plots.png(_rgb(attacked))),
                }
            )
        if pictures:
            groups.append({"title": title, "pictures": pictures})
    return groups


def _mask_drawing(run: Run) -> dict[str, Any] | None:
    """Return what to draw of the mask set: its first mask, the one in the middle, the outlines."""
    if not run.masks:
        return None
    height, width = run.image_size

    def off_centre(mask: Mask) -> float:
        return max(
            math.hypot(box.top + (box.height - height) / 2, box.left + (box.width - width) / 2)
            for box in mask
        )

    boxes = sorted({box for mask in run.masks for box in mask})
    grey = round(255 * float(run.defense.get("fill", 0.5)))
    return {
        "first": run.masks[0],
        "middle": min(run.masks, key=off_centre),
        "outlines": "".join(
            f"M{box.left} {box.top}h{box.width}v{box.height}h-{box.width}z" for box in boxes
        ),
        "fill": f"rgb({grey} {grey} {grey})",
    }


def _rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image (C, H, W) as (H, W, 3); grey images repeat their channel."""
    return np.ascontiguousarray(
        np.broadcast_to(image[:3], (3, *image.shape[1:])).transpose(1, 2, 0)
    )


def _interval(accuracy: Proportion) -> dict[str, float]:
    return {"value": accuracy.value, "low": accuracy.low, "high": accuracy.high}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"
