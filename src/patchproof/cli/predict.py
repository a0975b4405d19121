"""``patchproof predict``: robust labels of image files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchproof.cli import options as opt

if TYPE_CHECKING:
    from patchproof.datasets import ImageDataset
    from patchproof.datasets.images import EncodedPictures
    from patchproof.defenses import AnyDefense
    from patchproof.results import Case

_AT_ONCE = 64
"""Image files that are read before their labels are printed."""


@dataclass(frozen=True)
class Answer:
    """What is said about one image file; ``error`` is empty if it could be read.

    ``label`` is None where the file could not be read, and where a detector alerts.
    ``patch_suspected`` is None where the defense does not tell: small parts of an image disagree
    without a patch too, and bounds are not computed to predict.
    """

    file: str
    label: int | None = None
    class_name: str | None = None
    case: str | None = None
    patch_suspected: bool | None = None
    forwards: int | None = None
    error: str = ""

    def in_words(self) -> str:
        """Return one line for people."""
        if self.label is None:
            return f"{self.file}: {self.case}, patch suspected, {self.forwards} forwards"
        name = "" if self.class_name is None else f" ({self.class_name})"
        words = {True: "patch suspected, ", False: "no patch suspected, ", None: ""}
        suspected = words[self.patch_suspected]
        forwards = f"{self.forwards} forward{'' if self.forwards == 1 else 's'}"
        return f"{self.file}: {self.label}{name}, case {self.case}, {suspected}{forwards}"


def predict(
    files: Annotated[
        list[Path],
        typer.Argument(
            exists=True, dir_okay=False, metavar="FILE...", help="Images: png, jpg, ..."
        ),
    ],
    image_size: opt.ImageSize = None,
    weights: opt.Weights = None,
    model: opt.Model = None,
    classes: opt.Classes = None,
    model_option: opt.ModelOption = None,
    pretrained: opt.Pretrained = False,
    defense: opt.Defense = "patchcleanser",
    patch: opt.Patch = None,
    covering: opt.Covering = None,
    locations: opt.Locations = "anywhere",
    masks: opt.Masks = "6",
    multiplicity: opt.Multiplicity = "1",
    layout: opt.Layout = "paper",
    shapes: opt.Shapes = None,
    inference: opt.Inference = "double",
    tau: opt.Tau = None,
    defense_option: opt.DefenseOption = None,
    fill: opt.Fill = None,
    tolerance: opt.Tolerance = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line, one for each file.")
    ] = False,
    batch_size: opt.BatchSize = None,
    memory: opt.Memory = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
) -> None:
    """Classify image files robustly: a patch of the given size cannot change a certified label.

    For each file: the robust label, its name if known, the case, and whether a patch is suspected.
    The case says how the label came about; "agreed" means that every masked image got the same
    label, anything else that some masked images disagreed, as they do when a patch is there. With
    --defense minority-reports or patchguard++, "alert" in place of a label means that a patch is
    suspected. Defenses that look at small parts of the image, and interval-bounds, suspect nothing.

    Images must have the size that the classifier was made for, unless --image-size is given. A file
    that cannot be read is named, the others are still classified, and the exit code is 1.
    """
    from patchproof.cli.building import chosen_options, defend, use_threads

    model_options, defense_options = chosen_options(locals())
    use_threads(threads)
    size = None if image_size is None else opt.parse_pair("--image-size", image_size)
    made_for_a_size = defense_options.file is not None or model is None
    size_of_files, channels = (None, None) if made_for_a_size else _survey(files)
    defended, classifier = defend(
        model_options,
        defense_options,
        size or size_of_files,
        channels,
    )
    images = _dataset(files, defended.image_size, classifier.spec.channels, size is not None)
    failed = False
    for answer in _answers(defended, images, files, classifier.class_names):
        failed |= bool(answer.error)
        if as_json:
            typer.echo(json.dumps(asdict(answer)))
        elif not answer.error:
            typer.echo(answer.in_words())
        if answer.error:
            typer.echo(f"patchproof: error: {answer.error}", err=True)
    if failed:
        raise typer.Exit(1)


def _answers(
    defense: AnyDefense,
    images: ImageDataset,
    files: Sequence[Path],
    class_names: Sequence[str] | None,
) -> Iterator[Answer]:
    """Yield the answers in the order of the files, reading and classifying some at a time."""
    import torch

    from patchproof.errors import PatchproofError
    from patchproof.results import ALERT, Case

    for start in range(0, len(files), _AT_ONCE):
        answers: dict[int, Answer] = {}
        read = {}
        for position in range(start, min(start + _AT_ONCE, len(files))):
            try:
                read[position] = images.image(position)
            except PatchproofError as error:
                answers[position] = Answer(str(files[position]), error=str(error))
        if read:
            prediction = defense.infer(torch.stack(list(read.values())))
            columns = (prediction.label, prediction.case, prediction.forwards)
            for position, label, case, forwards in zip(
                read, *(column.tolist() for column in columns), strict=True
            ):
                alerted = label == ALERT
                answers[position] = Answer(
                    file=str(files[position]),
                    label=None if alerted else label,
                    class_name=None if alerted or class_names is None else class_names[label],
                    case=Case(case).name.lower(),
                    patch_suspected=_suspects(defense, Case(case)),
                    forwards=forwards,
                )
        yield from (answers[position] for position in sorted(answers))


def _suspects(defense: AnyDefense, case: Case) -> bool | None:
    """Tell whether a case means that there may be a patch; None where it says nothing of that."""
    from patchproof.defenses.over_masks import OverMasks
    from patchproof.defenses.preprocessed import PreprocessedDefense
    from patchproof.results import Case

    if isinstance(defense, PreprocessedDefense):
        return None
    if defense.kind == "detection":
        return case == Case.ALERT
    return case != Case.AGREED if isinstance(defense, OverMasks) else None


def _pictures(files: Sequence[Path]) -> EncodedPictures:
    from patchproof.datasets.images import EncodedPictures

    return EncodedPictures(
        content=lambda index: files[index].read_bytes(), describe=lambda index: str(files[index])
    )


def _survey(files: Sequence[Path]) -> tuple[tuple[int, int], int]:
    """Return the size and the channels of the files, by the headers of those that can be read."""
    from patchproof.datasets.images import survey
    from patchproof.errors import RunError

    sizes, channels = survey(_pictures(files), range(len(files)))
    if not sizes:
        raise RunError(f"expected image files, got none that can be read in {len(files)}")
    return min(sizes), channels


def _dataset(
    files: Sequence[Path], image_size: tuple[int, int], channels: int, resized: bool
) -> ImageDataset:
    """Read the files as data sets are read; their labels mean nothing."""
    import torch

    from patchproof.datasets import ImageDataset

    return ImageDataset(
        name="files",
        split="all",
        class_names=("unknown",),
        image_size=image_size,
        channels=channels,
        labels=torch.zeros(len(files), dtype=torch.int64),
        indices=torch.arange(len(files)),
        pictures=_pictures(files),
        resized=resized,
    )
