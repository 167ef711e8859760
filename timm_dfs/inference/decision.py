"""A policy's decisions for one batch, with what they need to know of the exits before."""

import math
from typing import TYPE_CHECKING

import torch

from .confidence import PATIENCE, confidence_function
from .ensemble import Ensemble
from .precision import at_least_float32

if TYPE_CHECKING:
    from .policy import ExitPolicy


class Decision:
    """Decisions for one batch, made by :meth:`timm_dfs.ExitPolicy.begin`.

    At each active exit, shallow to deep, :meth:`predicted` is called, then :meth:`leaves`, then :meth:`go_on` if some
    samples have left.
    """

    def __init__(self, policy: "ExitPolicy"):
        self._thresholds, self._temperatures = policy.thresholds, policy.temperatures
        self._ensemble = None if policy.ensemble is None else Ensemble(policy.ensemble, policy.answering)
        self._patience = _Patience() if policy.confidence == PATIENCE else None
        self._confidence = None if self._patience else confidence_function(policy.confidence)

    def predicted(self, exit_index: int, logits: torch.Tensor) -> torch.Tensor:
        """The policy's logits (B, C) at an exit, given the exit's own; those of an ensemble in float32 at least."""
        return logits if self._ensemble is None else self._ensemble.combine(exit_index, logits)

    def leaves(self, exit_index: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples that leave at an exit, given the policy's logits (B, C) at it, from :meth:`predicted`.

        Returns:
            Two bool tensors (B,): which samples leave, and which have no confidence because their logits hold NaN
            (or an infinity that makes the softmax NaN). The latter leave at the last exit only.
        """
        if self._patience is not None:
            confidence = self._patience.confidence(logits)
        else:
            if self._temperatures is not None:
                logits = at_least_float32(logits) / self._temperatures[exit_index]
            confidence = self._confidence(logits)  # type: ignore[misc]
        if exit_index == len(self._thresholds) - 1:
            return torch.ones_like(confidence, dtype=torch.bool), confidence.isnan()
        return confidence >= self._thresholds[exit_index], confidence.isnan()

    def go_on(self, rows: torch.Tensor) -> None:
        """Note that only these rows of the batch (int64 indices) go on to the next exit."""
        for state in (self._ensemble, self._patience):
            if state is not None:
                state.go_on(rows)


class _Patience:
    """Each sample's last predicted class, and at how many exits in a row it was predicted again."""

    def __init__(self) -> None:
        self._predicted: torch.Tensor | None = None
        self._agreed: torch.Tensor | None = None

    def confidence(self, logits: torch.Tensor) -> torch.Tensor:
        largest, predicted = logits.max(-1)
        if self._predicted is None or self._agreed is None:
            self._agreed = torch.zeros_like(largest, dtype=torch.float32)
        else:
            self._agreed = (self._agreed + 1) * (predicted == self._predicted)
        self._predicted = predicted
        # A softmax is NaN where, and only where, the largest logit is not finite.
        return self._agreed.masked_fill(~largest.isfinite(), math.nan)

    def go_on(self, rows: torch.Tensor) -> None:
        if self._predicted is not None and self._agreed is not None:
            self._predicted, self._agreed = self._predicted[rows], self._agreed[rows]
