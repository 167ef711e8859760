"""Fitting operating points to validation data.

A fitted point remembers its samples, so that measuring it on them can be refused.
"""

import math
import warnings
from collections.abc import Collection, Sequence
from functools import cached_property

import torch

from ..inference.confidence import PATIENCE, confidence_function
from ..inference.ensemble import ensemble_logits
from ..inference.policy import ExitPolicy
from .logits import check_data, early_exits
from .operating_point import Data, OperatingPoint, Source, check_flops, measure
from .seen import fingerprints
from .threshold_search import ThresholdSearch, Value, at_accuracy, within_budget


def fit_operating_point(
    val: Data,
    flops: Sequence[float],
    *,
    budget: float | None = None,
    accuracy: float | None = None,
    max_accuracy_drop: float | None = None,
    confidence: str = "max_prob",
    temperatures: Sequence[float] | torch.Tensor | None = None,
    ensemble: str | Sequence[Sequence[float]] | None = None,
    exits: Collection[int] | None = None,
    dataset: str = "",
    split: str = "validation",
) -> OperatingPoint:
    """Fit the best thresholds on validation data for a given cost or accuracy.

    Thresholds are searched for directly (see :mod:`timm_dfs.calibration.threshold_search`). On ``val`` they are never
    worse than those of geometric exit fractions, :func:`timm_dfs.budgeted_batch` with ``val`` for both. For patience,
    whose thresholds are whole numbers, every number of exits is tried, the same for all exits.

    Args:
        val: Validation logits (E, N, C) and targets (N,), disjoint from the samples to report on: see
            :func:`timm_dfs.measure_policy`.
        flops: Multiply-adds up to and including each exit (E,), e.g. ``exit_flops(model, lazy=True)``, which counts
            the heads of exits that are switched off too.
        budget: Largest mean multiply-adds per sample; the most accurate point within it is fitted.
        accuracy: Least accuracy, percent; the cheapest point that reaches it is fitted.
        max_accuracy_drop: Largest drop in accuracy below the last exit, percentage points; the cheapest point within
            it is fitted.
        confidence: Name of the confidence that thresholds are compared with.
        temperatures: One per exit, e.g. from :func:`timm_dfs.fit_temperatures`, given the ensemble's logits if there is
            one.
        ensemble: As for :class:`timm_dfs.ExitPolicy`. Every exit that may be active then is, since later exits count on
            it; where no sample should leave, its threshold is 1. Drops stay those below the last exit on its own.
        exits: Exits that may be active, by default all; the last one always is.
        dataset: Name of the data set of ``val``, for the record.
        split: Name of its split.

    Returns:
        The point, with its accuracy and cost on ``val``.

    Raises:
        ValueError: If not exactly one of ``budget``, ``accuracy`` and ``max_accuracy_drop`` is given, no thresholds
            achieve it, or the data are not finite logits with targets, at least one sample per exit.

    Example:
        >>> import torch, timm_dfs
        >>> logits, targets = 9 * torch.eye(4).repeat(3, 2, 1), torch.arange(8) % 4  # 3 exits, 8 samples, 4 classes
        >>> logits[0, 6:] = 0.1 * logits[0, [7, 6]]  # the first exit is unsure of two samples, and wrong
        >>> point = timm_dfs.fit_operating_point((logits, targets), flops=[10, 20, 40], max_accuracy_drop=0)
        >>> point.accuracy, point.average_flops
        (100.0, 12.5)
    """
    fitting = Fitting(val, flops, confidence, temperatures, ensemble, exits, dataset, split)
    goals = dict(budget=budget, accuracy=accuracy, max_accuracy_drop=max_accuracy_drop)
    given = [name for name, value in goals.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"Of {', '.join(goals)}, {' and '.join(given) or 'none'} is given; give exactly one.")
    if budget is not None:
        return fitting.within(budget)
    if max_accuracy_drop is not None:
        return fitting.dropping(max_accuracy_drop)
    return fitting.as_accurate_as(accuracy)  # type: ignore[arg-type]


def operating_frontier(
    val: Data,
    flops: Sequence[float],
    *,
    points: int = 40,
    confidence: str = "max_prob",
    temperatures: Sequence[float] | torch.Tensor | None = None,
    ensemble: str | Sequence[Sequence[float]] | None = None,
    exits: Collection[int] | None = None,
    dataset: str = "",
    split: str = "validation",
) -> list[OperatingPoint]:
    """Fit operating points of falling cost; the first never exits early.

    Args:
        points: Number of evenly spaced budgets to fit. Fitted points that on ``val`` cost more than another and are no
            more accurate are left out, except the first. For patience, all points are returned.

    Other arguments and errors as for :func:`timm_dfs.fit_operating_point`.

    Example:
        >>> import torch, timm_dfs
        >>> logits, targets = 9 * torch.eye(4).repeat(3, 2, 1), torch.arange(8) % 4  # 3 exits, 8 samples, 4 classes
        >>> logits[0, 6:] = 0.1 * logits[0, [7, 6]]  # the first exit is unsure of two samples, and wrong
        >>> points = timm_dfs.operating_frontier((logits, targets), flops=[10, 20, 40])
        >>> [(point.accuracy, point.average_flops) for point in points]
        [(100.0, 40.0), (100.0, 12.5), (75.0, 10.0)]
    """
    if points < 2:
        raise ValueError(f"points is {points}; give at least 2.")
    return Fitting(val, flops, confidence, temperatures, ensemble, exits, dataset, split).frontier(points)


