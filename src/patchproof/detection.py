"""What detectors return: certificates of an alert or the right label, and their price over tau."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchproof.results import Certificates, Kind


@dataclass(frozen=True, eq=False)
class Thresholds:
    """For which tau each image is alerted, and for which detection is certified.

    A detector believes a suspicion of a confidence of at least tau, in [0, 1], and alerts.

    Attributes:
        unmasked: (N,) int64, the label that is returned where there is no alert.
        alert: (N,) float64: the clean image is alerted iff tau <= ``alert``; -inf if it never is.
        certified_above: (N,) float64, see ``certified``; at least ``alert`` where the unmasked
            label is right.
        certified: (N,) float64: detection is certified iff ``certified_above`` < tau <=
            ``certified``; -inf if it never is.
    """

    unmasked: Tensor
    alert: Tensor
    certified_above: Tensor
    certified: Tensor

    def certified_detection(self, tau: float) -> Tensor:
        """Return whether detection is certified at ``tau``, (N,) bool."""
        return (self.certified_above < tau) & (tau <= self.certified)

    def trade_off(self, labels: Tensor, taus: Tensor | None = None) -> TradeOff:
        """Count what each tau costs and gives (PatchCleanser, Figure 9).

        Args:
            labels: (N,) int64, the right labels.
            taus: (T,) float64 in [0, 1]; by default 0, 1 and every tau at which a figure changes,
                ascending. These give every point of the curve, since the figures are constant from
                one of them, excluded, to the next, included.
        """
        if taus is None:
            ends = torch.cat([self.alert, self.certified_above, self.certified])
            inside = ends[(ends >= 0) & (ends <= 1)]
            taus = torch.unique(torch.cat([inside.new_tensor([0.0, 1.0]), inside]))
        right = self.unmasked == labels
        certifiable = self.certified_above < self.certified

        def reach(thresholds: Tensor) -> Tensor:
            """Return how many are at least tau, (T,)."""
            return len(thresholds) - torch.searchsorted(thresholds.sort().values, taus.contiguous())

        certified, above = self.certified[certifiable], self.certified_above[certifiable]
        return TradeOff(
            count=len(labels),
            tau=taus,
            clean=int(right.sum()) - reach(self.alert[right]),
            certified_detection=reach(certified) - reach(above),
            alert=reach(self.alert),
        )


@dataclass(frozen=True, eq=False)
class TradeOff:
    """How many of the same images are right, certified and alerted at each tau.

    Attributes:
        count: N, the images.
        tau: (T,) float64.
        clean: (T,) int64, clean images with the right label and no alert.
        certified_detection: (T,) int64, those of them for which detection is certified.
        alert: (T,) int64, clean images that are alerted: false alerts.
    """

    count: int
    tau: Tensor
    clean: Tensor
    certified_detection: Tensor
    alert: Tensor


@dataclass(frozen=True)
class DetectionCertification(Certificates):
    """Deterministic certified detection: whatever the patch shows, the right label or an alert.

    Attributes:
        certified_detection: (N,) bool: the clean image gets the right label and no alert, and at
            every patch region it keeps the label or is alerted, whatever the patch shows.
        unmasked: (N,) int64, as in ``Thresholds``, like the next three.
        alert_threshold: (N,) float64, ``Thresholds.alert``.
        certified_above: (N,) float64.
        certified_threshold: (N,) float64, ``Thresholds.certified``.
    """

    certified_detection: Tensor
    unmasked: Tensor
    alert_threshold: Tensor
    certified_above: Tensor
    certified_threshold: Tensor

    kind: ClassVar[Kind] = "detection"

    def thresholds(self) -> Thresholds:
        """Return for which tau each image is alerted, and for which detection is certified."""
        return Thresholds(
            self.unmasked, self.alert_threshold, self.certified_above, self.certified_threshold
        )
