"""``patchproof list``: what there is, or what a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

INVENTORY = {
    "models": {
        "small-resnet": "residual network for images of 28 to 32 pixels, trained from scratch",
        "tiny-resnet": "residual network for images of 8 pixels",
        "bagnet": "local features of small receptive fields, for images of 28 to 32 pixels "
        "(receptive_field, stride, widths, depth)",
        "bagnet9, bagnet17, bagnet33": "ResNet-50 with local features, for about 224 pixels (size)",
        "band-resnet": "runs on one band or block of the image alone (ablation, size, widths)",
        "ablation-resnet": "sees which pixels are hidden (ablation, size, widths)",
        "crop-resnet9": "classifies one crop of the image, told where it is (crop, widths, "
        "positions)",
        "ibp-mlp": "perceptron for interval-bounds, of one hidden layer of 255 (hidden)",
        "ibp-conv2, ibp-conv4": "small convolutional networks for interval-bounds (first_kernel, "
        "widths, hidden)",
        "ibp-conv5-wide": "a wide one of 17 million weights (widths, hidden)",
        "token-drop:NAME": "a vision transformer of timm that drops the tokens of hidden pixels, "
        "such as token-drop:vit_tiny_patch16_224",
        "timm:NAME": "any classifier of timm, such as timm:resnet50",
        "torchvision:NAME": "any classifier of torchvision, such as torchvision:resnet18",
        "hf:NAME": "an image classifier of transformers: hub or hf:FOLDER (extra hf), such as "
        "hf:google/vit-base-patch16-224",
        "onnx:FILE": "an ONNX model, scores only: no training, no attacks (extra onnx)",
        "python:package.module:factory": "your own function that returns a torch.nn.Module",
    },
    "data sets": {
        "digits": "1,797 grey 8x8 digits; comes with patchproof",
        "mnist": "grey 28x28 digits (torchvision, --root)",
        "cifar10": "32x32 photographs in 10 classes (torchvision, --root)",
        "imagenette": "10 classes of ImageNet, at 224x224 (torchvision, --root)",
        "imagenet": "1,000 classes, at 224x224 (torchvision, --root)",
        "hf:NAME": "a data set of the Hugging Face hub, or hf:FOLDER (extra hf), such as "
        "hf:ylecun/mnist",
        "FOLDER": "one folder of images a class, or Parquet files SPLIT-*.parquet",
    },
    "recipes": {
        "cutout": "training with two random squares on each image, for PatchCleanser",
        "greedy-cutout": "the same with the two masks of the defense that hurt most, from --start",
        "plain": "the same without squares, for comparison, and as a --start",
        "ablation": "one random band or block of each image, for derandomized-smoothing and "
        "patchguard (band-resnet, or any model with --ablation)",
        "crops": "one random crop of each image, for randomized-cropping (crop-resnet9, or any "
        "model with --crop)",
        "masked-evidence": "without the label's best window, for patchguard (bagnet)",
        "bagcert": "a lead of the votes of local features, for bagcert (bagnet)",
        "clipped": "the clipped sum of local features, for clipped-bagnet (bagnet)",
        "median": "the median of local features (bagnet)",
        "trimmed-mean": "their mean without the largest and smallest (bagnet)",
        "top-masking": "their mean without the largest (bagnet)",
    },
    "defenses": {
        "patchcleanser": "PatchCleanser, double masking or the challenger game: certified recovery "
        "for any model",
        "minority-reports": "Minority Reports, one mask at a time, alerts from --tau on: certified "
        "detection for any model",
        "patchguard": "robust masking of the window of largest evidence: certified recovery for "
        "networks of small receptive fields (bagnet), or with --defense-option ablation=column:4",
        "patchguard++": "PatchGuard++, one feature window at a time, alerts from --tau on: "
        "certified detection for the same networks",
        "clipped-bagnet": "the sum of tanh-clipped local logits",
        "derandomized-smoothing": "votes of bands or blocks of the image",
        "bagcert": "votes of local features",
        "median": "the median of the features of each class",
        "trimmed-mean": "their mean without the largest and smallest (trim)",
        "top-masking": "their sum without the largest (count), for several patches too",
        "interval-bounds": "interval bound propagation: bounds of the network's outputs over all "
        "that a patch may show: certified recovery for networks trained for it (method, screen)",
        "randomized-cropping": "votes of crops: of all or of a fixed draw (mode, crops, seed), or "
        "with mode=random-crops of a secret one, certified with a probability",
        "undefended": "the network by itself: no certificate, as of the next two, to be attacked",
        "local-gradient-smoothing": "sharp changes of the image darkened (window, overlap, "
        "threshold, smoothing)",
        "digital-watermarking": "the most salient square masked (window, regions, threshold, "
        "opening)",
    },
    "threats": {
        "--patch 5": "one square of 5x5 pixels, anywhere",
        "--patch 5x7": "one rectangle, 5 pixels high and 7 wide",
        "--patch 2.4%": "one square of a share as papers name it (on 32x32: 0.4%, 2.4%; on "
        "224x224: 1%, 2%, 3%)",
        "--patch 3x8,8x3": "one of several rectangles",
        "--patch any:10": "any rectangle of at most 10 pixels; any:1%, of at most 1% of them",
        "--patch line:12x2@30": "a bar 12 long, 2 thick, turned by 30 degrees; also square:5@45, "
        "diamond:7, parallelogram:4x6@20",
        "--patch aspect:25@2.7:1": "a rectangle of about 25 pixels, 2.7 times as high as wide; "
        "rectangle:12x2@45, turned by 45 degrees; bounds:square:5@45, upright around a shape",
        "--patch 5+8x3": "one patch, any of these; transformed:5, a square stretched or turned",
        "--patch stencil:FILE": "a patch of any shape, the pixels of a picture that are not black",
        "--patch '2*5'": "two patches of 5x5 at once; in place of 5 any patch above",
        "--patch sparse:4": "any 4 pixels of the image, for interval-bounds",
        "--covering 0.02": "one square of at least 2% of the pixels, side rounded up",
        "--locations corners": "the patch in a corner, or in a box: top,left,height,width",
    },
}
"""What the commands take, with a word on each."""


def inventory(
    file: Annotated[
        Path | None,
        typer.Argument(
            exists=True, dir_okay=False, help="A classifier or defense file, to show its card."
        ),
    ] = None,
) -> None:
    """List models, data sets, recipes, defenses and threats, or show the card of a file."""
    if file is not None:
        from patchproof.models import read_card

        typer.echo(json.dumps(read_card(file), indent=2))
        return
    for title, entries in INVENTORY.items():
        typer.secho(title, bold=True)
        width = max(map(len, entries))
        for name, words in entries.items():
            typer.echo(f"  {name:{width}}  {words}")
