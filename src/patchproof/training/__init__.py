"""Training recipes, each one page that reads from top to bottom, and the loop that serves all."""

from patchproof.training.ablation import AblationRecipe
from patchproof.training.bagcert import BagCertRecipe
from patchproof.training.crops import CropRecipe
from patchproof.training.cutout import CutoutRecipe
from patchproof.training.evidence import ClippedRecipe, MaskedEvidenceRecipe, RankRecipe
from patchproof.training.interval_bounds import IntervalBoundsRecipe
from patchproof.training.loop import train
from patchproof.training.masking import GreedyMasks
from patchproof.training.recipe import Recipe

__all__ = [
    "AblationRecipe",
    "BagCertRecipe",
    "ClippedRecipe",
    "CropRecipe",
    "CutoutRecipe",
    "GreedyMasks",
    "IntervalBoundsRecipe",
    "MaskedEvidenceRecipe",
    "RankRecipe",
    "Recipe",
    "train",
]
