"""The demo, shortened: every step, twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from patchproof.cli import demo as page
from patchproof.evaluation import read_result


@pytest.mark.slow
def test_the_demo_ends_with_a_report_and_can_be_run_again(
    patchproof: Callable[[str], tuple[int, str, str]],
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(page, "_EPOCHS", 3)
    monkeypatch.setattr(page, "_MASKS", 2)
    for _ in range(2):
        code, output, _ = patchproof("demo --out demo")
        assert code == 0
        assert "359 images against one square of 2x2 pixels" in output
        assert "demo/report.html" in output
    assert read_result(workplace / "demo/result").finished
    assert (workplace / "demo/report.html").stat().st_size > 10_000
    predict = "predict demo/patched.png --weights demo/model/model.safetensors --patch 2 --masks 2"
    assert patchproof(predict)[0] == 0
