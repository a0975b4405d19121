"""The sandwich: certificates from below, attacks from above, image by image.

The share of images that the defense answers right under every attack that the threat allows lies
between the certified accuracy and the accuracy under the attacks that were tried. A certified image
that an attack broke is in no sandwich: it is a bug of the certificate, or of the attack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy.stats import binom

from patchproof.errors import PatchproofError, RunError
from patchproof.evaluation.store import CERTIFIED, Result, RunKind
from patchproof.evaluation.summary import Proportion
from patchproof.results import Paper

SIGNIFICANCE = 1e-6
"""An image is broken where predictions are drawn at random if so few right ones have at most this
probability."""

_SHOWN = 10
"""Images that an error names."""


@dataclass(frozen=True, eq=False)
class Sandwich:
    """What a certify run and attacks on the same defense, threat and images say together.

    Accuracies are over the images that have a certify result and were attacked.

    Attributes:
        certify: the run that certifies.
        attacks: the runs that attack, at least one.
        images: one row an image, by ascending index: ``index``, ``label``, and as bool ``clean``
            (the defense is right on the clean image), ``certified`` (by the certificate of the
            run's kind), ``paper_only`` (it meets the paper's condition, but has no certificate)
            and ``broken``.
        lost: (images, attacks) bool, by the same index: what each attack broke; False where it did
            not attack.
    """

    certify: Result
    attacks: tuple[Result, ...]
    images: pd.DataFrame
    lost: pd.DataFrame

    @property
    def kind(self) -> RunKind:
        """What the certificates promise."""
        return self.certify.kind

    @property
    def paper(self) -> Paper | None:
        """Whether the criterion of the defense's paper is sound; None where it states none."""
        return getattr(self.certify.summary, "paper", None)

    @property
    def count(self) -> int:
        """How many images were attacked."""
        return len(self.images)

    @property
    def clean(self) -> Proportion:
        """The defense is right on the clean image, of detection without an alert."""
        return self._share(self.images["clean"])

    @property
    def certified(self) -> Proportion:
        """The lower bound: the images with a certificate."""
        return self._share(self.images["certified"])

    @property
    def empirical(self) -> Proportion:
        """The upper bound: the images that no attack broke."""
        return self._share(~self.images["broken"])

    @property
    def gap(self) -> Proportion:
        """The images of which it is not known: neither certified nor broken."""
        return self._share(~self.images["certified"] & ~self.images["broken"])

    @property
    def certified_and_broken(self) -> list[int]:
        """The indices of the images that are certified and were broken: a bug."""
        return self._indices(self.images["certified"] & self.images["broken"])

    @property
    def paper_broken(self) -> list[int]:
        """The indices of the broken images that only the paper's condition vouched for."""
        return self._indices(self.images["paper_only"] & self.images["broken"])

    def complaint(self) -> str:
        """Name the runs and images that contradict each other; empty where none do."""
        certified = self.images["certified"].to_numpy()
        parts = []
        for attack, column in zip(self.attacks, self.lost, strict=True):
            if found := self._indices(certified & self.lost[column].to_numpy()):
                images = ", ".join(map(str, found[:_SHOWN]))
                more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
                parts.append(
                    f"{self.certify.folder} certifies and {attack.folder} breaks image"
                    f"{'' if len(found) == 1 else 's'} {images}{more}"
                )
        return "; ".join(parts)

    def _share(self, hits: pd.Series[bool]) -> Proportion:
        return Proportion.of(int(hits.sum()), self.count)

    def _indices(self, rows: Any) -> list[int]:
        return [int(index) for index in self.images.loc[rows, "index"]]


def differences(certify: Result, attack: Result) -> list[str]:
    """Say in what an attack run is not about the same as a certify run; nothing where it is.

    The attacked images may be others of the same data set, as long as some are in both runs.
    """
    ours, theirs = certify.manifest["identity"], attack.manifest["identity"]
    found = _other_things(ours, theirs)
    mine, other = ours["dataset"], theirs["dataset"]
    labels = _read(certify)["label"]
    both = labels.index.intersection(_read(attack).index)
    if "images" not in found and (
        (mine["indices_digest"] == other["indices_digest"] and mine["digest"] != other["digest"])
        or (labels[both] != _read(attack).loc[both, "label"]).any()
    ):
        found.append("images")
    elif both.empty and "images" not in found:
        found.append("part of the images")
    return found


def check_comparable(certify: Result, attack: Mapping[str, Any]) -> None:
    """Raise ``PatchproofError`` unless a run certifies what an attack of this identity is on.

    Which images are in both is for ``compare`` to say.
    """
    if certify.kind == "attack":
        raise PatchproofError(f"{certify.folder}: expected a run that certifies, got an attack")
    # as a manifest gives it back
    if found := _other_things(certify.manifest["identity"], json.loads(json.dumps(attack))):
        raise PatchproofError(
            f"{certify.folder}: expected certificates of what is attacked, got those of another "
            f"{' and another '.join(found)}"
        )