class Fitting:
    """Fits several operating points to the same validation data, which are searched once.

    Arguments and errors as for :func:`timm_dfs.fit_operating_point`.
    """

    def __init__(
        self,
        val: Data,
        flops: Sequence[float],
        confidence: str = "max_prob",
        temperatures: Sequence[float] | torch.Tensor | None = None,
        ensemble: str | Sequence[Sequence[float]] | None = None,
        exits: Collection[int] | None = None,
        dataset: str = "",
        split: str = "validation",
    ):
        check_data("val", val)
        logits, targets = val
        self.num_exits, samples = logits.shape[:2]
        check_flops(flops, self.num_exits)
        if samples < self.num_exits:
            raise ValueError(f"There are {samples} validation samples for {self.num_exits} exits; give more.")
        self.val, self.flops, self.confidence = val, [float(value) for value in flops], confidence
        self.early = early_exits(exits, self.num_exits)
        self.never = ExitPolicy([math.inf] * self.num_exits, confidence, temperatures, ensemble)
        self.temperatures = self.never.temperatures
        self.source = Source(dataset, split, samples)
        self.seen = fingerprints(logits)
        correct = logits.argmax(-1) == targets
        self.last_exit_accuracy = 100 * (correct[-1].double().sum().item() / samples)
        warn_of_untrained(correct, logits.shape[-1], self.early)
        self.search: ThresholdSearch | None = None
        if confidence != PATIENCE:
            active = [*self.early, self.num_exits - 1]
            if ensemble is not None:
                logits = ensemble_logits(logits, ensemble, active)
                correct = logits.argmax(-1) == targets
            scaled = logits if temperatures is None else logits / torch.tensor(self.temperatures)[:, None, None]
            confidences = confidence_function(confidence)(scaled)
            self.search = ThresholdSearch(confidences, correct, self.flops, active, keep_active=ensemble is not None)

    def point(self, policy: ExitPolicy) -> OperatingPoint:
        """The operating point of a policy."""
        done = measure(policy, self.val, self.flops)
        return OperatingPoint(policy, done.average_flops, done.accuracy, self.source, seen=self.seen)

    def within(self, budget: float) -> OperatingPoint:
        """The most accurate point whose mean cost is at most ``budget`` multiply-adds."""
        check_budget(budget, [self.flops[k] for k in (*self.early, self.num_exits - 1)])
        return self._best(within_budget(budget, self.flops[-1]), f"a budget of {budget:g}")

    def dropping(self, max_accuracy_drop: float) -> OperatingPoint:
        """The cheapest point at most so many percentage points less accurate than the last exit."""
        check_accuracy_drop(max_accuracy_drop)
        return self.as_accurate_as(self.last_exit_accuracy - max_accuracy_drop)

    def as_accurate_as(self, accuracy: float) -> OperatingPoint:
        """The cheapest point of at least this accuracy, percent."""
        return self._best(at_accuracy(accuracy, self.flops[-1]), f"an accuracy of {accuracy:.2f} %")

    def frontier(self, points: int = 40) -> list[OperatingPoint]:
        """Points of falling cost, see :func:`timm_dfs.operating_frontier`."""
        if self.search is None:
            return self._patient
        found = [self.point(self.never.with_thresholds(thresholds)) for thresholds in self.search.frontier(points)]
        return found if self.never.ensemble is None else [self.point(self.never), *found]

    def _best(self, value: Value, wanted: str) -> OperatingPoint:
        if self.search is None:
            points = self._patient
        else:
            thresholds = self.search.best(value)
            points = [] if thresholds is None else [self.point(self.never.with_thresholds(thresholds))]
            if self.never.ensemble is not None:  # together, exits can be worse than the last one alone
                points.append(self.point(self.never))
        done = torch.tensor([(point.accuracy, point.average_flops) for point in points], dtype=torch.float64)
        values = value(*done.reshape(-1, 2).unbind(1))
        if not len(points) or values.max() == -math.inf:
            raise ValueError(
                f"No thresholds were found for {wanted} on the validation data, where the last exit has "
                f"{self.last_exit_accuracy:.2f} %; ask for less."
            )
        return points[int(values.argmax())]

    @cached_property
    def _patient(self) -> list[OperatingPoint]:
        """The points of every patience, from the most expensive; the first, of infinite patience, never exits early."""
        points = []
        for patience in (math.inf, *range(len(self.early) - 1, -1, -1)):
            thresholds = [patience if k in self.early else math.inf for k in range(self.num_exits)]
            points.append(self.point(self.never.with_thresholds(thresholds)))
        return points


def check_budget(budget: float, flops: Sequence[float]) -> None:
    """Raise ``ValueError`` unless a budget is between the costs of the first and the last exit that may be active."""
    if not min(flops) <= budget <= max(flops):
        raise ValueError(
            f"A budget of {budget:g} multiply-adds is out of range; the first exit that may be active costs "
            f"{min(flops):g}, the last {flops[-1]:g}."
        )


def check_accuracy_drop(max_accuracy_drop: float) -> None:
    """Raise ``ValueError`` unless a drop in accuracy is in percentage points."""
    if not 0 <= max_accuracy_drop <= 100:
        raise ValueError(f"max_accuracy_drop is {max_accuracy_drop}; give percentage points from 0 to 100.")


def warn_of_untrained(correct: torch.Tensor, classes: int, exits: Sequence[int]) -> None:
    """Warn if early exits predict no better than chance, given which predictions are correct: bool (E, N)."""
    samples = correct.shape[1]
    chance = 1 / classes
    limit = chance + 3 * math.sqrt(chance * (1 - chance) / samples)
    poor = [k for k in exits if correct[k].float().mean().item() <= limit]
    if poor and classes > 1:
        warnings.warn(
            f"Exits {', '.join(map(str, poor))} are correct no more often than chance ({chance:.1%}) on the "
            f"{samples} validation samples: are their heads trained?",
            stacklevel=4,
        )
