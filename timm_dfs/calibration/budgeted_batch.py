"""Budgeted batch classification: accuracy against average cost when each sample leaves at its own exit.

The procedure of MSDNet, section 5, and DFS, section 4.4: thresholds are chosen on validation logits so that given
fractions of the samples leave at each exit, then applied to test logits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..inference.confidence import confidence_function
from .logits import check_data, check_logits


@dataclass(frozen=True)
class BudgetPoint:
    """One point of a budgeted-batch curve.

    Attributes:
        average_flops: Mean multiply-adds per sample.
        accuracy: Top-1, percent.
        thresholds: One per exit; infinity where no sample leaves.

    Example:
        >>> import torch, timm_dfs
        >>> data = 9 * torch.eye(4).repeat(2, 1, 1), torch.arange(4)  # logits of 2 exits, 4 samples, 4 classes; targets
        >>> timm_dfs.budgeted_batch(data, data, flops=[10, 30])[0].thresholds[-1]
        -inf
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
    """Find thresholds with which given fractions of the validation samples leave at each exit.

    A threshold lies halfway between the confidences of the last sample that leaves and of the next one, so that
    rounding, which differs between runtimes, moves no validation sample.

    Args:
        val_logits: Validation logits (E, N, C).
        exit_fractions: Share of all samples that leave at each exit (E,); counts are rounded down.
        confidence: Name of the confidence.

    Returns:
        Thresholds (E,), float32: infinity where no sample leaves, or where fewer are left than should leave; minus
        infinity at the last exit. Samples as confident as the last one that leaves do so too.

    Raises:
        ValueError: If shapes disagree, fractions are not in [0, 1], or logits are not finite.

    Example:
        >>> import torch, timm_dfs
        >>> confidences = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.6, 0.7, 0.8, 0.9]])  # 2 exits, 4 samples
        >>> logits = torch.stack([confidences, 1 - confidences], -1).log()
        >>> timm_dfs.find_thresholds(logits, [0.5, 0.5])
        tensor([0.7500,   -inf])
    """
    check_logits(val_logits)
    fractions = torch.as_tensor(exit_fractions, dtype=torch.float32)
    if fractions.shape != val_logits.shape[:1]:
        raise ValueError(
            f"exit_fractions has shape {tuple(fractions.shape)}; give one for each of {len(val_logits)} exits."
        )
    if not ((fractions >= 0) & (fractions <= 1)).all():
        raise ValueError(f"exit_fractions is {fractions.tolist()}; each must be in [0, 1].")
    confidences = confidence_function(confidence)(val_logits)
    return _halfway(confidences, official_thresholds(confidences, fractions))


def official_thresholds(confidences: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """Thresholds of the published procedure: the confidence of the last sample that leaves, of confidences (E, N)."""
    num_exits, samples = confidences.shape
    thresholds = torch.full((num_exits,), math.inf)
    for k in range(num_exits - 1):
        count = _count(samples, fractions[k].item())
        if 0 < count <= confidences.shape[1]:
            thresholds[k] = confidences[k].topk(count).values[-1]
            confidences = confidences[:, confidences[k] < thresholds[k]]
    thresholds[-1] = -math.inf
    return thresholds


def _halfway(confidences: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Move thresholds from the last sample that leaves halfway to the next one that reaches the exit, or to 0."""
    moved = thresholds.clone()
    for k, threshold in enumerate(thresholds[:-1]):
        confidences = confidences[:, confidences[k] < threshold]  # of the samples that go on
        if threshold < math.inf:
            next_one = confidences[k].max() if confidences.shape[1] else torch.tensor(0.0)
            halfway = (threshold + next_one) / 2
            moved[k] = halfway if halfway > next_one else threshold  # neighbours in float32 have nothing between them
    return moved


def _count(samples: int, fraction: float) -> int:
    """A fraction of the samples, rounded down, unless only its rounding to float32 fell below a whole number."""
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

    As published, a threshold is the confidence of the last validation sample that leaves. To deploy thresholds, take
    those of :func:`timm_dfs.find_thresholds` or :func:`timm_dfs.fit_operating_point`, which keep a distance from it.

    Args:
        val: Validation logits (E, N, C) and targets (N,), on which thresholds are chosen.
        test: Test logits (E, M, C) and targets (M,), on which accuracy and cost are measured.
        flops: Multiply-adds up to and including each exit (E,).
        points: Number of ratios.

    Returns:
        One point per ratio, in the order of the ratios, which is usually that of rising cost.

    Raises:
        ValueError: If shapes disagree, ``points`` is not positive, or logits are not finite.

    Example:
        >>> import torch, timm_dfs
        >>> _ = torch.manual_seed(0)
        >>> logits, targets = torch.randn(3, 200, 5).cumsum(0), torch.arange(200) % 5  # 3 exits, 200 samples, 5 classes
        >>> val, test = (logits[:, :100], targets[:100]), (logits[:, 100:], targets[100:])
        >>> curve = timm_dfs.budgeted_batch(val, test, flops=[10, 20, 40], points=20)
        >>> len(curve), curve[0].average_flops < curve[-1].average_flops
        (20, True)
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
        thresholds = official_thresholds(val_confidences, geometric_exit_fractions(p / 20, num_exits))
        exits = (confidences >= thresholds[:, None]).int().argmax(0)
        curve.append(
            BudgetPoint(
                average_flops=cost[exits].mean().item(),
                accuracy=100 * correct.gather(0, exits[None]).mean().item(),
                thresholds=tuple(thresholds.tolist()),
            )
        )
    return curve
