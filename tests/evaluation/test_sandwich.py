"""The join of certify and attack runs, on tables whose outcome is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from patchproof.errors import PatchproofError, RunError
from patchproof.evaluation.sandwich import (
    Sandwich,
    check_consistent,
    check_sandwich,
    compare,
    differences,
    join,
    lost_images,
    sandwich_table,
)
from patchproof.evaluation.store import CERTIFIED, Result, RunKind
from patchproof.evaluation.summary import summarize, summarize_attack
from patchproof.results import ALERT

LABELS = [0, 1, 2, 3, 4, 5]


def identity(**changed: Any) -> dict[str, Any]:
    images = {"name": "made", "split": "test", "digest": "a", "count": 6, "indices_digest": "b"}
    defense = {"type": "RandomizedCropping", "probability": 0.9}
    return {
        "kind": "recovery",
        "defense": defense,
        "threat": {"height": 2},
        "image_size": [8, 8],
        "model": {"digest": "c"},
        "dataset": images,
    } | changed


def timing(indices: Sequence[int]) -> pd.DataFrame:
    return pd.DataFrame({"index": indices, "forwards": 1, "seconds": 0.1})


def result(
    kind: RunKind, examples: pd.DataFrame, folder: str = "run", repeats: int = 1, **changed: Any
) -> Result:
    attack = {"attack": {"name": "pgd", "repeats": repeats}} if kind == "attack" else {}
    indices = examples["index"].tolist()
    summary = (
        summarize_attack(examples, timing(indices))
        if kind == "attack"
        else summarize(examples, timing(indices), 1, kind, "unsound")
    )
    return Result(
        Path(folder),
        {"identity": identity(kind=kind, **attack) | changed, "about": {"paper": "unsound"}},
        examples,
        timing(indices),
        summary,
        None,
        True,
    )


def certified(
    kind: RunKind = "recovery",
    certified: Sequence[int] = (0, 1, 2),
    paper: Sequence[int] = (0, 3),
    wrong: Sequence[int] = (5,),
    **changed: Any,
) -> Result:
    """Return a certify run of six images, by the indices of those that something is true of."""
    examples = pd.DataFrame(
        {
            "index": range(6),
            "label": LABELS,
            "vanilla": LABELS,
            "prediction": [9 if index in wrong else LABELS[index] for index in range(6)],
            CERTIFIED[kind]: [index in certified for index in range(6)],
            "case": "agreed",
            "status": "ok",
        }
    )
    if kind != "detection":
        examples["paper_condition"] = examples["index"].isin(paper)
    if kind == "probable":
        examples["success_probability"] = 0.5
    return result(kind, examples, "certify", **changed)


def attacked(
    broken: Sequence[int] = (),
    alerted: Sequence[int] = (),
    only: Sequence[int] = range(6),
    wrong: Sequence[int] = (5,),
    share: float = 0.0,
    repeats: int = 1,
    folder: str = "attack",
    **changed: Any,
) -> Result:
    """Return an attack run on some of the six images."""
    rows = []
    for index in only:
        label = LABELS[index]
        clean = 9 if index in wrong else label
        rows.append(
            {
                "index": index,
                "label": label,
                "vanilla": label,
                "prediction": clean,
                "attacked_prediction": 8
                if index in broken
                else ALERT
                if index in alerted
                else clean,
                "broken": index in broken,
                "target": -1,
                "hit_target": False,
                "right_share": share if index in broken else float(clean == label),
                "tries": 1,
                "case": "any",
                "status": "ok",
            }
        )
    return result("attack", pd.DataFrame(rows), folder, repeats, **changed)


def test_certificates_are_below_and_attacks_above() -> None:
    both = compare(certified(), [attacked(broken=[4])])
    figures = (both.clean, both.certified, both.empirical, both.gap)
    assert [round(6 * share.value) for share in figures] == [5, 3, 4, 1]
    assert both.certified.value <= both.empirical.value
    assert both.certified_and_broken == []
    assert both.complaint() == ""
    check_consistent([both])


def test_an_image_is_broken_if_any_attack_broke_it() -> None:
    attacks = [attacked(broken=[4], folder="one"), attacked(broken=[3], only=[3, 4], folder="two")]
    both = compare(certified(), attacks)
    assert both.images.loc[both.images["broken"], "index"].tolist() == [3, 4, 5]
    assert both.empirical.value == 0.5
    assert both.lost[0].tolist() == [False, False, False, False, True, True]
    assert both.lost[1].tolist() == [False, False, False, True, False, False]


def test_only_attacked_images_count() -> None:
    both = compare(certified(), [attacked(only=[0, 3], broken=[3])])
    assert (both.count, both.certified.count) == (2, 2)
    assert (both.certified.value, both.empirical.value, both.gap.value) == (0.5, 0.5, 0.0)


def test_images_that_could_not_be_read_do_not_count() -> None:
    run, attack = certified(), attacked()
    run.examples.loc[0, "status"] = "corrupt"
    attack.examples.loc[1, "status"] = "corrupt"
    assert compare(run, [attack]).images["index"].tolist() == [2, 3, 4, 5]


def test_a_certified_image_that_is_broken_is_named_with_its_runs() -> None:
    attacks = [attacked(broken=[4], folder="fine"), attacked(broken=[1, 2, 4], folder="strong")]
    both = compare(certified(), attacks)
    assert both.certified_and_broken == [1, 2]
    assert both.complaint() == "certify certifies and strong breaks images 1, 2"
    with pytest.raises(RunError, match=r"BROKEN, which is a bug: .* strong breaks images 1, 2"):
        check_consistent([compare(certified(), [attacked()]), both])
    with pytest.raises(RunError, match=r"breaks image 0$"):
        check_sandwich(certified(), attacked(broken=[0]))
    assert isinstance(check_sandwich(certified(), attacked()), Sandwich)


def test_a_certified_image_that_is_wrong_without_a_patch_is_broken_too() -> None:
    assert compare(certified(), [attacked(wrong=[2])]).certified_and_broken == [2]


def test_what_only_the_paper_vouches_for_may_be_broken() -> None:
    both = check_sandwich(certified(), attacked(broken=[3]))
    assert both.paper == "unsound"
    assert both.paper_broken == [3]
    row = sandwich_table({"a run": both}).to_dict("records")[0]
    assert (row["paper_only"], row["paper_broken"], row["paper"]) == (1, 1, "unsound")
    assert (row["certified_images"], row["certified_and_broken"]) == (3, 0)
    assert (row["broken_images"], row["count"], row["gap"]) == (1, 6, pytest.approx(1 / 6))
    assert row["empirical_low"] < row["empirical"] < row["empirical_high"]


def test_an_alert_breaks_no_certificate_of_detection() -> None:
    both = check_sandwich(certified("detection"), attacked(alerted=[0, 1, 4]))
    assert both.empirical.value == pytest.approx(5 / 6)
    assert both.paper_broken == []
    with pytest.raises(RunError, match="breaks image 0"):
        check_sandwich(certified("detection"), attacked(broken=[0]))


@pytest.mark.parametrize(
    ("share", "repeats", "broken"),
    [
        (0.0, 1, False),  # one wrong answer happens with probability 0.1
        (0.0, 5, False),  # 1e-5
        (0.0, 7, True),  # 1e-7
        (0.855, 1000, False),  # 4e-6
        (0.85, 1000, True),  # 4e-7
    ],
)
def test_random_answers_break_a_certificate_only_beyond_doubt(
    share: float, repeats: int, broken: bool
) -> None:
    attack = attacked(broken=[0], share=share, repeats=repeats)
    both = compare(certified("probable"), [attack])
    assert both.certified_and_broken == ([0] if broken else [])


def test_one_unlucky_draw_of_a_clean_image_proves_nothing() -> None:
    attack = attacked(wrong=[0], repeats=1000)
    attack.examples.loc[0, "right_share"] = 0.95
    assert check_sandwich(certified("probable"), attack).certified_and_broken == []


def test_runs_on_something_else_are_not_joined() -> None:
    run = certified()
    other = {"name": "made", "split": "test", "count": 6, "indices_digest": "b"}
    for changed, name in (
        ({"defense": {"type": "Undefended"}}, "defense"),
        ({"threat": {"height": 3}}, "threat"),
        ({"image_size": [9, 9]}, "image size"),
        ({"model": {"digest": "d"}}, "model"),
        ({"dataset": other | {"digest": "other pixels"}}, "images"),
        ({"dataset": other | {"split": "train", "digest": "a"}}, "images"),
    ):
        attack = attacked(**changed)
        assert differences(run, attack) == [name]
        with pytest.raises(PatchproofError, match=f"got another {name}$"):
            compare(run, [attack])
    assert differences(run, attacked()) == []


def test_some_of_the_images_are_enough_if_their_labels_agree() -> None:
    dataset = {"name": "made", "split": "test", "digest": "x", "count": 2, "indices_digest": "y"}
    attack = attacked(only=[1, 2], dataset=dataset)
    assert differences(certified(), attack) == []
    attack.examples["label"] = [2, 1]
    assert differences(certified(), attack) == ["images"]
    far = replace(attack, examples=attack.examples.assign(index=[100, 101]))
    assert differences(certified(), far) == ["part of the images"]


def test_a_sandwich_takes_a_certify_run_and_attacks() -> None:
    with pytest.raises(PatchproofError, match="a certify run and at least one attack run"):
        compare(certified(), [])
    with pytest.raises(PatchproofError, match="a certify run and at least one attack run"):
        compare(attacked(), [attacked()])
    with pytest.raises(PatchproofError, match="expected an attack run, got one that certifies"):
        compare(certified(), [certified()])


def test_the_join_needs_tables_alone() -> None:
    run, attack = certified(), attacked(broken=[3, 4])
    images, lost = join(run.examples, "recovery", [lost_images(attack.examples)])
    assert images.columns.tolist() == [
        *("index", "label", "clean", "certified", "paper_only", "broken")
    ]
    assert images["broken"].tolist() == lost[0].tolist()
