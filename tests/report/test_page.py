import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from patchproof.errors import PatchproofError, RunError
from patchproof.evaluation.store import read_result
from patchproof.evaluation.summary import DetectionSummary
from patchproof.report import plots, write_report

MakeRun = Callable[..., Path]
NONE = "\N{EN DASH}"


class Page(HTMLParser):
    """The text of a page, its tags, and every address in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.unnamed: list[str] = []
        self._pieces: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub(r" ([,:)])", r"\1", " ".join(" ".join(self._pieces).split()))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [
            values[name] or "" for name in ("src", "href", "srcset", "xlink:href") if name in values
        ]
        self.ids += [value for name, value in attrs if name == "id" and value]
        if (tag == "img" and not values.get("alt")) or (
            tag == "svg" and not values.get("aria-label")
        ):
            self.unnamed.append(tag)

    def handle_data(self, data: str) -> None:
        self._pieces.append(data)


def report(out: Path, *folders: Path) -> Page:
    return Page(write_report(folders, out))


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where to write a page; its plots are not drawn, to be quick."""
    monkeypatch.setattr(plots, "figure_png", lambda figure: b"")
    return tmp_path / "report.html"


def test_the_page_needs_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    page = report(tmp_path / "report.html", make_run("a"), make_run("b", budget=3))
    assert page.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    local = {address[1:] for address in page.addresses if address.startswith("#")}
    assert local <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "@import" not in page.source
    assert "url(" not in page.source


def test_pictures_have_words_and_tables_have_headers(make_run: MakeRun, out: Path) -> None:
    page = report(out, make_run())
    assert not page.unnamed
    assert page.tags.count("caption") == page.tags.count("table") > 2
    assert all("<th scope=" in table for table in page.source.split("<table>")[1:])
    assert page.source.count("<!doctype html>") == 1
    assert '<html lang="en">' in page.source


def test_figures_are_those_of_the_summary(make_run: MakeRun, out: Path) -> None:
    folder = make_run(count=37, corrupt=2)
    summary = read_result(folder).summary
    page = report(out, folder)
    for accuracy in (
        summary.vanilla_accuracy,
        summary.clean_accuracy,
        summary.certified_accuracy,
        summary.paper_accuracy,
    ):
        hits = round(accuracy.value * 35)
        expected = rf"{accuracy.value:.1%} {accuracy.low:.1%} to {accuracy.high:.1%} {hits} of 35"
        assert expected in page.text
    assert f"{summary.forwards_per_image:,.1f} model forwards per image" in page.text
    assert f"{summary.images_per_second:,.1f} images/s" in page.text
    assert all(f"{case} {count}" in page.text for case, count in summary.cases.items())


def test_a_run_of_features_says_what_it_looks_at(make_run: MakeRun, out: Path) -> None:
    words = "256 local features of 7x7 pixels, stride 2, windows of 6x6"
    folder = make_run(paper="unsound", defense_words=words)
    manifest = json.loads((folder / "manifest.json").read_text())
    defense = manifest["identity"]["defense"]
    for name in ("masks", "masks_per_side", "multiplicity", "inference"):
        del defense[name]
    defense |= {"type": "PatchGuard", "ablation": None, "bands": 1, "feature": "logits"}
    defense |= {"threshold": 0.2, "window": [6, 6], "high": 1e6}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    page = report(out, folder)
    assert "PatchGuard, logits, window 6, T 0.2" in page.text
    assert f"PatchGuard; {words}; certificates hold if rounding moves" in page.text
    assert "hidden pixels" not in page.text
    assert "Paper condition (not sound)" in page.text
    assert "not sound" in page.source.partition("</table>")[0]


def test_a_dash_where_the_paper_states_no_condition(make_run: MakeRun, out: Path) -> None:
    page = report(out, make_run("one", paper=None), make_run("two"))
    first, _, rest = page.source.partition("</table>")
    assert first.count(f'<td class="number">{NONE}</td>') == 1
    assert rest.count("What the paper&#39;s criterion states") == 1


def test_the_threat_is_said_with_its_pixels_and_their_space(make_run: MakeRun, out: Path) -> None:
    text = report(out, make_run(side=5, size=28, budget=6)).text
    assert "One square of 5x5 pixels with any content, anywhere on the image." in text
    assert "The image has 28x28 pixels: the patch hides up to 3.19% of them" in text
    assert "576 possible places" in text
    assert "36 masks of 8x8 pixels; budget 6 per side; multiplicity 1" in text
    assert "weights 0123456789ab" in text


def test_what_certified_means_is_said(make_run: MakeRun, out: Path) -> None:
    text = report(out, make_run()).text
    assert "deterministic certified recovery" in text
    assert "no promise against any other attack" in text
    assert "paper condition certified" not in text.lower()


