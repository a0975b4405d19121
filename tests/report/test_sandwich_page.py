"""The page of certify runs with attacks on the same."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from patchproof.errors import RunError
from patchproof.evaluation.sandwich import compare, sandwich_table
from patchproof.evaluation.store import CERTIFIED, read_result
from patchproof.evaluation.summary import AttackSummary
from patchproof.report import ON_DARK, plots, write_report

MakeRun = Callable[..., Path]


class Text(HTMLParser):
    """The text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where to write a page; its plots are not drawn, to be quick."""
    monkeypatch.setattr(plots, "figure_png", lambda figure: b"")
    return tmp_path / "report.html"


def chosen(folder: Path, certified: bool) -> list[int]:
    """Return the images that are certified, or right but not certified."""
    result = read_result(folder)
    examples = result.examples
    promised = examples[CERTIFIED[result.kind]]
    right = examples["prediction"] == examples["label"]
    return [int(index) for index in examples.loc[right & (promised == certified), "index"]]


def test_the_true_accuracy_is_between_two_figures(
    make_run: MakeRun, make_attack: MakeRun, out: Path
) -> None:
    run = make_run("certified", count=50)
    open_images = chosen(run, certified=False)
    one = make_attack(run, "weak", open_images[:3])
    two = make_attack(run, "strong", open_images[2:8], attack={"name": "square"})
    both = compare(read_result(run), [read_result(one), read_result(two)])
    page = Text(write_report([run, one, two], out)).text
    section = page[page.index("Sandwich Attacks on") :]
    for share in (both.clean, both.certified, both.empirical, both.gap):
        assert f"{share.value:.1%} {share.low:.1%} to {share.high:.1%}" in section
    assert both.certified.value < both.empirical.value < both.clean.value
    assert "PatchCleanser, k=6 attacked by weak , strong" in section
    assert f"0 of {len(chosen(run, certified=True))}" in section
    assert "which is a bug" not in page


def test_a_broken_certificate_fails_when_the_page_is_written(
    make_run: MakeRun, make_attack: MakeRun, out: Path
) -> None:
    run = make_run("certified")
    broken = chosen(run, certified=True)[:2]
    attack = make_attack(run, "strong", broken)
    with pytest.raises(RunError) as caught:
        write_report([run, attack], out)
    words = f"{run} certifies and {attack} breaks images {broken[0]}, {broken[1]}"
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert f"Certified images are broken, which is a bug: {words}." in Text(out).text


def test_an_image_of_the_papers_condition_alone_may_be_broken(
    make_run: MakeRun, make_attack: MakeRun, out: Path
) -> None:
    run = make_run("certified", count=60, paper="unsound", certified=0.2, paper_beyond=0.2)
    open_images = chosen(run, certified=False)
    attack = make_attack(run, "strong", open_images)
    both = compare(read_result(run), [read_result(attack)])
    assert both.paper_broken
    assert f"{len(both.paper_broken)} of {len(both.paper_broken)}, not sound" in (
        Text(write_report([run, attack], out)).text
    )


def test_kinds_have_sandwiches_of_their_own(
    make_run: MakeRun, make_attack: MakeRun, out: Path
) -> None:
    recovery, detection = make_run("recovery"), make_run("detection", tau=0.8)
    attacks = [make_attack(recovery, "one"), make_attack(detection, "two")]
    text = Text(write_report([recovery, detection, *attacks], out)).text
    first = text.index("Certified recovery: shares of the attacked images")
    second = text.index("Certified detection: shares of the attacked images")
    assert "attacked by one" in text[first:second]
    assert "attacked by two" not in text[first:second]
    assert "attacked by two" in text[second:]
    assert "Broken, paper condition only" in text[first:second]
    assert "Broken, paper condition only" not in text[second:]


def test_runs_of_equal_names_keep_their_own_sandwich(
    make_run: MakeRun, make_attack: MakeRun, out: Path
) -> None:
    """The same defense of two networks, in folders whose last parts are equal."""
    folders = []
    for place, digest in (("shallow", "1" * 64), ("deep", "2" * 64)):
        run = make_run(f"{place}/certified", model={"spec": {"name": "net"}, "digest": digest})
        folders += [run, make_attack(run, f"{place}/attacked")]
    tables = out.parent / "tables"
    text = Text(write_report(folders, out, tables)).text
    names = [f"mnist, 5x5 square of 28x28: PatchCleanser, k=6 ({at})" for at in ("shallow", "deep")]
    assert all(f"{name} attacked by attacked" in text for name in names)
    assert pd.read_csv(tables / "sandwich-recovery.csv")["run"].tolist() == names


def test_an_attack_on_another_defense_is_not_joined_and_said_so(
    make_run: MakeRun, make_attack: MakeRun, out: Path
) -> None:
    run = make_run("certified")
    attack = make_attack(
        run, "elsewhere", chosen(run, certified=True), defense={"type": "Undefended"}
    )
    text = Text(write_report([run, attack], out)).text
    assert (
        "Not joined: mnist, 5x5 square of 28x28: Undefended under pgd is on another defense than "
        "mnist, 5x5 square of 28x28: PatchCleanser, k=6" in text
    )
    assert "attacked by" not in text


def test_attacks_alone_have_a_page(make_run: MakeRun, make_attack: MakeRun, out: Path) -> None:
    run = make_run("certified")
    broken = chosen(run, certified=False)[:2]
    attack = make_attack(run, "strong", broken, target=4)
    page = Text(write_report([attack], out))
    summary = read_result(attack).summary
    assert "Results of attacks" in page.text
    assert "Sandwich" not in page.text
    assert "A certificate is no promise" not in page.text
    assert "Published figures" not in page.text
    assert "pgd, steps 40, step size 0.05, places (search all)" in page.text
    assert isinstance(summary, AttackSummary)
    assert f"{summary.robust_accuracy.value:.1%} {summary.robust_accuracy.low:.1%}" in page.text
    assert "Hit target" in page.text


def test_patches_that_succeed_and_fail_are_shown(
    make_run: MakeRun, make_attack: MakeRun, out: Path
) -> None:
    run = make_run("certified")
    broken = chosen(run, certified=False)[:2]
    page = Text(write_report([make_attack(run, "strong", broken)], out))
    succeed, _, fail = page.text.partition("Patches that fail")
    succeed = succeed[succeed.index("Patches that succeed") :]
    rows = read_result(run).examples.set_index("index")
    for index in broken:
        label = rows.loc[index, "label"]
        assert f"class-{label} → class-{(label + 1) % 10} (image {index})" in succeed
        assert f"(image {index})" not in fail
    assert fail.count("(image ") == 3
    assert page.source.count('<rect x="3" y="2" width="5" height="5" class="place"/>') == 5
    assert (
        "Patches that"
        not in Text(write_report([make_attack(run, "unseen", broken, gallery=False)], out)).text
    )


def test_the_bars_end_where_the_accuracies_are(make_run: MakeRun, make_attack: MakeRun) -> None:
    run = make_run("certified", count=50)
    attack = make_attack(run, "strong", chosen(run, certified=False)[:4])
    both = compare(read_result(run), [read_result(attack)])
    figure = plots.sandwich_figure(sandwich_table({"a run": both, "again": both}), ON_DARK)
    (axes,) = figure.axes
    ends = [
        [round(bar.get_x() + bar.get_width(), 6) for bar in bars] for bars in axes.containers[:3]
    ]
    expected = [both.certified.value, both.empirical.value, both.clean.value]
    assert ends == [[pytest.approx(value)] * 2 for value in expected]
    assert {"a run", "again"} <= {text.get_text() for text in axes.texts}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["certified", "gap", "broken by a patch"]
