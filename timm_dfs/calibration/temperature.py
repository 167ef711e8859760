"""Temperature scaling: a confidence that means what it says."""

import math

import torch
import torch.nn.functional as F

from .logits import check_data

COLDEST, HOTTEST = 0.05, 20.0
"""What a temperature is searched between; where answers are all right, or worse than chance, there is no best one."""


def fit_temperatures(val_logits: torch.Tensor, val_targets: torch.Tensor) -> torch.Tensor:
    """The temperature of each exit with the least cross-entropy (Guo et al., ICML 2017, arXiv 1706.04599).

    Cross-entropy is convex in the inverse of the temperature: its slope is bisected, for all exits at once.

    Args:
        val_logits: Validation logits (E, N, C).
        val_targets: Validation targets (N,).

    Returns:
        Temperatures (E,) in [0.05, 20], float32: logits are to be divided by them. Cross-entropy is never greater than
        at temperature 1.

    Raises:
        ValueError: If shapes disagree, logits are not finite, or targets are no classes.
    """
    check_data("val", (val_logits, val_targets))
    logits = val_logits.float()
    of_target = logits.gather(-1, val_targets.expand(len(logits), -1)[..., None])[..., 0].mean(1)  # (E,)
    low = torch.full((len(logits),), math.log(1 / HOTTEST))
    high = torch.full((len(logits),), math.log(1 / COLDEST))
    for _ in range(24):
        middle = (low + high) / 2
        expected = ((logits * middle.exp()[:, None, None]).softmax(-1) * logits).sum(-1).mean(1)
        rises = expected > of_target  # the slope of the cross-entropy over the inverse temperature
        low, high = torch.where(rises, low, middle), torch.where(rises, middle, high)
    temperatures = (-(low + high) / 2).exp()
    better = _cross_entropy(logits, val_targets, temperatures) < _cross_entropy(
        logits, val_targets, torch.ones_like(temperatures)
    )
    return torch.where(better, temperatures, 1.0)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.cross_entropy(row / t, targets) for row, t in zip(logits, temperatures, strict=True)])
