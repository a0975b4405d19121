"""``patchproof report``: a web page from results folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT...", help="Results folders of `patchproof certify` and `attack`."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The HTML file to write; one that exists is replaced.")
    ] = Path("report.html"),
    tables: Annotated[
        Path | None,
        typer.Option(
            help="Folder for certificates and attacks joined, as tables (CSV, Markdown) and "
            "figures (PNG, SVG)."
        ),
    ] = None,
) -> None:
    """Make one self-contained HTML page from results folders.

    It says the attacker in words, the accuracies with their intervals, and shows example images
    with the places where a patch could still win. Unfinished runs are marked as such.

    Attacks are joined with the certificates of the same defense, image by image: the true accuracy
    lies between what is certified and what no attack broke. A certified image that an attack broke
    is a bug: it ends the command with exit code 1 when the page is written.
    """
    from patchproof.report import write_report

    typer.echo(f"Report: {write_report(results, out, tables)}")
