"""What held-out logits say: accuracy of exits alone and together, their disagreement, and early exit at given costs."""

from collections.abc import Sequence

import torch

import timm_dfs
from timm_dfs.calibration.ensemble import fit_ensemble
from timm_dfs.calibration.logits import halves
from timm_dfs.hub.from_checkpoint import accuracy
from timm_dfs.inference.ensemble import MEAN, ensemble_logits

SHARES = (0.5, 0.7, 0.9)
"""Mean costs of early exit, as shares of the multiply-adds of all exits."""

Split = tuple[torch.Tensor, torch.Tensor]
"""Logits (E, N, C) and targets (N,)."""


def outcome(logits: torch.Tensor, targets: torch.Tensor, flops: Sequence[float]) -> dict:
    """Accuracies in percent.

    What is fitted, weights with which exits answer together and thresholds, is cross-validated: fitted on one half of
    the samples and measured on the other, and the other way round.

    Args:
        logits: Logits (E, N, C) of held-out samples.
        targets: Their classes (N,).
        flops: Multiply-adds up to and including each exit (E,).

    Returns:
        Of each exit on its own ``top1`` and ``disagreement`` with the last exit; ``together``, by way of answering the
        accuracy of each exit with those before it; ``early_exit``, by way the accuracy at each of :data:`SHARES`.
    """
    of_exits = accuracy((logits, targets))
    one, other = halves((logits, targets))
    found = [measured(val, test, flops) for val, test in ((one, other), (other, one))]
    return dict(
        top1=rounded(of_exits["top1"]),
        disagreement=rounded(of_exits["disagreement"]),
        together={way: mean(of_half["together"][way] for of_half in found) for way in ("mean", "fitted")},
        early_exit={way: mean(of_half["early_exit"][way] for of_half in found) for way in ("alone", "mean", "fitted")},
        flops=list(flops),
    )


def measured(val: Split, test: Split, flops: Sequence[float]) -> dict:
    """Accuracies on one half of what was fitted on the other, by way of answering."""
    ways = dict(alone=None, mean=MEAN, fitted=fit_ensemble(*val))

    def together(ensemble) -> list[float]:
        return timm_dfs.anytime_accuracy(ensemble_logits(test[0], ensemble), test[1]).tolist()

    def early_exit(share: float, ensemble) -> float:
        point = timm_dfs.fit_operating_point(val, flops, budget=share * flops[-1], ensemble=ensemble)
        return timm_dfs.measure_policy(point, test, flops).accuracy

    return dict(
        together={way: together(ensemble) for way, ensemble in ways.items() if ensemble is not None},
        early_exit={way: [early_exit(share, ensemble) for share in SHARES] for way, ensemble in ways.items()},
    )


def mean(of_halves) -> list[float]:
    return rounded([sum(values) / len(values) for values in zip(*of_halves)])


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]