def _other_things(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Say in what two identities differ, as far as they tell without their images."""
    found = [
        name.replace("_", " ")
        for name in ("defense", "threat", "image_size", "model")
        if ours[name] != theirs[name]
    ]
    if any(ours["dataset"][name] != theirs["dataset"][name] for name in ("name", "split")):
        found.append("images")
    return found


def compare(certify: Result, attacks: Sequence[Result]) -> Sandwich:
    """Join a certify run with attack runs on the same, image by image.

    An image is broken if any of the runs broke it. Where predictions are drawn at random, that is
    told by statistics: see ``lost_images``.

    Raises:
        PatchproofError: an attack run on something else, or none.
    """
    if certify.kind == "attack" or not attacks:
        raise PatchproofError("sandwich: expected a certify run and at least one attack run")
    for attack in attacks:
        if attack.kind != "attack":
            raise PatchproofError(
                f"{attack.folder}: expected an attack run, got one that certifies"
            )
        if found := differences(certify, attack):
            raise PatchproofError(
                f"{attack.folder}: expected an attack on what {certify.folder} certifies, got "
                f"another {' and another '.join(found)}"
            )
    chance = certify.manifest["identity"]["defense"].get("probability")
    lost = [
        lost_images(
            attack.examples,
            chance if certify.kind == "probable" else None,
            int(attack.manifest["identity"]["attack"].get("repeats", 1)),
        )
        for attack in attacks
    ]
    return Sandwich(certify, tuple(attacks), *join(certify.examples, certify.kind, lost))


def join(
    certified: pd.DataFrame, kind: RunKind, lost: Sequence[pd.Series[bool]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the images and the lost ones of ``Sandwich``.

    Args:
        certified: the examples of a certify run.
        kind: what its certificates promise.
        lost: of each attack run, as ``lost_images`` returns it.
    """
    read = certified[certified["status"] == "ok"].set_index("index")
    attacked = pd.concat(lost, axis=1, keys=range(len(lost))).sort_index()
    both = attacked.index.intersection(read.index)
    table = attacked.loc[both].eq(True)
    rows = read.loc[both]
    promise = rows[CERTIFIED[kind]]
    images = pd.DataFrame(
        {
            "label": rows["label"],
            "clean": rows["prediction"] == rows["label"],
            "certified": promise,
            "paper_only": rows["paper_condition"] & ~promise
            if "paper_condition" in rows
            else False,
            "broken": table.any(axis=1),
        }
    )
    return images.rename_axis("index").reset_index(), table


def lost_images(
    attacked: pd.DataFrame, probability: float | None = None, repeats: int = 1
) -> pd.Series[bool]:
    """Tell which images a run shows to be ones that the defense does not always answer right.

    A deterministic answer is lost if it is wrong on the clean image, which is an attack too, or
    neither right nor an alert on the attacked one.

    An answer that is drawn at random may be wrong now and then without breaking any promise, which
    is that it is right with a probability p or a higher one. It is lost only if the number of right
    ones among ``repeats`` independent predictions of the attacked image, drawn when the attack has
    ended, is so low that a binomial variable of probability p would be as low, or lower, with a
    probability of less than ``SIGNIFICANCE``.

    Args:
        attacked: the examples of an attack run.
        probability: p; None for deterministic answers.
        repeats: predictions behind ``right_share``.

    Returns:
        By the index of the images that could be read.
    """
    read = attacked[attacked["status"] == "ok"].set_index("index")
    if probability is None:
        return (read["prediction"] != read["label"]) | read["broken"]
    right = (read["right_share"] * repeats).round()
    return pd.Series(binom.cdf(right, repeats, probability) < SIGNIFICANCE, index=read.index)


def sandwich_table(sandwiches: Mapping[str, Sandwich]) -> pd.DataFrame:
    """Return the figures of sandwiches, by their names; those of one kind belong in one table.

    Returns:
        One row a sandwich: ``run`` (its name), ``count`` (images), ``clean``, ``certified``,
        ``empirical`` and ``gap``, each with the ends of its 95% Wilson interval (``x_low``,
        ``x_high``), and numbers of images: ``certified_images``, ``certified_and_broken``,
        ``broken_images`` (right without a patch, broken by one), ``paper_only`` (those that only
        the paper's condition vouches for), ``paper_broken`` (of these), and ``paper`` (whether that
        condition is sound; empty where the paper states none).
    """
    rows = []
    for name, sandwich in sandwiches.items():
        row: dict[str, Any] = {"run": name, "count": sandwich.count}
        for measure in ("clean", "certified", "empirical", "gap"):
            share: Proportion = getattr(sandwich, measure)
            row |= {
                measure: share.value,
                f"{measure}_low": share.low,
                f"{measure}_high": share.high,
            }
        images = sandwich.images
        rows.append(
            row
            | {
                "certified_images": int(images["certified"].sum()),
                "certified_and_broken": len(sandwich.certified_and_broken),
                "broken_images": int((images["clean"] & images["broken"]).sum()),
                "paper_only": int(images["paper_only"].sum()),
                "paper_broken": len(sandwich.paper_broken),
                "paper": sandwich.paper or "",
            }
        )
    return pd.DataFrame(rows)


def check_sandwich(certify: Result, attack: Result) -> Sandwich:
    """Return what two runs say together.

    Raises:
        PatchproofError: the attack run is on something else.
        RunError: an image is certified and broken.
    """
    sandwich = compare(certify, [attack])
    check_consistent([sandwich])
    return sandwich


def check_consistent(sandwiches: Sequence[Sandwich]) -> None:
    """Raise ``RunError`` if an image is certified and broken, with the runs and the images."""
    if complaints := [text for one in sandwiches if (text := one.complaint())]:
        raise RunError(f"CERTIFIED IMAGES ARE BROKEN, which is a bug: {'; '.join(complaints)}")


def _read(result: Result) -> pd.DataFrame:
    return result.examples[result.examples["status"] == "ok"].set_index("index")
