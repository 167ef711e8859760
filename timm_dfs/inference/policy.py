"""When an exit's answer is good enough: confidences, thresholds, and which exit answers each sample."""

import math
from collections.abc import Sequence
from numbers import Real

import torch

from .confidence import PATIENCE, confidence_function


class ExitPolicy:
    """A sample leaves at the first exit whose confidence is at least that exit's threshold.

    The last exit answers whoever is left, whatever its threshold says (MSDNet, section 5; DFS, section 4.4).

    With the confidence ``"patience"`` a threshold is a number of exits: a sample leaves once as many answering exits
    just before this one gave the answer it gives (Zhou et al., "BERT Loses Patience", NeurIPS 2020, whose patience t is
    the threshold t at every exit). Exits that never answer do not count.

    Args:
        thresholds: One number per exit, shallow to deep; ``None`` or infinity: that exit never answers.
        confidence: A key of :data:`CONFIDENCES`, or ``"patience"``.
        temperatures: One per exit, by which its logits are divided before their softmax (Guo et al., ICML 2017);
            without any, the logits are as they are. Answers do not depend on them, and patience has no use for them.

    Raises:
        ValueError: If there is no threshold, one is not a number, the confidence is unknown, or temperatures are not
            as many finite numbers above 0.
    """

    def __init__(
        self,
        thresholds: Sequence[float | None] | torch.Tensor,
        confidence: str = "max_prob",
        temperatures: Sequence[float] | torch.Tensor | None = None,
    ):
        values = _as_numbers("thresholds", thresholds, "one per exit, None for never")
        self.thresholds = tuple(float("inf") if value is None else float(value) for value in values)
        if not self.thresholds:
            raise ValueError("thresholds is empty; give one per exit.")
        if any(value != value for value in self.thresholds):
            raise ValueError(
                f"thresholds is {self.thresholds}; NaN is no threshold, use None for an exit that never answers."
            )
        self.confidence = confidence
        self._confidence = _no_confidence if confidence == PATIENCE else confidence_function(confidence)
        self.temperatures = None if temperatures is None else self._check_temperatures(temperatures)

    def _check_temperatures(self, temperatures: Sequence[float] | torch.Tensor) -> tuple[float, ...]:
        values = _as_numbers("temperatures", temperatures, "one per exit")
        if not all(value is not None and 0 < value < math.inf for value in values):
            raise ValueError(f"temperatures is {list(values)}; each must be a finite number above 0.")
        if len(values) != len(self.thresholds):
            raise ValueError(
                f"There are {len(values)} temperatures for {len(self.thresholds)} thresholds; give one of each an exit."
            )
        if self.confidence == PATIENCE:
            raise ValueError("Patience compares answers, which no temperature changes; leave temperatures out.")
        return tuple(float(value) for value in values)  # type: ignore[arg-type]

    @classmethod
    def from_preset(cls, preset: dict) -> "ExitPolicy":
        """The policy of a preset: ``thresholds`` and, where they are not the default, ``confidence``, ``temperatures``.

        What else a preset says, :class:`timm_dfs.OperatingPoint` reads.
        """
        if not isinstance(preset, dict) or "thresholds" not in preset:
            raise ValueError(f"a preset is {preset!r}; give a dict with the key 'thresholds'.")
        return cls(preset["thresholds"], preset.get("confidence", "max_prob"), preset.get("temperatures"))

    def check_exits(self, num_exits: int) -> None:
        """Raise ``ValueError`` unless there is one threshold for each of ``num_exits`` exits."""
        if len(self.thresholds) != num_exits:
            raise ValueError(
                f"The policy has {len(self.thresholds)} thresholds, but there are {num_exits} exits; give one per exit."
            )

    @property
    def answering(self) -> tuple[int, ...]:
        """The exits whose answers count: the last one and those whose threshold a confidence can reach."""
        last = len(self.thresholds) - 1
        highest = last if self.confidence == PATIENCE else 1
        return tuple(k for k, threshold in enumerate(self.thresholds) if threshold <= highest or k == last)

    def begin(self) -> "ExitPolicy | Patience":
        """What to ask, from the first answering exit to the last, about one batch: it has ``leaves`` and ``go_on``."""
        return Patience(self) if self.confidence == PATIENCE else self

    def leaves(self, exit_index: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Who leaves at exit ``exit_index``, given its logits (B, C).

        Returns:
            Two bool tensors (B,): which samples leave, and which have no confidence because their logits hold NaN
            (or an infinity that makes the softmax NaN). The latter leave at the last exit only.

        Raises:
            ValueError: If the confidence is patience, which has to know the exits before: ask what :meth:`begin` gives.
        """
        if self.temperatures is not None:
            logits = logits / self.temperatures[exit_index]
        return self.decide(exit_index, self._confidence(logits))

    def decide(self, exit_index: int, confidence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`leaves`, given the confidences (B,)."""
        if exit_index == len(self.thresholds) - 1:
            return torch.ones_like(confidence, dtype=torch.bool), confidence.isnan()
        return confidence >= self.thresholds[exit_index], confidence.isnan()

    def go_on(self, rows: torch.Tensor) -> None:
        """Hear that of the batch only these rows (int64 indices) go on to the next exit."""

    def exit_index(self, logits: torch.Tensor) -> torch.Tensor:
        """Which exit answers each sample, given all exits' logits (E, N, C): int64 (N,)."""
        self.check_exits(logits.shape[0])
        answering, decision = self.answering, self.begin()
        masks = [decision.leaves(k, logits[k]) for k in answering]
        broken = torch.stack([nan for _, nan in masks]).cumsum(0) > 0
        leaves = torch.stack([leaving for leaving, _ in masks]) & ~broken
        leaves[-1] = True
        return torch.tensor(answering, device=logits.device)[leaves.int().argmax(0)]  # argmax: the first that is true

    def __repr__(self) -> str:
        temperatures = "" if self.temperatures is None else f", temperatures={list(self.temperatures)}"
        return f"ExitPolicy({list(self.thresholds)}, confidence={self.confidence!r}{temperatures})"


class Patience:
    """A policy of patience on its way through one batch: the last answer of each sample, and how often it was given."""

    def __init__(self, policy: ExitPolicy):
        self._policy = policy
        self._answer: torch.Tensor | None = None
        self._agreed: torch.Tensor | None = None

    def leaves(self, exit_index: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`ExitPolicy.leaves`; for the answering exits in their order."""
        largest, answer = logits.max(-1)
        if self._answer is None or self._agreed is None:
            self._agreed = torch.zeros_like(largest, dtype=torch.float32)
        else:
            self._agreed = (self._agreed + 1) * (answer == self._answer)
        self._answer = answer
        # A softmax is NaN where, and only where, the largest logit is not finite.
        return self._policy.decide(exit_index, self._agreed.masked_fill(~largest.isfinite(), math.nan))

    def go_on(self, rows: torch.Tensor) -> None:
        """As :meth:`ExitPolicy.go_on`."""
        if self._answer is not None and self._agreed is not None:
            self._answer, self._agreed = self._answer[rows], self._agreed[rows]


def _no_confidence(logits: torch.Tensor) -> torch.Tensor:
    raise ValueError("Patience has to know the exits before; ask what the policy's begin() gives.")


def _as_numbers(name: str, values: Sequence[float | None] | torch.Tensor, wanted: str) -> Sequence[float | None]:
    numbers = values.tolist() if isinstance(values, torch.Tensor) else values
    if not isinstance(numbers, (list, tuple)) or not all(
        value is None or (isinstance(value, Real) and not isinstance(value, bool)) for value in numbers
    ):
        raise ValueError(f"{name} is {values!r}; give a list of numbers, {wanted}.")
    return numbers
