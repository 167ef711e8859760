"""Feature partitioning and referencing: who may train which channels of an exit's feature."""

import math

import torch
from torch import nn

REFERENCING = ("two_sided", "one_sided", "off")


def check_beta(beta: float | None) -> None:
    """Raise ``ValueError`` unless ``beta`` is ``None`` or a number in [0, 1]."""
    if beta is None:
        return
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or math.isnan(beta) or not 0 <= beta <= 1:
        raise ValueError(
            f"beta is {beta!r}; give a number in [0, 1] (the share of channels deeper layers may train) "
            "or None for joint training without partition."
        )


def check_referencing(referencing: str) -> None:
    """Raise ``ValueError`` unless ``referencing`` is one of :data:`REFERENCING`."""
    if referencing not in REFERENCING:
        raise ValueError(f"referencing is {referencing!r}; choose one of {', '.join(map(repr, REFERENCING))}.")


class Partition(nn.Module):
    """Splits a feature between the deeper layers and the exit that reads it (DFS, sections 3.2 and 3.3).

    The first ``round(beta * channels)`` channels are the shared part f⁺, which deeper layers may train; the
    rest, f⁻, belongs to the exit. Referencing decides what either side sees of the other's part:

    ===============  ======================  ====================
    referencing      to the deeper layers    to the exit's head
    ===============  ======================  ====================
    ``"two_sided"``  [f⁺, sg(f⁻)]            [sg(f⁺), f⁻]
    ``"one_sided"``  [f⁺, sg(f⁻)]            [f⁺, f⁻]
    ``"off"``        [f⁺, 0]                 [0, f⁻]
    ===============  ======================  ====================

    with sg the stop-gradient. Unless referencing is off, values pass unchanged: only gradients differ from
    joint training.

    Args:
        channels: Size C of the feature along ``dim``.
        beta: Partition ratio in [0, 1]; ``None`` leaves the feature whole for both sides.
        referencing: One of the values above.
        dim: Channel axis of the feature: 1 for NCHW, -1 for NHWC and token layouts.

    Raises:
        ValueError: If ``beta`` or ``referencing`` is not among the values above.
    """

    def __init__(self, channels: int, beta: float | None, referencing: str = "two_sided", dim: int = 1):
        super().__init__()
        check_beta(beta)
        check_referencing(referencing)
        self.beta = beta
        self.referencing = referencing
        self.dim = dim
        self.channels = channels
        self.shared = channels if beta is None else round(beta * channels)

    def forward(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``(to the deeper layers, to the exit's head)``, both shaped like ``feature``."""
        if feature.shape[self.dim] != self.channels:
            raise ValueError(
                f"This partition was built for {self.channels} channels on axis {self.dim}, "
                f"but the feature's shape is {tuple(feature.shape)}."
            )
        if self.beta is None:
            return feature, feature
        if self.referencing == "off":
            shared, own = self._split(feature)
            return self._join(shared, torch.zeros_like(own)), self._join(torch.zeros_like(shared), own)
        if not torch.is_grad_enabled():  # only gradients would differ
            return feature, feature
        shared, own = self._split(feature)
        onward = self._join(shared, own.detach())
        if self.referencing == "one_sided":
            return onward, feature
        return onward, self._join(shared.detach(), own)

    def _split(self, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shared, own = torch.split(feature, [self.shared, self.channels - self.shared], self.dim)
        return shared, own

    def _join(self, shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return torch.cat((shared, own), self.dim)

    def extra_repr(self) -> str:
        return f"{self.channels}, beta={self.beta}, referencing={self.referencing!r}, dim={self.dim}"
