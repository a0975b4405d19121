import pandas as pd
import pytest

from patchproof.errors import RunError
from patchproof.evaluation import Proportion, Summary, summarize


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Four images: certified, right, wrong, corrupt."""
    examples = pd.DataFrame(
        {
            "index": [3, 5, 8, 9],
            "label": [1, 1, 1, -1],
            "vanilla": [1, 1, 1, -1],
            "prediction": [1, 1, 0, -1],
            "certified": [True, False, False, False],
            "paper_condition": [False, False, False, False],
            "case": ["agreed", "majority", "agreed", "none"],
            "status": ["ok", "ok", "ok", "corrupt"],
            "message": ["", "", "", "cannot decode it"],
        }
    )
    timing = pd.DataFrame(
        {
            "index": [3, 5, 8, 9],
            "forwards": [40, 10, 10, 0],
            "seconds": [1.0, 0.25, 0.25, 0.0],
            "smallest_margin": [1.0, 0.5, 0.2, float("nan")],
        }
    )
    return examples, timing


def test_intervals_are_wilsons() -> None:
    share = Proportion.of(8, 10)  # from the closed formula with z = 1.959964
    assert (share.value, share.count) == (0.8, 10)
    assert share.low == pytest.approx(0.490162, abs=1e-6)
    assert share.high == pytest.approx(0.943318, abs=1e-6)


def test_corrupt_images_are_in_no_accuracy() -> None:
    summary = summarize(*tables(), batch_size=32)
    assert (summary.count, summary.corrupt, summary.batch_size) == (3, 1, 32)
    assert summary.vanilla_accuracy.value == 1.0
    assert summary.clean_accuracy.value == pytest.approx(2 / 3)
    assert summary.certified_accuracy.value == pytest.approx(1 / 3)
    assert summary.paper_accuracy.value == 0.0
    assert summary.cases == {"agreed": 2, "majority": 1}


def test_without_a_condition_of_the_paper_there_is_no_figure() -> None:
    summary = summarize(*tables(), paper=None)
    assert isinstance(summary, Summary)
    assert summary.paper_accuracy is None
    assert summary.paper is None
    assert summary.to_dict()["paper_accuracy"] is None


def test_an_unsound_condition_is_marked() -> None:
    summary = summarize(*tables(), paper="unsound")
    assert isinstance(summary, Summary)
    assert summary.paper == "unsound"
    assert summary.paper_accuracy is not None
    assert summary.paper_accuracy.value == 0.0


def test_cost_is_per_image_and_per_certified_image() -> None:
    summary = summarize(*tables())
    assert summary.forwards_per_image == 20.0
    assert summary.forwards_per_certified_image == 40.0
    assert summary.images_per_second == 2.0


def test_without_certified_images_their_cost_is_none() -> None:
    examples, timing = tables()
    examples["certified"] = False
    assert summarize(examples, timing).forwards_per_certified_image is None


def test_nothing_but_corrupt_images_is_an_error() -> None:
    examples, timing = tables()
    with pytest.raises(RunError, match=r"got none \(1 corrupt\)"):
        summarize(examples.tail(1), timing.tail(1))
