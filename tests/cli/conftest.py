"""A folder of images, and a model of one's own, as a user would bring them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchproof.cli.main import run

MODEL = """
import os, time, torch

class BrighterHalf(torch.nn.Module):
    def forward(self, images):
        time.sleep(float(os.environ.get("SECONDS_PER_FORWARD", "0")))
        left, right = images.chunk(2, dim=3)
        return 20 * torch.stack([left.mean((1, 2, 3)), right.mean((1, 2, 3))], dim=1)
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Go to a folder with ``images/{left,right}/*.png`` of 8x8 pixels and ``halves_model.py``."""
    random = np.random.default_rng(0)
    for label, name in enumerate(("left", "right")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 100, (8, 8))
            pixels[:, 4 * label : 4 * label + 4] += 20 * number
            Image.fromarray(pixels.astype(np.uint8)).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    (tmp_path / "halves_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("PATCHPROOF_DEBUG", raising=False)
    yield tmp_path
    sys.modules.pop("halves_model", None)


@pytest.fixture
def patchproof(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], tuple[int, str, str]]:
    """Return a function that runs a command line: exit code, output, errors."""

    def patchproof(line: str) -> tuple[int, str, str]:
        code = run(line.split())
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return patchproof
