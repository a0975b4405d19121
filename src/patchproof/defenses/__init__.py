"""The named systems: each is views and an aggregation, evaluated by one loop."""

from patchproof.defenses.loading import load
from patchproof.defenses.minority_reports import MinorityReports
from patchproof.defenses.patchcleanser import PatchCleanser
from patchproof.defenses.view_defense import ViewDefense, ViewDetector

__all__ = ["MinorityReports", "PatchCleanser", "ViewDefense", "ViewDetector", "load"]
