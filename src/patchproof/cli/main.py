"""The command ``patchproof``: its subcommands, and one line for every error.

Commands import what they need when they run, so that ``--help`` is there at once.
"""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from patchproof.cli.analyze import app as analyze
from patchproof.cli.attack import attack
from patchproof.cli.certify import certify
from patchproof.cli.demo import demo
from patchproof.cli.inventory import inventory
from patchproof.cli.predict import predict
from patchproof.cli.report import report
from patchproof.cli.train import train
from patchproof.cli.universal_patch import universal_patch

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""

_DEBUG = "PATCHPROOF_DEBUG"
_MEMORY = {-1: 2**31 - 1, -2: 2**26, -3: 2**25}
"""Settings of glibc: bytes to keep, to take at once, and from which a block goes back by itself."""

app = typer.Typer(
    name="patchproof",
    help="Provable robustness of image classifiers against adversarial patches: stickers of "
    "bounded size, with any content, placed anywhere.",
    epilog="New here? Run: patchproof demo",
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"patchproof {version('patchproof')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help=f"Show where an error comes from, as {_DEBUG}=1 does."),
    ] = False,
) -> None:
    """Read the options that come before the command."""
    if debug:
        os.environ[_DEBUG] = "1"


app.command(epilog="Example: patchproof demo")(demo)
app.command(epilog="Example: patchproof train --data digits --out runs/digits")(train)
app.command(
    epilog="Example: patchproof certify --weights runs/digits/model.safetensors --data digits "
    "--patch 2 --masks 7 --out runs/digits-2x2"
)(certify)
app.command(
    epilog="Example: patchproof attack --weights runs/digits/model.safetensors --data digits "
    "--patch 2 --masks 7 --out runs/digits-2x2-attacked --against runs/digits-2x2"
)(attack)
app.command(
    "universal-patch",
    epilog="Example: patchproof universal-patch --weights runs/digits/model.safetensors --data "
    "digits --patch 3 --target 1 --out patch.png",
)(universal_patch)
app.command(epilog="Example: patchproof predict photo.png --weights model.safetensors --patch 5")(
    predict
)
app.command(epilog="Example: patchproof report runs/a runs/b --out report.html")(report)
app.add_typer(analyze, name="analyze")
app.command("list", epilog="Example: patchproof list model.safetensors")(inventory)


def main() -> None:
    """Run the command line and exit."""
    keep_freed_memory()
    sys.exit(run(sys.argv[1:]))


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensors; return whether it does.

    By default glibc gives the larger blocks back to the system, and clearing fresh pages costs as
    much as the small layers that are computed in them. Other libraries have no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # not glibc; no library of the process, as on Windows
        return False
    return all(mallopt(setting, size) for setting, size in _MEMORY.items())


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code: 1 for a failure, 2 for misuse, 130 for Ctrl-C."""
    warnings.formatwarning = _one_line_warning
    try:
        code = app(list(arguments) or ["--help"], prog_name="patchproof", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(_DEBUG, "") not in ("", "0"):
            traceback.print_exc()
        print(f"patchproof: error: {_message(error)}", file=sys.stderr)
        return _exit_code(error)
    return code if isinstance(code, int) else 0


def _message(error: Exception) -> str:
    """Return what went wrong in one line."""
    if hasattr(error, "format_message"):
        text = str(error.format_message())
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif hasattr(error, "exit_code"):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error} (this should not happen; --debug shows where)"
    return " ".join(text.split())


def _exit_code(error: Exception) -> int:
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return 2
    return int(getattr(error, "exit_code", 1))


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> str:
    return f"patchproof: warning: {' '.join(str(message).split())}\n"
