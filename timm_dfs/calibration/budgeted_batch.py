"""Budgeted batch classification: accuracy against average cost when each sample leaves at its own exit.

The procedure of the MSDNet line (MSDNet, section 5; DFS, section 4.4): thresholds are fixed on validation
logits so that given fractions of the samples leave at each exit, then applied to test logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..inference.confidence import confidence_function
from .logits import check_data, check_logits


@dataclass(frozen=True)
class BudgetPoint:
    """One operating point: what it costs and how well it does.

    Attributes:
        average_flops: Mean multiply-adds per sample.
        accuracy: Top-1, percent.
        thresholds: One per exit; infinity where nobody leaves.
    """

    average_flops: float
    accuracy: float
    thresholds: tuple[float, ...]


def geometric_exit_fractions(ratio: float, num_exits: int) -> torch.Tensor:
    """Fractions of samples leaving at each exit, ``ratio ** k`` for exits k = 1 … E, scaled to sum 1: float32 (E,)."""
    powers = torch.exp(torch.log(torch.tensor(ratio)) * torch.arange(1, num_exits + 1))
    return powers / powers.sum()


def find_thresholds(
    val_logits: torch.Tensor, exit_fractions: Sequence[float] | torch.Tensor, confidence: str = "max_prob"
) -> torch.Tensor:
    """Thresholds with which given fractions of the validation samples leave at each exit.

    Args:
        val_logits: Validation logits (E, N, C).
        exit_fractions: Share of all samples to leave at each exit (E,); counts are rounded down.
        confidence: Name of the confidence.

    Returns:
        Thresholds (E,), float32: infinity where no sample, or not enough of them, is to leave; minus infinity at
        the last exit. Samples tied with the threshold leave too.

    Raises:
        ValueError: If shapes disagree, fractions are not in [0, 1], or logits are not finite.
    """
    check_logits(val_logits)
    fractions = torch.as_tensor(exit_fractions, dtype=torch.float32)
    if fractions.shape != val_logits.shape[:1]:
        raise ValueError(
            f"exit_fractions has shape {tuple(fractions.shape)}; give one for each of {len(val_logits)} exits."
        )
    if not ((fractions >= 0) & (fractions <= 1)).all():
        raise ValueError(f"exit_fractions is {fractions.tolist()}; each must be in [0, 1].")
    return _thresholds(confidence_function(confidence)(val_logits), fractions)


def _thresholds(confidences: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    num_exits, samples = confidences.shape
    thresholds = torch.full((num_exits,), math.inf)
    for k in range(num_exits - 1):
        count = _count(samples, fractions[k].item())
        if 0 < count <= confidences.shape[1]:
            thresholds[k] = confidences[k].topk(count).values[-1]
            confidences = confidences[:, confidences[k] < thresholds[k]]
    thresholds[-1] = -math.inf
    return thresholds


def _count(samples: int, fraction: float) -> int:
    """A fraction of the samples, rounded down, except where only the float32 of it fell below a whole number."""
    nearest = round(samples * fraction)
    if torch.tensor(nearest / samples, dtype=torch.float32).item() == fraction:
        return nearest
    return math.floor(samples * fraction)


def budgeted_batch(
    val: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    flops: Sequence[float],
    points: int = 40,
) -> list[BudgetPoint]:
    """Accuracy against average cost at geometric exit fractions with ratios p / 20, p = 1 … ``points``.

    Args:
        val: Validation logits (E, N, C) and targets (N,): thresholds are fixed on them.
        test: Test logits (E, M, C) and targets (M,): accuracy and cost are measured on them.
        flops: Multiply-adds up to and including each exit (E,).
        points: How many ratios.

    Returns:
        One point per ratio, in the order of the ratios: from cheap to dear, by and large.

    Raises:
        ValueError: If shapes disagree, ``points`` is not positive, or logits are not finite.
    """
    (val_logits, _), (logits, targets) = val, test
    check_logits(val_logits)
    check_data("test", test)
    num_exits = len(logits)
    if len(val_logits) != num_exits or len(flops) != num_exits:
        raise ValueError(
            f"val has {len(val_logits)} exits, test {num_exits} and flops {len(flops)}; they must be of one network."
        )
    if val_logits.shape[-1] != logits.shape[-1]:
        raise ValueError(
            f"val has {val_logits.shape[-1]} classes, test {logits.shape[-1]}; they must be of one network."
        )
    if points < 1:
        raise ValueError(f"points is {points}; give at least 1.")
    confidence = confidence_function("max_prob")
    val_confidences, confidences = confidence(val_logits), confidence(logits)
    correct = (logits.argmax(-1) == targets).float()
    cost = torch.tensor(flops, dtype=torch.float64)
    curve = []
    for p in range(1, points + 1):
        thresholds = _thresholds(val_confidences, geometric_exit_fractions(p / 20, num_exits))
        exits = (confidences >= thresholds[:, None]).int().argmax(0)
        curve.append(
            BudgetPoint(
                average_flops=cost[exits].mean().item(),
                accuracy=100 * correct.gather(0, exits[None]).mean().item(),
                thresholds=tuple(thresholds.tolist()),
            )
        )
    return curve
