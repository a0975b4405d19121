"""How the outputs of the views become one label, and the proof that a patch cannot change it."""

from patchproof.aggregation.base import Aggregation, DetectingAggregation, Goal
from patchproof.aggregation.challenger import ChallengerGame
from patchproof.aggregation.double_masking import DoubleMasking
from patchproof.aggregation.evidence import (
    Confidence,
    ConfidentVotes,
    Evidence,
    Logits,
    Prediction,
    TanhLogits,
)
from patchproof.aggregation.features import FeatureAggregation
from patchproof.aggregation.masking import RobustMasking
from patchproof.aggregation.minority import MinorityVote
from patchproof.aggregation.ranks import RankSum, median, trimmed_sum, without_largest
from patchproof.aggregation.sums import BoundedSum, ClippedSum, CountedVotes, SpatialVotes
from patchproof.aggregation.window_vote import WindowVote
from patchproof.aggregation.windows import Windows

__all__ = [
    "Aggregation",
    "BoundedSum",
    "ChallengerGame",
    "ClippedSum",
    "Confidence",
    "ConfidentVotes",
    "CountedVotes",
    "DetectingAggregation",
    "DoubleMasking",
    "Evidence",
    "FeatureAggregation",
    "Goal",
    "Logits",
    "MinorityVote",
    "Prediction",
    "RankSum",
    "RobustMasking",
    "SpatialVotes",
    "TanhLogits",
    "WindowVote",
    "Windows",
    "median",
    "trimmed_sum",
    "without_largest",
]
