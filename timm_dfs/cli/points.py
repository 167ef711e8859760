"""Options of the commands that fit operating points: ``calibrate`` and ``export-hub``."""

from collections.abc import Sequence
from typing import Annotated

import typer

from ..calibration.fit import check_accuracy_drop, check_budget
from ..calibration.risk import check_confidence_level, check_shown_drop
from ..evaluation.flops import Costs
from ..inference.confidence import CONFIDENCES, PATIENCE
from ..inference.policy import ExitPolicy

Budgets = Annotated[
    list[float] | None,
    typer.Option(
        "--budget",
        help="A further preset: largest mean multiply-adds; a value up to 1 is a share of the last exit alone.",
    ),
]
MaxAccuracyDrops = Annotated[
    list[float] | None,
    typer.Option(
        "--max-accuracy-drop",
        help="A further preset: largest drop in accuracy below the last exit, percentage points.",
    ),
]
ConfidenceLevel = Annotated[
    float | None,
    typer.Option(
        help="E.g. 0.95: fit on half of the split, and on the other half bound the drop with this probability."
    ),
]
By = Annotated[
    str | None,
    typer.Option(
        help=f"Confidence that thresholds are compared with: {', '.join([*CONFIDENCES, PATIENCE])}; by default the one "
        "of them, without patience, whose presets cost least."
    ),
]

Together = Annotated[
    bool,
    typer.Option(
        "--ensemble/--no-ensemble",
        help="Let exits predict together with those before them if that is better on held-out samples.",
    ),
]


def check_points(
    costs: Costs,
    budget: Sequence[float] | None,
    drops: Sequence[float] | None,
    confidence_level: float | None,
    by: str | None,
) -> list[float]:
    """Check the options before logits are collected, which takes minutes, and return the budgets in multiply-adds.

    Raises:
        ValueError: If a value is out of range or there is no such confidence.
    """
    if by is not None:
        ExitPolicy([0.0], by)
    budgets = [value * costs.of_last_exit_alone() if 0 < value <= 1 else value for value in budget or ()]
    for value in budgets:
        check_budget(value, costs.of_exits(lazy=True))
    for drop in drops or ():
        check_accuracy_drop(drop)
        if confidence_level is not None:
            check_shown_drop(drop)
    if confidence_level is not None:
        check_confidence_level(confidence_level)
    return budgets