def test_text_from_outside_is_escaped(make_run: MakeRun, out: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&"
    page = report(
        out,
        make_run(
            dataset=hostile,
            class_names=[hostile] * 10,
            dataset_note=hostile,
            model_card={hostile: hostile},
            command=[hostile],
            device=hostile,
        ),
    )
    assert "script" not in page.tags
    assert "<script" not in page.source
    assert hostile in page.text


def test_a_note_on_the_data_stands_by_the_figures(make_run: MakeRun, out: Path) -> None:
    page = report(out, make_run(dataset_note="Re-compressed as JPEG."))
    assert "40 images. Re-compressed as JPEG." in page.text
    assert "Data of this run: Re-compressed as JPEG." in page.text


def test_an_unfinished_run_and_corrupt_images_are_flagged(make_run: MakeRun, out: Path) -> None:
    text = report(out, make_run(count=40, done=12, corrupt=1, finish=False)).text
    assert "Unfinished run: 12 of 40 images have a result." in text
    assert "1 image could not be read and is in no accuracy." in text


def test_a_run_stopped_before_its_summary_is_flagged(make_run: MakeRun, out: Path) -> None:
    assert "Unfinished run: every image has a result" in report(out, make_run(finish=False)).text


def test_a_finished_run_is_not_flagged(make_run: MakeRun, out: Path) -> None:
    text = report(out, make_run()).text
    assert "Unfinished" not in text
    assert "could not be read" not in text


def test_published_figures_stand_beside_with_their_caveats(make_run: MakeRun, out: Path) -> None:
    mnist = report(out, make_run("mnist", dataset="mnist")).text
    assert f"IBP 62.0% {NONE} 92.9% 5x5 square of 28x28 IBP, Table 2" in mnist
    assert "Another coordinate space" not in mnist
    cifar = report(out, make_run("cifar", dataset="cifar10", size=32)).text
    assert f"PC-ResNet 78.8% {NONE} 97.8% 2.4% square of 224x224 PatchCleanser, Table 2" in cifar
    assert "Another coordinate space: some rows count the patch on images resized to" in cifar
    assert "pre-trained on ImageNet" in cifar


def test_detection_and_probable_figures_do_not_share_the_column(
    make_run: MakeRun, out: Path
) -> None:
    text = report(out, make_run(dataset="cifar10", size=32)).text
    assert f"Minority Reports {NONE} 62.1% detection" in text
    assert re.search(rf"Randomized cropping [\w ]+ {NONE} 55.0% probabilistic", text)


def test_a_size_of_a_data_set_is_that_data_set(make_run: MakeRun, out: Path) -> None:
    folder = make_run(dataset="imagenette160", side=32, size=224, count=4)
    assert "94.4%" in report(out, folder).text


def test_a_data_set_without_published_figures_says_so(make_run: MakeRun, out: Path) -> None:
    assert "None of the published figures" in report(out, make_run(dataset="mine")).text


def test_budgets_are_drawn_for_runs_that_differ_in_nothing_else(
    make_run: MakeRun, out: Path
) -> None:
    pictures = 'class="plot"'
    two = [make_run("k6", budget=6), make_run("k3", budget=3)]
    assert report(out, *two).source.count(pictures) == 2
    other_data = [two[0], make_run("cifar", dataset="cifar10", size=32, budget=3)]
    assert report(out, *other_data).source.count(pictures) == 1
    assert report(out, two[0]).source.count(pictures) == 1


def test_a_detector_is_labelled_as_one(make_run: MakeRun, out: Path) -> None:
    folder = make_run(tau=0.8)
    summary = read_result(folder).summary
    assert isinstance(summary, DetectionSummary)
    page = report(out, folder)
    assert "deterministic certified detection" in page.text
    assert "deterministic certified recovery" not in page.text
    assert "MinorityReports, k=6, tau 0.8" in page.text
    assert "with a confidence of at least 0.8" in page.text
    for share in (summary.certified_detection_accuracy, summary.alert_rate):
        hits = round(share.value * 40)
        assert f"{share.value:.1%} {share.low:.1%} to {share.high:.1%} {hits} of 40" in page.text
    assert "Paper condition" not in page.text
    assert re.search(rf"This run MinorityReports[\w=, .]+ {NONE} [\d.]+% detection", page.text)
    assert "defended alert ✗" in page.text
    assert "not certified detection" in page.text
    assert "two masks" not in page.text


def test_the_trade_off_is_drawn_once_for_runs_that_differ_in_tau(
    make_run: MakeRun, out: Path
) -> None:
    pictures = 'class="plot"'
    one = make_run("one", tau=0.8)
    assert report(out, one).source.count(pictures) == 2
    runs = [one, make_run("other", tau=0.6), make_run("recovery")]
    page = report(out, *runs)
    assert page.source.count(pictures) == 3, "accuracies of each kind, and one trade-off"
    assert page.source.count("at every tau from 0 to 1") == 1
    assert "Recovery, hollow, is the stronger promise" in page.text
    elsewhere = make_run("cifar", dataset="cifar10", size=32, tau=0.8)
    assert report(out, one, elsewhere).source.count("at every tau from 0 to 1") == 2


def test_kinds_have_tables_of_their_own(make_run: MakeRun, out: Path) -> None:
    page = report(out, make_run("recovery"), make_run("detection", tau=0.8))
    text = page.text
    recovery, detection = text.index("Results Accuracies"), text.index("Results of detection")
    between = text[recovery:detection]
    assert "Certified Paper condition Clean Vanilla" in between
    assert "MinorityReports" not in between
    assert "Certified detection Clean Alert Vanilla" in text[detection:]
    assert {"run-1", "run-2"} <= set(page.ids)


def test_equal_runs_are_told_apart_by_their_folders(make_run: MakeRun, out: Path) -> None:
    text = report(out, make_run("first"), make_run("second")).text
    assert "PatchCleanser, k=6 (first)" in text
    assert "PatchCleanser, k=6 (second)" in text


def test_each_example_says_how_it_was_decided(make_run: MakeRun, out: Path) -> None:
    folder = make_run(images=np.full((6, 3, 28, 28), 200))
    result = read_result(folder)
    page = report(out, folder)
    assert result.gallery is not None
    for index in result.gallery.index:
        row = result.examples.set_index("index").loc[index]
        right = "✓" if row["prediction"] == row["label"] else "✗"
        expected = (
            rf"class-{row['label']} \(image {index}\): undefended class-{row['vanilla']} ., "
            rf"defended class-{row['prediction']} {right} \({row['case']}\), "
            rf"{'' if row['certified'] else 'not '}certified"
        )
        assert re.search(expected, page.text)
    assert page.tags.count("svg") == 4 * len(result.gallery.index)
    assert 'class="crisp"' in page.source


def test_the_masks_are_drawn_where_they_are_with_their_fill(make_run: MakeRun, out: Path) -> None:
    source = report(out, make_run(side=5, size=28, budget=2)).source
    # Two masks of 16 pixels a side; the second starts at the last place that fits.
    assert '<rect x="0" y="0" width="16" height="16" fill="rgb(128 128 128)"' in source
    assert "M12 12h16v16h-16z" in source


def test_a_run_without_masks_or_gallery_has_a_page(make_run: MakeRun, out: Path) -> None:
    folder = make_run()
    (folder / "gallery.npz").unlink()
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(
        re.sub(r'"masks": \[.*?\]\s*\],', "", manifest, flags=re.S)
    )
    text = report(out, folder).text
    assert "Mask set" not in text
    assert "Examples" not in text


def test_how_it_was_made_is_said(make_run: MakeRun, out: Path) -> None:
    text = report(out, make_run()).text
    assert "patchproof certify --data mnist --out 'a run'" in text
    assert "patchproof 0.1.0, python 3.12.1, torch 2.6.0" in text
    assert "CPU, 2 threads" in text
    assert '"recipe": "cutout"' in text


def test_bad_folders_are_named(make_run: MakeRun, out: Path, tmp_path: Path) -> None:
    run = make_run()
    with pytest.raises(PatchproofError, match="at least one results folder, got none"):
        write_report([], out)
    with pytest.raises(PatchproofError, match="got no such folder"):
        write_report([run, tmp_path / "absent"], out)
    (tmp_path / "other").mkdir()
    with pytest.raises(PatchproofError, match="expected a results folder"):
        write_report([tmp_path / "other"], out)
    with pytest.raises(PatchproofError, match="distinct results folders"):
        write_report([run, run], out)
    with pytest.raises(PatchproofError, match="without a finished image"):
        write_report([make_run("empty", done=0, finish=False)], out)
    with pytest.raises(PatchproofError, match="got the folder"):
        write_report([run], tmp_path / "other")
    assert not out.exists()


def test_a_manifest_without_what_decides_is_an_error(make_run: MakeRun, out: Path) -> None:
    run = make_run()
    (run / "manifest.json").write_text('{"format": "patchproof-result/1", "identity": {}}')
    with pytest.raises(PatchproofError, match="expected the identity of a run, got one without"):
        write_report([run], out)


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    make_run: MakeRun, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.write_text("old")
    before = set(out.parent.iterdir())

    def no_space(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    run = make_run()
    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(RunError, match="No space left on device"):
        write_report([run], out)
    assert out.read_text() == "old"
    assert set(out.parent.iterdir()) - before == {run}
