"""Figures of analyses show the numbers of their tables; tables read as they should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes

from patchproof import PatchproofError
from patchproof.report.analysis import AnalysisFolder, markdown
from patchproof.report.figures import (
    budget_figures,
    class_figure,
    inference_figures,
    object_size_figure,
    overestimate_figures,
    sizes_figures,
)


def accuracy(**values: float) -> dict[str, float]:
    return {
        f"{name}{end}": value + change
        for name, value in values.items()
        for end, change in (("", 0.0), ("_low", -0.1), ("_high", 0.05))
    }


def budget_table(layouts: tuple[str, ...] = ("paper",)) -> pd.DataFrame:
    """Return budgets in no order, of two algorithms."""
    return pd.DataFrame(
        {
            "masks_per_side": sides,
            "multiplicity": "1",
            "layout": layout,
            "inference": algorithm,
            **accuracy(vanilla=0.9, clean=clean + 0.01 * number, certified=clean / 2),
            **accuracy(agreement=0.9),
            "forwards": forwards,
            "forwards_most": 2 * forwards,
            "milliseconds": 0.5 * forwards,
        }
        for layout in layouts
        for number, algorithm in enumerate(("double", "challenger"))
        for sides, clean, forwards in (("6", 0.8, 40.0), ("2", 0.6, 5.0), ("4x2", 0.7, 9.0))
    )


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    """Return what is drawn with markers, as x and y."""
    drawn: list[Any] = [container.lines[0] for container in axes.containers]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn]


def test_budgets_are_drawn_in_order_a_line_an_algorithm() -> None:
    figures = budget_figures(budget_table())
    clean, certified, forwards = figures["accuracy"].axes[:3]
    (double_x, double), (challenger_x, challenger) = lines(clean)
    assert double == pytest.approx([0.6, 0.7, 0.8])
    assert challenger == pytest.approx([0.61, 0.71, 0.81])
    np.testing.assert_allclose(double_x, [2, 8**0.5, 6], atol=0.1)
    assert np.all(np.array(double_x) < challenger_x)  # intervals beside each other
    assert lines(certified)[0][1] == pytest.approx([0.3, 0.35, 0.4])
    assert lines(forwards) == [([2, pytest.approx(8**0.5), 6], [5, 9, 40])] * 2
    left, right = figures["trade-off"].axes
    assert lines(left)[0] == ([5, 9, 40], pytest.approx([0.6, 0.7, 0.8]))
    assert [text.get_text() for text in right.texts] == ["6", "2", "4x2"]
    (legend,) = figures["accuracy"].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "undefended, clean",
        "double masking",
        "challenger game",
    ]


def test_ways_to_make_masks_have_a_colour_each() -> None:
    figure = budget_figures(budget_table(("paper", "balanced")))["accuracy"]
    drawn = [container.lines[0] for container in figure.axes[0].containers]
    assert len({line.get_color() for line in drawn}) == 2
    assert [line.get_linestyle() for line in drawn] == ["-", "--", "-", "--"]
    (legend,) = figure.legends
    names = {text.get_text() for text in legend.get_texts()}
    assert {"layout paper", "layout balanced", "double masking", "challenger game"} <= names


def test_time_is_an_axis_beside_the_forwards() -> None:
    figure = inference_figures(budget_table())["inference"]
    figure.draw_without_rendering()
    axes = figure.axes[1]
    (time,) = axes.child_axes
    assert time.get_ylabel() == "milliseconds per image"
    assert np.divide(time.get_ylim(), axes.get_ylim()) == pytest.approx([0.5, 0.5])
    most = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in most] == [[10, 18, 80]] * 2


def test_sizes_and_estimates() -> None:
    table = pd.DataFrame(
        {
            "patch": [2, 4],
            "area_ratio": [1.0, 4.0],
            **{name: [value, value] for name, value in accuracy(vanilla=0.9, clean=0.8).items()},
            **{name: [value, 0.1] for name, value in accuracy(certified=0.5).items()},
            **{name: [value, 0.0] for name, value in accuracy(certified_estimate=0.5).items()},
        }
    )
    (axes,) = sizes_figures(table, (8, 9))["sizes"].axes
    assert lines(axes) == [([2, 4], [0.8, 0.8]), ([2, 4], [0.5, 0.1])]
    assert "8x9 image" in axes.get_xlabel()
    (axes,) = overestimate_figures(table)["overestimate"].axes
    assert lines(axes)[1:] == [([1.0, 4.0], [0.5, 0.1]), ([1.0, 4.0], [0.5, 0.0])]


@pytest.mark.parametrize("measure", ["certified", "certified_detection"])
def test_objects_by_size_and_class(measure: str) -> None:
    rows = [{"count": 7, **accuracy(**{measure: value})} for value in (0.3, 0.6)]
    by_size = pd.DataFrame(rows).assign(size_low=[0.1, 0.4], size_high=[0.2, 0.5])
    (axes,) = object_size_figure(by_size).axes
    assert [bar.get_height() for bar in axes.patches] == [0.3, 0.6]
    assert [bar.get_x() for bar in axes.patches] == [0.1, 0.4]
    assert [text.get_text() for text in axes.texts] == ["7", "7"]
    assert axes.get_ylabel() == f"{measure.replace('_', ' ')} accuracy"
    by_class = pd.DataFrame(rows).assign(name=["cat", "dog"], object_share=[0.2, np.nan])
    upper, lower = class_figure(by_class).axes
    assert lines(upper)[0] == ([1, 2], [0.3, 0.6])
    assert [label.get_text() for label in lower.get_xticklabels()] == ["cat", "dog"]
    assert len(class_figure(by_class.drop(columns="object_share")).axes) == 1


def test_a_table_in_words() -> None:
    table = pd.DataFrame(
        [
            {"name": "a|b", "count": 1234, **accuracy(certified=0.5), "efficient": True},
            {"name": "c", "count": 2, **accuracy(certified=0.25), "efficient": False},
        ]
    ).assign(forwards=[12.345, np.nan])
    assert markdown(table).splitlines() == [
        "| name | count | certified | efficient | forwards per image |",
        "| --- | ---: | ---: | --- | ---: |",
        r"| a\|b | 1234 | 50.0% (40.0% to 55.0%) | yes | 12.35 |",
        "| c | 2 | 25.0% (15.0% to 30.0%) |  |  |",
    ]


def test_an_analysis_is_written_the_same_each_time(tmp_path: Path) -> None:
    rows = [{"name": name, **accuracy(certified=0.3)} for name in ("cat", "dog")]
    table = pd.DataFrame(rows)
    written = []
    for name in ("one", "two"):
        folder = AnalysisFolder(tmp_path / name, {"analysis": "objects"})
        folder.check()
        files = folder.write({"classes": table}, {"classes": class_figure(table)}, {"seed": 0})
        written.append({path.name: path.read_bytes() for path in files})
        folder.check()
    assert written[0] == written[1]
    assert len(written[0]) == 5
    assert json.loads(written[0]["analysis.json"])["about"] == {"seed": 0}
    assert written[0]["classes.png"].startswith(b"\x89PNG")
    with pytest.raises(PatchproofError, match="holds the results of another run: analysis"):
        AnalysisFolder(tmp_path / "one", {"analysis": "sizes"}).check()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "expected JSON"), ("[]", "expected the format"), ('{"format": "x"}', "the format")],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "analysis.json").write_text(content)
    with pytest.raises(PatchproofError, match=message):
        AnalysisFolder(tmp_path, {}).check()
