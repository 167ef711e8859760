"""When an exit's answer is good enough: confidences, thresholds, and which exit answers each sample."""

from collections.abc import Callable, Sequence
from numbers import Real

import torch


def max_prob(logits: torch.Tensor) -> torch.Tensor:
    """Largest softmax probability over the last axis, in float32: (..., C) to (...)."""
    return logits.softmax(-1, dtype=torch.float32).amax(-1)


CONFIDENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"max_prob": max_prob}
"""Confidence by name: a function from logits (..., C) to (...), larger where the network is surer. None exceeds 1."""


def confidence_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The confidence called ``name``.

    Raises:
        ValueError: If there is none of that name.
    """
    if not isinstance(name, str) or name not in CONFIDENCES:
        raise ValueError(f"confidence is {name!r}; choose one of {', '.join(map(repr, CONFIDENCES))}.")
    return CONFIDENCES[name]


class ExitPolicy:
    """A sample leaves at the first exit whose confidence is at least that exit's threshold.

    The last exit answers whoever is left, whatever its threshold says (MSDNet, section 5; DFS, section 4.4).

    Args:
        thresholds: One number per exit, shallow to deep; ``None`` or infinity: that exit never answers.
        confidence: Name of the confidence, a key of :data:`CONFIDENCES`.

    Raises:
        ValueError: If there is no threshold, one is not a number, or the confidence is unknown.
    """

    def __init__(self, thresholds: Sequence[float | None] | torch.Tensor, confidence: str = "max_prob"):
        values = thresholds.tolist() if isinstance(thresholds, torch.Tensor) else thresholds
        if not isinstance(values, (list, tuple)) or not all(
            value is None or (isinstance(value, Real) and not isinstance(value, bool)) for value in values
        ):
            raise ValueError(f"thresholds is {thresholds!r}; give a list of numbers, one per exit, None for never.")
        self.thresholds = tuple(float("inf") if value is None else float(value) for value in values)
        if not self.thresholds:
            raise ValueError("thresholds is empty; give one per exit.")
        if any(value != value for value in self.thresholds):
            raise ValueError(
                f"thresholds is {self.thresholds}; NaN is no threshold, use None for an exit that never answers."
            )
        self.confidence = confidence
        self._confidence = confidence_function(confidence)

    @classmethod
    def from_preset(cls, preset: dict) -> "ExitPolicy":
        """The policy of a preset: ``thresholds`` and, if it is not the default, ``confidence``."""
        if not isinstance(preset, dict) or "thresholds" not in preset:
            raise ValueError(f"a preset is {preset!r}; give a dict with the key 'thresholds'.")
        return cls(preset["thresholds"], preset.get("confidence", "max_prob"))

    def check_exits(self, num_exits: int) -> None:
        """Raise ``ValueError`` unless there is one threshold for each of ``num_exits`` exits."""
        if len(self.thresholds) != num_exits:
            raise ValueError(
                f"The policy has {len(self.thresholds)} thresholds, but there are {num_exits} exits; give one per exit."
            )

    @property
    def answering(self) -> tuple[int, ...]:
        """The exits that can answer at all: the last one and those whose threshold a confidence can reach."""
        last = len(self.thresholds) - 1
        return tuple(k for k, threshold in enumerate(self.thresholds) if threshold <= 1 or k == last)

    def leaves(self, exit_index: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Who leaves at exit ``exit_index``, given its logits (B, C).

        Returns:
            Two bool tensors (B,): which samples leave, and which have no confidence because their logits hold NaN
            (or an infinity that makes the softmax NaN). The latter leave at the last exit only.
        """
        confidence = self._confidence(logits)
        if exit_index == len(self.thresholds) - 1:
            return torch.ones_like(confidence, dtype=torch.bool), confidence.isnan()
        return confidence >= self.thresholds[exit_index], confidence.isnan()

    def exit_index(self, logits: torch.Tensor) -> torch.Tensor:
        """Which exit answers each sample, given all exits' logits (E, N, C): int64 (N,)."""
        self.check_exits(logits.shape[0])
        answering = self.answering
        masks = [self.leaves(k, logits[k]) for k in answering]
        broken = torch.stack([nan for _, nan in masks]).cumsum(0) > 0
        leaves = torch.stack([leaving for leaving, _ in masks]) & ~broken
        leaves[-1] = True
        return torch.tensor(answering, device=logits.device)[leaves.int().argmax(0)]  # argmax: the first that is true

    def __repr__(self) -> str:
        return f"ExitPolicy({list(self.thresholds)}, confidence={self.confidence!r})"
