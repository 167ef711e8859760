"""Options of the commands that fit operating points: ``calibrate`` and ``export-hub``."""

from collections.abc import Sequence
from typing import Annotated

import typer

from ..calibration.fit import check_accuracy_drop, check_budget
from ..calibration.risk import check_confidence_level
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
    flops: Sequence[float],
    budgets: Sequence[float],
    drops: Sequence[float],
    confidence_level: float | None,
    by: str | None,
) -> None:
    """Check the options before logits are collected, which takes minutes.

    Raises:
        ValueError: If a value is out of range or there is no such confidence.
    """
    if by is not None:
        ExitPolicy([0.0], by)
    for budget in budgets:
        check_budget(budget, flops)
    for drop in drops:
        check_accuracy_drop(drop)
    if confidence_level is not None:
        check_confidence_level(confidence_level)
