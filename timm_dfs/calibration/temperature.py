"""Temperature scaling: confidences that match accuracy."""

import math

import torch
import torch.nn.functional as F

from .logits import check_data

COLDEST, HOTTEST = 0.05, 20.0
"""Bounds of the search: if predictions are all correct, or worse than chance, no temperature is best."""


def fit_temperatures(val_logits: torch.Tensor, val_targets: torch.Tensor) -> torch.Tensor:
    """Fit to each exit the temperature of least cross-entropy (Guo et al., ICML 2017, arXiv 1706.04599).

    Cross-entropy is convex in the inverse temperature, so the zero of its slope is found by bisection.

    Args:
        val_logits: Validation logits (E, N, C).
        val_targets: Validation targets (N,).

    Returns:
        Temperatures (E,) in [0.05, 20], float32, by which logits are divided. Cross-entropy is never larger than at
        temperature 1.

    Raises:
        ValueError: If shapes disagree, logits are not finite, or targets are not classes.

    Example:
        >>> import torch, timm_dfs
        >>> targets = torch.arange(100) % 2
        >>> predicted = torch.where(torch.arange(100) < 75, targets, 1 - targets)  # 75 % correct
        >>> logits = 5.0 * torch.nn.functional.one_hot(predicted, 2)[None]  # but a confidence of 99 %
        >>> temperatures = timm_dfs.fit_temperatures(logits, targets)
        >>> torch.softmax(logits[0, 0] / temperatures[0], -1).max()
        tensor(0.7500)
    """
    check_data("val", (val_logits, val_targets))
    logits, val_targets = val_logits.float(), val_targets.long()
    of_target = logits.gather(-1, val_targets.expand(len(logits), -1)[..., None])[..., 0].mean(1)  # (E,)
    low = torch.full_like(of_target, math.log(1 / HOTTEST))
    high = torch.full_like(of_target, math.log(1 / COLDEST))
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
