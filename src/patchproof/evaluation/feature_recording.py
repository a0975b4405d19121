"""Recordings of features: the scores of all small parts of every image, for any number of analyses.

A recording is made once for each classifier, slice of a data set and set of views, as those of
``recording`` are, and may be larger than memory: it is read a few images at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from patchproof.datasets import ImageDataset
from patchproof.defenses.inference import (
    default_batch_size,
    in_fitting_batches,
    model_device,
)
from patchproof.defenses.over_features import FeatureViews
from patchproof.evaluation.recording import (
    Columns,
    RecordingProgress,
    Shard,
    ShardedArchive,
    digest_of,
    read_shards,
)
from patchproof.models import ModelSpec
from patchproof.precision import exact_inference
from patchproof.results import Outputs
from patchproof.views import LocalFeatureViews
from patchproof.views.cells import CellViews
from patchproof.views.crops import CropViews

FORMAT = "patchproof-features/1"

RecordedViews = FeatureViews | CropViews | CellViews
"""The parts of images of which scores are recorded."""

_VALUES_AT_ONCE = 2**22

_KEPT_FOR_GRADIENTS = 4
"""Batches of an attack are smaller by this factor, since it keeps the activations of all layers."""


class Attack(Protocol):
    """Changes images before their features are recorded."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """Return the attacked images, (N, C, H, W) in [0, 1].

        Args:
            model: from images to logits.
            images: (N, C, H, W).
            labels: (N,) int64, the right classes.
            indices: (N,) int64, the rows of the data set's split.
        """
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return all that decides the attacked images, as JSON values."""
        ...


@dataclass(frozen=True, eq=False)
class Part:
    """What a classifier says about n images of a recording.

    Attributes:
        index: (n,) int64, the rows of the data set's split.
        right: (n,) int64, the right classes.
        whole: (n, C) float32, the scores of the undefended model for the whole image.
        outputs: of the views, with their scores.
    """

    index: Tensor
    right: Tensor
    whole: Tensor
    outputs: Outputs

    @property
    def vanilla(self) -> Tensor:
        """Whether the undefended model is right, (n,) bool."""
        return self.whole.isfinite().all(1) & (self.whole.argmax(1) == self.right)


