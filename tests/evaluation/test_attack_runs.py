"""A run of attacks writes what the deployed ``predict`` says, and goes on after any stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from halves import BrighterHalf, make_defense, make_detector, make_halves
from torch import Tensor

from patchproof import PatchproofError, RunError, SquarePatch, Undefended, Verdict
from patchproof.attacks import PatchPGD, PlaceSearch, PrintablePatch, UniversalAttack, Victim
from patchproof.datasets import ImageDataset
from patchproof.evaluation import attack as attack_module
from patchproof.evaluation import attack_dataset, certify_dataset, read_result
from patchproof.evaluation.attack import AttackProgress
from patchproof.evaluation.sandwich import check_sandwich
from patchproof.evaluation.store import read_attacked
from patchproof.results import ALERT

ATTACK = PatchPGD(places=PlaceSearch("all"), steps=1, step_size=1.0)
FEW = PatchPGD(places=PlaceSearch("trial", count=4), steps=2, step_size=0.5)


def undefended() -> Undefended:
    return Undefended(BrighterHalf().eval(), SquarePatch(2), image_size=(8, 8))


def can_be_broken(image: Tensor, label: int) -> bool:
    """Whether some 2x2 patch makes the other half brighter, by trying the best one everywhere."""
    worst = -float("inf")
    for top in range(7):
        for left in range(7):
            patched = image.clone()
            for column in (left, left + 1):
                patched[:, top : top + 2, column] = float((column >= 4) != bool(label))
            halves = patched[:, :, :4].mean(), patched[:, :, 4:].mean()
            worst = max(worst, float(halves[1 - label] - halves[label]))
    return worst > 0


def test_a_linear_model_is_broken_exactly_where_it_can_be(
    halves: ImageDataset, tmp_path: Path
) -> None:
    summary = attack_dataset(undefended(), halves, ATTACK, tmp_path / "run")
    result = read_result(tmp_path / "run")
    assert result.kind == "attack"
    expected = [
        clean == label and can_be_broken(halves.image(position), label)
        for position, (clean, label) in enumerate(
            zip(result.examples["prediction"], halves.labels.tolist(), strict=True)
        )
    ]
    assert result.examples["broken"].tolist() == expected
    assert 0 < sum(expected) < 18
    assert summary.robust_accuracy.value == pytest.approx(
        summary.clean_accuracy.value - sum(expected) / 20
    )
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary.to_dict()
    assert result.summary == summary
    cases = result.examples["case"]
    assert (cases == "broken").tolist() == expected
    assert set(cases) == {"wrong", "broken", "held"}
    tried = result.examples.loc[cases == "held"]
    assert (tried["tries"] == 49).all()
    assert tried["regions"].map(json.loads).map(lambda boxes: boxes[0][2:] == [2, 2]).all()


def test_what_is_kept_to_look_at_differs_in_the_patch_alone(
    halves: ImageDataset, tmp_path: Path
) -> None:
    attack_dataset(undefended(), halves, ATTACK, tmp_path, gallery=4)
    kept = read_attacked(tmp_path)
    assert kept is not None
    assert sorted(kept.broken.tolist()) == [False, False, True, True]
    changed = (kept.image != kept.attacked).reshape(4, -1).sum(1)
    assert ((changed > 0) & (changed <= 4)).all()


def test_a_stopped_run_goes_on_to_equal_tables(
    halves: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attack_module, "BLOCK", 6)
    attack = PatchPGD(places=PlaceSearch("random", count=2), steps=2)
    attack_dataset(make_defense(), halves, attack, tmp_path / "whole")

    def stop(now: AttackProgress) -> None:
        if now.done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack_dataset(make_defense(), halves, attack, tmp_path / "run", progress=stop)
    assert not (tmp_path / "run/summary.json").exists()
    assert len(read_result(tmp_path / "run").examples) == 12
    seen: list[AttackProgress] = []
    attack_dataset(make_defense(), halves, attack, tmp_path / "run", progress=seen.append)
    assert seen[0].done == 12
    assert seen[-1].done == 20
    whole, run = read_result(tmp_path / "whole"), read_result(tmp_path / "run")
    assert run.examples.equals(whole.examples)
    with pytest.raises(PatchproofError, match="another run"):
        attack_dataset(make_defense(), halves, ATTACK, tmp_path / "run")


def test_an_attacker_who_knows_the_model_alone_breaks_fewer(
    halves: ImageDataset, tmp_path: Path
) -> None:
    for knowledge in ("defense", "model"):
        attack_dataset(make_defense(), halves, FEW, tmp_path / knowledge, knowledge=knowledge)
    aware = read_result(tmp_path / "defense").examples["broken"]
    unaware = read_result(tmp_path / "model").examples["broken"]
    assert aware.sum() >= unaware.sum()
    assert aware.any()


def test_a_victim_knows_where_there_is_no_certificate(halves: ImageDataset) -> None:
    defense = make_defense()
    pixels, labels = halves.tensors()
    victim = Victim.of_defense(defense)
    assert victim.open_regions is not None
    verdicts = defense.certify(pixels / 255, labels, stop="never").region_verdicts()
    is_open = victim.open_regions(pixels / 255, labels)
    assert is_open.tolist() == (verdicts != Verdict.HOLDS).tolist()
    assert 0 < is_open.float().mean() < 1
    assert Victim.of_defense(undefended()).open_regions is None


@pytest.mark.parametrize("make", [make_defense, make_detector], ids=lambda make: make.__name__)
def test_no_certified_image_is_broken(halves: ImageDataset, tmp_path: Path, make: object) -> None:
    assert callable(make)
    certify_dataset(make(), halves, tmp_path / "certified")
    attack_dataset(make(), halves, FEW, tmp_path / "attacked")
    both = check_sandwich(read_result(tmp_path / "certified"), read_result(tmp_path / "attacked"))
    assert 0 < both.certified.value <= both.empirical.value
    assert both.certified_and_broken == []


def test_an_alert_breaks_nothing(halves: ImageDataset, tmp_path: Path) -> None:
    attack_dataset(make_detector(tau=0.5), halves, FEW, tmp_path)
    examples = read_result(tmp_path).examples
    alerted = examples["attacked_prediction"] == ALERT
    assert alerted.any()
    assert not examples.loc[alerted, "broken"].any()


def test_a_target_has_a_column_of_its_own(halves: ImageDataset, tmp_path: Path) -> None:
    summary = attack_dataset(undefended(), halves, ATTACK, tmp_path, target=1)
    examples = read_result(tmp_path).examples
    assert (examples["target"] == 1).tolist() == (halves.labels == 0).tolist()
    hit = examples["hit_target"]
    assert hit.tolist() == (examples["broken"] & (examples["target"] == 1)).tolist()
    assert summary.hit_target is not None
    assert summary.hit_target.count == int((halves.labels == 0).sum())


def test_an_alert_hits_no_target(halves: ImageDataset, tmp_path: Path) -> None:
    """Neither where none is wanted, nor where the label is the class that is wanted."""
    for name, target in (("any", None), ("one", 1)):
        attack_dataset(make_detector(tau=0.5), halves, FEW, tmp_path / name, target=target)
        examples = read_result(tmp_path / name).examples
        alerted = examples["attacked_prediction"] == ALERT
        assert (alerted & (examples["target"] < 0)).any()
        assert not examples.loc[alerted, "hit_target"].any()


def test_only_the_attackers_forwards_are_counted(halves: ImageDataset, tmp_path: Path) -> None:
    """Not those of the predictions of a defense that looks at many masked images."""
    for name, defense in (("defended", make_defense()), ("bare", undefended())):
        attack_dataset(defense, halves, ATTACK, tmp_path / name, knowledge="model")
    defended, bare = (read_result(tmp_path / name).timing for name in ("defended", "bare"))
    assert defended["forwards"].equals(bare["forwards"])


@pytest.mark.parametrize("gallery", [1, 3])
def test_as_many_are_kept_to_look_at_as_were_asked_for(
    halves: ImageDataset, tmp_path: Path, gallery: int
) -> None:
    attack_dataset(undefended(), halves, ATTACK, tmp_path, gallery=gallery)
    kept = read_attacked(tmp_path)
    assert kept is not None
    assert len(kept.index) == gallery


def test_a_corrupt_image_is_left_out(tmp_path: Path) -> None:
    summary = attack_dataset(undefended(), make_halves(broken=frozenset({3})), ATTACK, tmp_path)
    assert (summary.count, summary.corrupt) == (19, 1)


def test_mistakes_are_told(halves: ImageDataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(PatchproofError, match="class from 0 to 1, got 2"):
        attack_dataset(undefended(), halves, ATTACK, run, target=2)
    content, mask = torch.zeros(1, 3, 3), torch.ones(3, 3, dtype=torch.bool)
    pasted = UniversalAttack(patch=PrintablePatch(content, mask))
    with pytest.raises(PatchproofError, match="expected the 2x2 pixels of the threat, got 3x3"):
        attack_dataset(undefended(), halves, pasted, run)
    certify_dataset(make_defense(), halves, tmp_path / "certified")
    certified = read_result(tmp_path / "certified")
    with pytest.raises(PatchproofError, match="certificates of what is attacked"):
        attack_dataset(undefended(), halves, ATTACK, run, against=certified)
    assert not run.exists()
    attack_dataset(make_defense(), halves, ATTACK, run, against=certified)
    with pytest.raises(PatchproofError, match="expected a run that certifies"):
        attack_dataset(make_defense(), halves, ATTACK, tmp_path / "other", against=read_result(run))


def test_a_certificate_that_an_attack_breaks_fails_loudly(
    halves: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defense = make_defense()
    certify_dataset(defense, halves, tmp_path / "certified")
    monkeypatch.setattr(defense, "predict", lambda images: 1 - BrighterHalf()(images).argmax(1))
    attack_dataset(defense, halves, FEW, tmp_path / "attacked")
    with pytest.raises(RunError, match="CERTIFIED IMAGES ARE BROKEN"):
        check_sandwich(read_result(tmp_path / "certified"), read_result(tmp_path / "attacked"))
