"""PatchGuard++: certified detection by leaving out windows of local features."""

from __future__ import annotations

from torch import nn

from patchproof.aggregation import WindowVote
from patchproof.defenses.checks import check_tau
from patchproof.defenses.feature_windows import choose_windows
from patchproof.defenses.minority_reports import DEFAULT_TAU
from patchproof.defenses.over_features import OverFeatures
from patchproof.defenses.saved import DEFAULT_FILL, DEFAULT_TOLERANCE
from patchproof.defenses.surrogate import Surrogate
from patchproof.defenses.view_defense import ViewDetector
from patchproof.defenses.view_scores import ViewScores
from patchproof.models.ablation import Ablation
from patchproof.threat import Threat
from patchproof.threat.regions import ImageSize


class PatchGuardPlusPlus(OverFeatures, ViewDetector):
    """Alert where leaving out a window of features confidently changes the label.

    Xiang and Mittal (2021). ``predict`` returns the class of the largest mean of the local logits,
    or ``ALERT`` (-1) if their mean outside of some window has another class with a softmax
    probability of at least ``tau``. The certificate is one of detection: whatever the patch shows,
    the right label or an alert; see ``aggregation.WindowVote``. One certification tells the
    figures at every ``tau``.

    Args:
        model: from float32 images (N, C, H, W) in [0, 1] to logits (N, classes), in eval mode.
        threat: one patch, in the pixels of ``image_size``.
        image_size: (H, W) in pixels.
        ablation: what each view shows of the image; None for the receptive fields of
            ``model.local_logits``, or for the ablation that the model was made for.
        bands: 1, since windows need views on a grid.
        tau: the least confidence, in [0, 1], with which a masked view raises an alert.
        window: features a side, or (rows, columns); by default those of Equation 1 of PatchGuard,
            and more where some patch region corrupts more.
        mask_for: a larger patch that the windows are made for.
        fill: the value in [0, 1] that hidden pixels take in every channel, where the model has no
            way of its own to hide them.
        tolerance: how far (logits) rounding may move a score of a view, or the difference of two;
            the certificate holds for any such rounding.
        batch_size: forwards at once; None picks a number by the size of the image.
        memory_budget: bytes that the activations of one batch may take; None for no limit.

    Raises:
        PatchproofError: a model in training mode or one whose features see the whole image, several
            patches, windows that are larger than the feature map or cannot hold the features that
            some patch region corrupts, or numbers out of range.
    """

    _OWN = ("tau", "window")
    aggregation: WindowVote

    def __init__(
        self,
        model: nn.Module,
        threat: Threat,
        *,
        image_size: ImageSize,
        ablation: Ablation | None = None,
        bands: int = 1,
        tau: float = DEFAULT_TAU,
        window: int | tuple[int, int] | None = None,
        mask_for: Threat | None = None,
        fill: float = DEFAULT_FILL,
        tolerance: float = DEFAULT_TOLERANCE,
        batch_size: int | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.tau = check_tau(tau)
        views = self._take_views(model, image_size, ablation, bands, fill, tolerance)
        corruption = views.corruption(threat)
        windows = choose_windows(views, corruption, threat, image_size, window, mask_for)
        self.window = windows.size
        super().__init__(
            model,
            threat,
            views,
            WindowVote(windows, self.tau, tolerance),
            image_size=image_size,
            batch_size=batch_size,
            memory_budget=memory_budget,
            corruption=corruption,
        )

    def surrogates(self) -> dict[str, Surrogate]:
        """Return differentiable stand-ins for attackers by what they aim at, the best first."""
        combine = self.aggregation.soft_scores
        return {"agreement": ViewScores(self.model, self.views, combine, forwards=None)}

    def describe(self) -> str:
        """Say how many views there are, what each sees, and the windows."""
        return f"{super().describe()}, windows of {self.window[0]}x{self.window[1]}"
