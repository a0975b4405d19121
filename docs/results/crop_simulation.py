"""Draw crop_simulation.png: how often random crops are right under a patch, stated and simulated.

python docs/results/crop_simulation.py

Votes of all 529 crops of 10x10 pixels in an image of 32x32 pixels are made up, in four ways. A
5x5 patch at the centre meets 196 of the crops and makes them vote for one other class. Many times
128 crops are drawn and the most votes counted, with and without the patch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import patchproof as pp
from patchproof.aggregation.crop_votes import count_votes, majority, votes_to_turn
from patchproof.defenses.randomized_cropping import CropLabels
from patchproof.report.plots import ON_LIGHT, style

SIZE = (32, 32)
CROP = 10
CENTRE = pp.SquarePatch(5, pp.Box(13, 13, 5, 5))


@dataclass(frozen=True)
class Case:
    """How the crops vote.

    Attributes:
        title: in the figure.
        classes: C; the label is the last, so that it loses ties.
        replacement: of the draws.
        on_label: all crops that the patch meets vote for the label, as far as it has votes;
            otherwise these vote as the others do.
    """

    title: str
    classes: int
    replacement: bool
    on_label: bool


CASES = (
    Case("two classes; the patch meets votes for the label", 2, True, True),
    Case("two classes; the patch meets votes as elsewhere", 2, True, False),
    Case("five classes; the patch meets votes for the label", 5, True, True),
    Case("two classes, without replacement; as top left", 2, False, True),
)


def votes_of(case: Case, share: float, met: Tensor) -> Tensor:
    """Return what each place votes for, (V,) int64.

    Args:
        case: how the crops vote.
        share: of the places that vote for the label.
        met: (V,) bool, which places the patch meets.
    """
    first = met.sort(descending=True, stable=True).indices
    parts = (first,) if case.on_label else torch.split(first, [int(met.sum()), int((~met).sum())])
    labels = torch.empty(len(met), dtype=torch.int64)
    for part in parts:
        own = round(share * len(part))
        labels[part[:own]] = case.classes - 1
        labels[part[own:]] = torch.arange(len(part) - own) % (case.classes - 1)
    return labels


def measure(case: Case, shares: list[float], draws: int, seed: int) -> dict[str, Tensor]:
    """Return stated and simulated probabilities, (S,) each, and of p_c a (S, draws) sample."""
    defense = pp.RandomizedCropping(
        nn.Identity().eval(),
        CENTRE,
        image_size=SIZE,
        crop_size=CROP,
        mode="random-crops",
        replacement=case.replacement,
    )
    places = defense.places
    generator = np.random.default_rng(seed)
    corners = places.corners(torch.arange(places.count))
    met = ((corners > 13 - CROP) & (corners < 13 + 5)).all(1)
    assert int(met.sum()) == defense.overlapping == 196
    labels = torch.stack([votes_of(case, share, met) for share in shares])
    right = torch.full((len(shares),), case.classes - 1)
    found = CropLabels(labels, torch.ones(labels.shape), torch.zeros_like(right), case.classes)
    once = places.draw(len(shares), defense.crops, case.replacement, generator)
    result = defense.certify_votes(found, right, once)
    assert isinstance(result, pp.ProbableCertification)
    stated, simulated = [], []
    for votes in labels:
        clean, attacked = (
            places.draw(draws, defense.crops, case.replacement, generator) for _ in range(2)
        )
        counts = count_votes(votes[clean], case.classes)[:, : case.classes]
        sound = counts.argmax(1) == case.classes - 1
        stated.append(defense.paper_chances[votes_to_turn(counts) - 1] * sound)
        turned = torch.where(met, 0, votes)
        said = majority(turned[attacked], case.classes)
        simulated.append((said == case.classes - 1).double().mean())
    return {
        "bound": result.success_probability,
        "p_c": torch.stack(stated),
        "simulated": torch.stack(simulated),
    }


def draw(measured: list[dict[str, Tensor]], shares: list[float]) -> Figure:
    """Draw one panel for each case."""
    with style(ON_LIGHT):
        figure = Figure(figsize=(9.0, 6.4), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for axes, case, values in zip(panels.flat, CASES, measured, strict=True):
            bound, stated, dots, *_ = ON_LIGHT.series
            low, high = values["p_c"].quantile(torch.tensor([0.05, 0.95]).double(), dim=1)
            band = "p_c of nine draws in ten"
            axes.fill_between(shares, low, high, color=stated, alpha=0.2, linewidth=0, label=band)
            axes.plot(
                shares, values["p_c"].mean(1), "--", color=stated, label="p_c, mean over draws"
            )
            axes.plot(shares, values["bound"], color=bound, label="bound (random-crops)")
            axes.plot(
                shares, values["simulated"], "o", color=dots, markersize=4.5, label="simulated"
            )
            axes.axhline(0.95, color=ON_LIGHT.text, linewidth=0.8, linestyle=":")
            axes.set_title(case.title, fontsize=10)
            axes.grid(True)
        for axes in panels[1]:
            axes.set_xlabel("share of all crops that vote for the label")
        for axes in panels[:, 0]:
            axes.set_ylabel("probability of the label")
        panels[0, 0].legend(loc="upper left", fontsize=9)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--draws", type=int, default=20_000, help="of each kind, at each share")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shares = [step / 40 for step in range(22, 41)]
    measured = [measure(case, shares, arguments.draws, arguments.seed) for case in CASES]
    draw(measured, shares).savefig(Path(__file__).with_suffix(".png"), dpi=120)
    for case, values in zip(CASES, measured, strict=True):
        print(case.title)
        print("share  p_c mean  draws with p_c >= 0.95  bound  simulated")
        for at, share in enumerate(shares):
            stated = values["p_c"][at]
            print(
                f"{share:5.3f}  {stated.mean():8.3f}  {(stated >= 0.95).double().mean():22.3f}"
                f"  {values['bound'][at]:5.3f}  {values['simulated'][at]:9.3f}"
            )
        away = (values["bound"] - values["simulated"]).abs().max()
        print(f"bound and simulation differ by at most {away:.3f}")
