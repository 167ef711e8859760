"""Named operating points, fitted together."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..inference.confidence import CONFIDENCES, PATIENCE
from ..inference.ensemble import ensemble_logits
from .ensemble import choose_ensemble
from .fit import Fitting
from .logits import check_data
from .operating_point import Data, OperatingPoint
from .risk import bound_risk, control_risk
from .temperature import fit_temperatures

NAMED = {"accurate": 0.0, "balanced": 0.5, "fast": 2.0}
"""Presets of every model: the cheapest point whose drop in accuracy on validation data is at most so many points."""


def budget_name(budget: float) -> str:
    """Name of the preset for a budget in multiply-adds, e.g. ``"100M"``."""
    return f"{budget / 1e6:g}M"


def drop_name(max_accuracy_drop: float) -> str:
    """Name of the preset for a largest drop in accuracy, percentage points, e.g. ``"drop-1"``."""
    return f"drop-{max_accuracy_drop:g}"


def fit_presets(
    val: Data,
    flops: Sequence[float],
    *,
    budgets: Sequence[float] = (),
    max_accuracy_drops: Sequence[float] = (),
    held_out: Data | None = None,
    confidence_level: float = 0.95,
    confidence: str = "max_prob",
    temperatures: Sequence[float] | torch.Tensor | None = None,
    ensemble: str | Sequence[Sequence[float]] | None = None,
    exits: Collection[int] | None = None,
    dataset: str = "",
    split: str = "validation",
) -> dict[str, OperatingPoint]:
    """Fit the presets ``accurate``, ``balanced`` and ``fast`` (:data:`NAMED`), and further ones.

    Args:
        val: Validation logits (E, N, C) and targets (N,).
        flops: Multiply-adds up to and including each exit (E,).
        budgets: Mean multiply-adds per sample of further presets, named ``"100M"``.
        max_accuracy_drops: Drops in accuracy, percentage points, of further presets, named ``"drop-1"``.
        held_out: Logits and targets disjoint from ``val``. With them every point gets a bound on its drop in accuracy,
            and the points for ``max_accuracy_drops`` keep to them with ``confidence_level`` (see
            :mod:`timm_dfs.calibration.risk`) instead of on ``val`` alone.
        confidence_level: Probability with which each bound holds.

    Other arguments and errors as for :func:`timm_dfs.fit_operating_point`.

    Returns:
        Operating points by name.

    Raises:
        ValueError: If two presets would have one name, too.

    Example:
        >>> import torch, timm_dfs
        >>> logits, targets = 9 * torch.eye(4).repeat(3, 1, 1), torch.arange(4)  # 3 exits, 4 samples, 4 classes
        >>> points = timm_dfs.fit_presets((logits, targets), flops=[10, 20, 40], max_accuracy_drops=[5])
        >>> {name: point.average_flops for name, point in points.items()}
        {'accurate': 10.0, 'balanced': 10.0, 'fast': 10.0, 'drop-5': 10.0}
    """
    names = [*map(budget_name, budgets), *map(drop_name, max_accuracy_drops)]
    if len(set(names)) < len(names):
        raise ValueError(f"Several presets would have one name, among {', '.join(names)}; give values further apart.")
    fitting = Fitting(val, flops, confidence, temperatures, ensemble, exits, dataset, split)
    points = {name: fitting.dropping(drop) for name, drop in NAMED.items()}
    points.update((budget_name(budget), fitting.within(budget)) for budget in budgets)
    if held_out is None:
        points.update((drop_name(drop), fitting.dropping(drop)) for drop in max_accuracy_drops)
        return points
    points = {name: bound_risk(point, held_out, confidence_level) for name, point in points.items()}
    frontier = fitting.frontier() if max_accuracy_drops else []
    for drop in max_accuracy_drops:
        points[drop_name(drop)] = control_risk(frontier, held_out, drop, confidence_level)
    return points


def operating_points(
    val: Data, flops: Sequence[float], by: str | None = None, ensemble: bool = True, **options: Any
) -> dict[str, OperatingPoint]:
    """Fit presets with temperatures, and choose whether exits predict together and which confidence decides.

    Args:
        val: Held-out logits (E, N, C) and targets (N,).
        flops: Multiply-adds up to and including each exit (E,).
        by: The confidence; ``None`` for that of :data:`~timm_dfs.inference.confidence.CONFIDENCES` for which the sum of
            the named points' costs is least.
        ensemble: Let :func:`~timm_dfs.calibration.ensemble.choose_ensemble` choose; ``False``: exits predict alone.
        **options: Further arguments of :func:`timm_dfs.fit_presets`.
    """
    check_data("val", val)
    logits, targets = val
    together = choose_ensemble(val) if ensemble and 1 < len(logits) <= len(targets) // 2 else None
    scored = logits if together is None else ensemble_logits(logits, together)
    temperatures = fit_temperatures(scored, targets)
    found = [
        fit_presets(
            val,
            flops,
            confidence=name,
            temperatures=None if name == PATIENCE else temperatures,
            ensemble=together,
            **options,
        )
        for name in ([by] if by else CONFIDENCES)
    ]
    return min(found, key=lambda points: sum(points[name].average_flops for name in NAMED))
