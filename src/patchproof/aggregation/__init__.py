"""How the outputs of the views become one label, and the proof that a patch cannot change it."""

from patchproof.aggregation.base import Aggregation, DetectingAggregation, Goal
from patchproof.aggregation.challenger import ChallengerGame
from patchproof.aggregation.double_masking import DoubleMasking
from patchproof.aggregation.minority import MinorityVote

__all__ = [
    "Aggregation",
    "ChallengerGame",
    "DetectingAggregation",
    "DoubleMasking",
    "Goal",
    "MinorityVote",
]
