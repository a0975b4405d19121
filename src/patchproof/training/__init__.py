"""Training recipes, each one page that reads from top to bottom."""

from patchproof.training.cutout import CutoutRecipe, train_cutout
from patchproof.training.masking import GreedyMasks

__all__ = ["CutoutRecipe", "GreedyMasks", "train_cutout"]
