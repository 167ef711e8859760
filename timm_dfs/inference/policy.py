"""Exit policies: at which exit each sample leaves the network."""

import math
import warnings
from collections.abc import Sequence
from numbers import Real

import torch

from .confidence import PATIENCE, confidence_function
from .decision import Decision
from .ensemble import check_ensemble, ensemble_logits
from .precision import at_least_float32


class ExitPolicy:
    """Thresholds on confidences: a sample exits at the first exit whose confidence reaches its threshold.

    All samples that are left exit at the last exit, whatever its threshold (MSDNet, section 5; DFS, section 4.4).

    With the confidence ``"patience"`` a threshold is a number of exits: a sample exits once that many active exits in a
    row, just before this one, predicted the same class (Zhou et al., "BERT Loses Patience", NeurIPS 2020, whose
    patience t is the threshold t at every exit). Exits that are switched off do not count.

    Args:
        thresholds: One number per exit, shallow to deep; ``None`` or infinity switches the exit off. A finite threshold
            that no confidence can reach switches it off too, with a warning; for patience, one above the number of
            exits but two, which is the most that an early exit can have before it.
        confidence: A key of :data:`CONFIDENCES`, or ``"patience"``.
        temperatures: One per exit, by which its logits are divided before their softmax (Guo et al., ICML 2017);
            by default 1. Predictions do not depend on them, so patience takes none.
        ensemble: Combines an exit's logits with those of the active exits before it, before temperature and
            confidence: ``"mean"``, or for exit k the k + 1 weights of exits 0 … k, e.g. from
            :func:`timm_dfs.fit_ensemble`. They are scaled to sum 1; exits that are switched off contribute nothing, and
            their weights are shared out. By default each exit predicts alone.

    Raises:
        ValueError: If there is no threshold, one is not a number, the confidence is unknown, temperatures are not
            as many finite numbers above 0, or the ensemble is not one of those above.

    Example:
        >>> import torch
        >>> from timm_dfs import ExitPolicy
        >>> policy = ExitPolicy([0.8, None, 0.0])  # the second of three exits is switched off
        >>> policy.answering
        (0, 2)
        >>> logits = torch.tensor([[[4.0, 0.0], [0.5, 0.0]]] * 3)  # 3 exits, 2 samples, 2 classes
        >>> policy.exit_index(logits)
        tensor([0, 2])
    """

    def __init__(
        self,
        thresholds: Sequence[float | None] | torch.Tensor,
        confidence: str = "max_prob",
        temperatures: Sequence[float] | torch.Tensor | None = None,
        ensemble: str | Sequence[Sequence[float]] | None = None,
    ):
        values = _as_numbers("thresholds", thresholds, "one per exit, None for never")
        self.thresholds = tuple(float("inf") if value is None else float(value) for value in values)
        if not self.thresholds:
            raise ValueError("thresholds is empty; give one per exit.")
        if any(value != value for value in self.thresholds):
            raise ValueError(f"thresholds is {self.thresholds}; NaN is no threshold, give None to switch an exit off.")
        self.confidence = confidence
        if confidence != PATIENCE:
            confidence_function(confidence)  # raises an error if there is none of that name
        self._warn_of_unreachable()
        self.temperatures = None if temperatures is None else self._check_temperatures(temperatures)
        self.ensemble = check_ensemble(ensemble, len(self.thresholds))

    @property
    def highest_confidence(self) -> int:
        """The largest confidence that a sample can have at an early exit."""
        return max(len(self.thresholds) - 2, 0) if self.confidence == PATIENCE else 1

    def _warn_of_unreachable(self) -> None:
        highest = self.highest_confidence
        unreachable = [value for value in self.thresholds[:-1] if highest < value < math.inf]
        if unreachable:
            hint = {
                PATIENCE: "an early exit has at most that many early exits before it",
                "entropy": "it is 1 minus the entropy as a share of its maximum, not the entropy",
            }.get(self.confidence, "it is no percentage and no logit")
            warnings.warn(
                f"No sample reaches the thresholds {', '.join(f'{value:g}' for value in unreachable)}: the confidence "
                f"{self.confidence!r} is at most {highest} ({hint}). These exits are switched off; if that is "
                "wanted, give None or infinity.",
                stacklevel=3,
            )

    def _check_temperatures(self, temperatures: Sequence[float] | torch.Tensor) -> tuple[float, ...]:
        values = _as_numbers("temperatures", temperatures, "one per exit")
        if not all(value is not None and 0 < value < math.inf for value in values):
            raise ValueError(f"temperatures is {list(values)}; each must be a finite number above 0.")
        if len(values) != len(self.thresholds):
            raise ValueError(
                f"There are {len(values)} temperatures for {len(self.thresholds)} thresholds; give one of each an exit."
            )
        if self.confidence == PATIENCE:
            raise ValueError("Patience compares predictions, which no temperature changes; leave temperatures out.")
        return tuple(float(value) for value in values)  # type: ignore[arg-type]

    @classmethod
    def from_preset(cls, preset: dict) -> "ExitPolicy":
        """The policy of a preset: ``thresholds`` and, if given, ``confidence``, ``temperatures`` and ``ensemble``.

        Raises:
            ValueError: If ``preset`` is not a dict with thresholds, or they make no policy.
        """
        if not isinstance(preset, dict) or "thresholds" not in preset:
            raise ValueError(f"The preset is {preset!r}; give a dict with the key 'thresholds'.")
        return cls(
            preset["thresholds"],
            preset.get("confidence", "max_prob"),
            preset.get("temperatures"),
            preset.get("ensemble"),
        )

    def with_thresholds(self, thresholds: Sequence[float | None]) -> "ExitPolicy":
        """The same policy with other thresholds."""
        return ExitPolicy(thresholds, self.confidence, self.temperatures, self.ensemble)

    def check_exits(self, num_exits: int) -> None:
        """Raise ``ValueError`` unless there is one threshold for each of ``num_exits`` exits."""
        if len(self.thresholds) != num_exits:
            raise ValueError(
                f"The policy has {len(self.thresholds)} thresholds, but there are {num_exits} exits; give one per exit."
            )

    @property
    def answering(self) -> tuple[int, ...]:
        """The active exits: the last one and those whose threshold a confidence can reach."""
        last = len(self.thresholds) - 1
        return tuple(
            k for k, threshold in enumerate(self.thresholds) if threshold <= self.highest_confidence or k == last
        )

    @property
    def json_thresholds(self) -> list[float | None]:
        """The thresholds as JSON holds them: ``None`` for infinity, and 0, which every confidence reaches, for less."""
        return [None if value == math.inf else max(value, 0.0) for value in self.thresholds]

    def begin(self) -> Decision:
        """The decisions for one batch, which is at its first exit."""
        return Decision(self)

    def leaves(self, exit_index: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples that leave at exit ``exit_index``, given its logits (B, C) alone; see :meth:`Decision.leaves`.

        Raises:
            ValueError: If the decision depends on earlier exits, as it does with patience and with an ensemble; use
                what :meth:`begin` returns.
        """
        if self.confidence == PATIENCE or self.ensemble is not None:
            kind = "Patience" if self.confidence == PATIENCE else "An ensemble"
            raise ValueError(f"{kind} depends on earlier exits; use what the policy's begin() returns.")
        return self.begin().leaves(exit_index, logits)

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """The policy's logits (E, N, C) at all exits, given the exits' own: others only if there is an ensemble."""
        self.check_exits(logits.shape[0])
        return logits if self.ensemble is None else ensemble_logits(logits, self.ensemble, self.answering)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities (E, N, C) at all exits, by the ensemble and temperatures, given the exits' own logits."""
        scaled = at_least_float32(self.predicted(logits))
        if self.temperatures is not None:
            scaled = scaled / scaled.new_tensor(self.temperatures)[:, None, None]
        return scaled.softmax(-1)

    def exit_index(self, logits: torch.Tensor) -> torch.Tensor:
        """Exit at which each sample leaves, given the exits' own logits (E, N, C): int64 (N,)."""
        self.check_exits(logits.shape[0])
        answering, decision = self.answering, self.begin()
        masks = [decision.leaves(k, decision.predicted(k, logits[k])) for k in answering]
        broken = torch.stack([nan for _, nan in masks]).cumsum(0) > 0
        leaves = torch.stack([leaving for leaving, _ in masks]) & ~broken
        leaves[-1] = True
        return torch.tensor(answering, device=logits.device)[leaves.int().argmax(0)]  # argmax: the first that is true

    def __repr__(self) -> str:
        temperatures = "" if self.temperatures is None else f", temperatures={list(self.temperatures)}"
        ensemble = "" if self.ensemble is None else f", ensemble={self.ensemble!r}"
        return f"ExitPolicy({list(self.thresholds)}, confidence={self.confidence!r}{temperatures}{ensemble})"


def _as_numbers(name: str, values: Sequence[float | None] | torch.Tensor, wanted: str) -> Sequence[float | None]:
    numbers = values.tolist() if isinstance(values, torch.Tensor) else values
    if not isinstance(numbers, (list, tuple)) or not all(
        value is None or (isinstance(value, Real) and not isinstance(value, bool)) for value in numbers
    ):
        raise ValueError(f"{name} is {values!r}; give a list of numbers, {wanted}.")
    return numbers
