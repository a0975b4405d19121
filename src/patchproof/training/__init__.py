"""Training recipes, each one page that reads from top to bottom."""

from patchproof.training.cutout import CutoutRecipe, train_cutout

__all__ = ["CutoutRecipe", "train_cutout"]
