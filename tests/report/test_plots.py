import io

import numpy as np
import pandas as pd
from matplotlib.image import imread

from patchproof.report import ON_DARK, accuracy_figure, budget_figure, heat, trade_off_figure
from patchproof.report.plots import data_uri, figure_png, heat_scale, png


def test_accuracies_are_drawn_as_they_are() -> None:
    table = pd.DataFrame(
        {
            "run": ["a", "a", "b"],
            "measure": ["certified", "clean", "certified"],
            "value": [0.5, 0.8, float("nan")],
            "low": [0.4, 0.7, float("nan")],
            "high": [0.6, 0.9, float("nan")],
        }
    )
    axes = accuracy_figure(table).axes[0]
    drawn = [container.lines[0].get_xdata() for container in axes.containers]
    np.testing.assert_array_equal(drawn, [[0.5], [0.8]])
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["50.0", "80.0", "a", "b"]


def test_budgets_are_drawn_in_order_a_line_a_patch() -> None:
    table = pd.DataFrame(
        {
            "patch": ["5x5", "2x2", "5x5"],
            "budget": [6, 6, 2],
            "value": [0.6, 0.9, 0.3],
            "low": [0.5, 0.8, 0.2],
            "high": [0.7, 0.95, 0.4],
        }
    )
    figure = budget_figure(table, ON_DARK)
    large, small = figure.axes[0].containers
    np.testing.assert_array_equal(large.lines[0].get_xdata(), [2, 6])
    np.testing.assert_array_equal(large.lines[0].get_ydata(), [0.3, 0.6])
    np.testing.assert_array_equal(small.lines[0].get_xdata(), [6])
    assert figure_png(figure, dpi=40).startswith(b"\x89PNG")


def test_the_curve_over_tau_is_drawn_with_single_runs_beside_it() -> None:
    table = pd.DataFrame(
        {
            "curve": [0, 0, 0],
            "tau": [0.0, 0.6, 1.0],
            "clean_accuracy": [0.8, 0.9, 0.95],
            "certified_detection_accuracy": [0.7, 0.6, 0.0],
        }
    )
    points = pd.DataFrame(
        {
            "run": ["reports", "cleanser"],
            "kind": ["detection", "recovery"],
            "clean": [0.9, 0.85],
            "certified": [0.6, 0.4],
        }
    )
    figure = trade_off_figure(table, points)
    axes = figure.axes[0]
    curve, *rest = axes.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[0.8, 0.7], [0.9, 0.6], [0.95, 0.0]])
    # tau 0.5 lies on the piece that ends at 0.6, the others on that which ends at 1
    marked = [line.get_xydata()[0].tolist() for line in rest[:4]]
    assert marked == [[0.9, 0.6], *[[0.95, 0.0]] * 3]
    assert [text.get_text() for text in axes.texts] == [
        f"tau {tau}" for tau in (0.5, 0.7, 0.9, 0.99)
    ]
    filled = [line.get_markerfacecolor() for line in rest[4:]]
    assert filled[0] != "none"
    assert filled[1] == "none"
    assert "certified recovery" in rest[5].get_label()
    assert figure_png(figure, dpi=40).startswith(b"\x89PNG")


def test_the_map_has_a_fixed_scale_from_dark_to_bright() -> None:
    faint = heat(np.array([[0.0, 0.1]]))
    full = heat(np.array([[0.0, 1.0]]))
    assert (faint[0, 0] == full[0, 0]).all(), "the ends do not depend on the map"
    assert not (faint[0, 1] == full[0, 1]).all()
    brightness = [sum(bytes.fromhex(color[1:])) for color in heat_scale()]
    assert brightness == sorted(brightness)


def test_pixels_survive_the_way_into_a_page() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    read = imread(io.BytesIO(png(pixels)), format="png")
    np.testing.assert_array_equal((read[..., :3] * 255).round(), pixels)
    assert data_uri(b"\x00").startswith("data:image/png;base64,")
