"""The package's names are there when asked for, and PyTorch only then."""

import subprocess
import sys

import pytest

import patchproof as pp

_SAYS = """
import sys
from patchproof.cli.main import run
code = run({arguments!r})
assert not {{"torch", "numpy", "pandas"}} & set(sys.modules), "imported"
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["certify", "--help"], ["train", "--help"], ["analyze", "--help"]]
)
def test_help_waits_for_nothing(arguments):
    script = _SAYS.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: patchproof" in done.stdout


@pytest.mark.parametrize("name", pp.__all__)
def test_every_name_is_there(name):
    value = getattr(pp, name)
    assert value is not None
    assert value is getattr(pp, name)
    assert getattr(value, "__name__", name) == name


def test_modules_are_there_and_nothing_else():
    assert pp.models.ModelSpec.__name__ == "ModelSpec"
    assert "PatchCleanser" in dir(pp)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pp.nothing
