"""Named operating points: fitting those that every model has, and writing them beside the weights."""

from collections.abc import Collection, Sequence

import torch

from .fit import fit_operating_point, operating_frontier
from .operating_point import Data, OperatingPoint
from .risk import bound_risk, control_risk

NAMED = {"accurate": 0.0, "balanced": 0.5, "fast": 2.0}
"""Each the cheapest point that on validation data is at most so many points less accurate than the last exit."""


def budget_name(budget: float) -> str:
    """What the preset for a budget in multiply-adds is called: ``"100M"``."""
    return f"{budget / 1e6:g}M"


def loss_name(loss: float) -> str:
    """What the preset for a largest loss in percentage points is called: ``"loss-1"``."""
    return f"loss-{loss:g}"


def fit_presets(
    val: Data,
    flops: Sequence[float],
    *,
    budgets: Sequence[float] = (),
    losses: Sequence[float] = (),
    held_out: Data | None = None,
    probability: float = 0.95,
    confidence: str = "max_prob",
    temperatures: Sequence[float] | torch.Tensor | None = None,
    exits: Collection[int] | None = None,
    dataset: str = "",
    split: str = "validation",
) -> dict[str, OperatingPoint]:
    """The points of :data:`NAMED`, and of budgets and losses, by name.

    Args:
        val: Validation logits (E, N, C) and targets (N,).
        flops: Multiply-adds up to and including each exit (E,).
        budgets: In multiply-adds; see :func:`budget_name`.
        losses: In percentage points below the last exit; see :func:`loss_name`.
        held_out: Logits and targets that are in ``val`` not: every point gets a bound on its loss from them, and
            those for ``losses`` keep to them with ``probability`` (see :mod:`timm_dfs.risk`), not on ``val`` alone.
        probability: With which each statement about risk holds.

    Other arguments and errors as for :func:`timm_dfs.fit_operating_point`.
    """
    settings = dict(confidence=confidence, temperatures=temperatures, exits=exits, dataset=dataset, split=split)

    def fit(**wanted: float) -> OperatingPoint:
        point = fit_operating_point(val, flops, **wanted, **settings)  # type: ignore[arg-type]
        return point if held_out is None else bound_risk(point, held_out, probability)

    points = {name: fit(loss=loss) for name, loss in NAMED.items()}
    points.update((budget_name(budget), fit(budget=budget)) for budget in budgets)
    if losses and held_out is not None:
        frontier = operating_frontier(val, flops, **settings)  # type: ignore[arg-type]
        points.update((loss_name(loss), control_risk(frontier, held_out, loss, probability)) for loss in losses)
    else:
        points.update((loss_name(loss), fit(loss=loss)) for loss in losses)
    return points


def halves(data: Data) -> tuple[Data, Data]:
    """Two random halves of the samples, always the same."""
    logits, targets = data
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    return (logits[:, first], targets[first]), (logits[:, second], targets[second])
