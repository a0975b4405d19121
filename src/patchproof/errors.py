"""What goes wrong: mistakes of the caller, and runs that cannot go on."""

from __future__ import annotations


class PatchproofError(ValueError):
    """Bad input: the message says what was expected and what came (exit code 2)."""

    exit_code = 2


class RunError(PatchproofError):
    """A run that cannot go on though it was asked for correctly (exit code 1)."""

    exit_code = 1