@dataclass(frozen=True, eq=False)
class FeatureRecording:
    """What a classifier says about N images, and about V views of each; read part by part.

    Attributes:
        folder: of its shards.
        count: N; images that cannot be read are absent.
        corrupt: how many cannot.
        forwards: model forward passes behind the recording.
        seconds: what they took, all sessions together.
        machines: what they ran on, in words.
    """

    folder: Path
    count: int
    corrupt: int
    forwards: int
    seconds: float
    machines: tuple[str, ...]

    def __len__(self) -> int:
        return self.count

    @classmethod
    def read(cls, folder: Path, count: int) -> FeatureRecording:
        """Return the recording in a folder, of ``count`` images, or raise ``RunError``."""
        joined = Shard.joined(list(read_shards(folder, ("position",))))
        joined.check(folder, count)
        return cls(
            folder,
            len(set(joined.columns["position"].tolist())),
            len(set(joined.corrupt)),
            joined.forwards,
            joined.seconds,
            joined.machines,
        )

    def parts(self) -> Iterator[Part]:
        """Yield what is said about a few images at a time, in the order of the data set."""
        seen: set[int] = set()
        for shard in read_shards(self.folder):
            if not shard.columns:
                continue
            columns = {name: torch.from_numpy(column) for name, column in shard.columns.items()}
            position = columns["position"].tolist()
            new = torch.tensor([place for place, p in enumerate(position) if p not in seen])
            seen.update(position)
            scores = columns["scores"]
            for images in torch.split(new, max(1, _VALUES_AT_ONCE // max(1, scores[0].numel()))):
                yield Part(
                    columns["index"][images],
                    columns["right"][images],
                    columns["whole"][images],
                    _outputs(scores[images]),
                )


class FeatureArchive(ShardedArchive):
    """The recordings of the features of one classifier.

    Args:
        folder: where recordings are; any number of archives may share it.
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        dataset: N labelled images.
        views: local features, ablations, crops, or places of the last feature map.
        spec: what the model was built from; with it a recording names the model exactly.
        batch_size: images in one forward pass; None picks a number by their size.

    Raises:
        PatchproofError: as ``ShardedArchive`` does.
    """

    def __init__(
        self,
        folder: Path | str,
        model: nn.Module,
        dataset: ImageDataset,
        views: RecordedViews,
        *,
        spec: ModelSpec | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(folder, model, dataset, spec=spec, batch_size=batch_size)
        self.views = views
        if batch_size is None:
            image = torch.zeros(dataset.channels, *dataset.image_size)
            self.batch_size = default_batch_size(image, model_device(model))

    def record(
        self,
        progress: Callable[[RecordingProgress], None] | None = None,
        attack: Attack | None = None,
    ) -> FeatureRecording:
        """Evaluate all views of every image that is not recorded yet, and return the recording.

        What is finished is written every half minute and when the recording is stopped, whatever
        stops it; the next call goes on from there. An image that cannot be decoded is logged and
        left out.

        Args:
            progress: called at the start and after every few images.
            attack: changes the images before; None for clean images.

        Raises:
            RunError: the folder cannot be written or is damaged, or no image can be read.
        """

        def tables(columns: Columns, images: Tensor) -> Columns:
            if attack is not None:
                right = torch.from_numpy(columns["right"]).to(images.device)
                index = torch.from_numpy(columns["index"])
                few = max(1, self._tuned_batch_size(images.device) // _KEPT_FOR_GRADIENTS)
                images = torch.cat(
                    [
                        attack(self.model, images[some], right[some], index[some])
                        for some in torch.split(torch.arange(len(images)), few)
                    ]
                )
            return self._tables(images)

        folder = self._complete(self.identity(attack), self._forwards, tables, progress)
        return FeatureRecording.read(folder, len(self.dataset))

    def identity(self, attack: Attack | None = None) -> dict[str, Any]:
        """Return all that decides the content of a recording, as JSON values."""
        return {
            "format": FORMAT,
            "model": self.model_identity,
            "dataset": self.dataset_identity,
            "views": describe_views(self.views),
            "attack": None if attack is None else attack.to_dict(),
            "precision": "float32",
            "patchproof": version("patchproof"),
        }

    def folder_of(self, attack: Attack | None = None) -> Path:
        """Return the folder of a recording, made or not."""
        return self.folder / digest_of(self.identity(attack))

    @property
    def _forwards(self) -> int:
        """Forward passes for each image: the whole image, and its views."""
        return 1 + self.views.count // self.views.per_forward

    def _tables(self, images: Tensor) -> Columns:
        """Return the scores of n whole images, (n, C), and of their views, (n, V, C)."""
        size, count = self._tuned_batch_size(images.device), self.views.count
        with exact_inference(images.device):
            whole = [
                in_fitting_batches(lambda i, _: self.model(i.clone()), some, some)[0]
                for some in torch.split(images, size)
            ]
            pairs = torch.cartesian_prod(
                torch.arange(len(images)), torch.arange(self._forwards - 1)
            )
            scores = [
                self._evaluate_views(
                    images, *(column.to(images.device) for column in some.unbind(1))
                )
                for some in torch.split(pairs, size)
            ]
        return {
            "whole": torch.cat(whole).cpu().float().numpy(),
            "scores": torch.cat(scores).cpu().float().view(len(images), count, -1).numpy(),
        }

    def _evaluate_views(self, images: Tensor, image: Tensor, forward: Tensor) -> Tensor:
        """Return the scores of some forwards of some images, (n, per_forward, C)."""
        scores, fitting = in_fitting_batches(
            lambda i, f: self.views.evaluate(self.model, i, f), images[image], forward
        )
        if fitting < len(image):
            self.batch_size = fitting
        return scores


def describe_views(views: RecordedViews) -> dict[str, Any]:
    """Return which views they are, beside the model and the size of the images, as JSON values."""
    if isinstance(views, LocalFeatureViews):
        return {"kind": "local features", "grid": list(views.grid)}
    if isinstance(views, CellViews):
        return {"kind": "places of the last feature map", "grid": list(views.grid)}
    if isinstance(views, CropViews):
        return {"kind": "crops", "crop_size": list(views.places.crop_size)}
    return {
        "kind": "ablations",
        "ablation": views.ablation.to_dict(),
        "count": views.count,
        "fill": views.fill,
    }


def _outputs(scores: Tensor) -> Outputs:
    """Return what scores (n, V, C) say, all of it known."""
    outputs = Outputs.empty(len(scores), scores.shape[1], scores.shape[2])
    outputs.record(
        torch.arange(len(scores))[:, None].expand(-1, scores.shape[1]),
        torch.arange(scores.shape[1]).expand(len(scores), -1),
        scores,
    )
    outputs.scores = scores
    return outputs
