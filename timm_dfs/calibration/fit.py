"""Operating points: a policy, what it costs and how well it does, and which data say so.

Thresholds are fitted on validation data and measured on other data. An operating point remembers the samples it was
fitted on, and what reports refuses them.
"""

import math
import warnings
from collections.abc import Collection, Sequence

import torch

from ..inference.confidence import PATIENCE, confidence_function
from ..inference.policy import ExitPolicy
from .logits import check_data
from .operating_point import (
    Data,
    OperatingPoint,
    Source,
    check_flops,
    fingerprints,
    measure,
)
from .threshold_search import ThresholdSearch, Value, at_accuracy, within_budget


def fit_operating_point(
    val: Data,
    flops: Sequence[float],
    *,
    budget: float | None = None,
    accuracy: float | None = None,
    loss: float | None = None,
    confidence: str = "max_prob",
    temperatures: Sequence[float] | torch.Tensor | None = None,
    exits: Collection[int] | None = None,
    dataset: str = "",
    split: str = "validation",
) -> OperatingPoint:
    """The best thresholds on validation data for a wanted cost or accuracy.

    They are found directly (see :mod:`timm_dfs.threshold_search`) and on ``val`` never worse than those of geometric
    exit fractions, :func:`timm_dfs.budgeted_batch` with ``val`` for both. Of patience, which has no thresholds
    between its whole numbers, every number of exits is tried, the same for all exits.

    Args:
        val: Validation logits (E, N, C) and targets (N,). Not those to be reported on: see :func:`measure_policy`.
        flops: Multiply-adds up to and including each exit (E,), e.g. ``exit_flops(model, lazy=True)``, which counts
            the heads of exits that never answer too.
        budget: Most multiply-adds per sample, on average: the most accurate point within it.
        accuracy: Least accuracy, percent: the cheapest point that has it.
        loss: Most percentage points of accuracy below the last exit's: the cheapest point that keeps to it.
        confidence: Name of the confidence.
        temperatures: One per exit, e.g. from :func:`timm_dfs.fit_temperatures`.
        exits: The exits that may answer, by default all; the last one may always.
        dataset: Name of the data set that ``val`` are of, for the record.
        split: Name of the split.

    Returns:
        The point, and what it does on ``val``.

    Raises:
        ValueError: If not exactly one of ``budget``, ``accuracy`` and ``loss`` is given, nothing achieves it, or the
            data are no finite logits with targets, at least one sample per exit.
    """
    fitting = _Fitting(val, flops, confidence, temperatures, exits, dataset, split)
    wanted = [name for name, value in (("budget", budget), ("accuracy", accuracy), ("loss", loss)) if value is not None]
    if len(wanted) != 1:
        raise ValueError(f"Of budget, accuracy and loss {' and '.join(wanted) or 'none'} is given; give exactly one.")
    if budget is not None:
        return fitting.within(budget)
    if loss is not None:
        check_loss(loss)
        accuracy = fitting.last_exit_accuracy - loss
    return fitting.as_accurate_as(accuracy)  # type: ignore[arg-type]


def operating_frontier(
    val: Data,
    flops: Sequence[float],
    *,
    points: int = 40,
    confidence: str = "max_prob",
    temperatures: Sequence[float] | torch.Tensor | None = None,
    exits: Collection[int] | None = None,
    dataset: str = "",
    split: str = "validation",
) -> list[OperatingPoint]:
    """Operating points from the dearest to the cheapest; the first never leaves early.

    Args:
        points: How many budgets to fit, evenly spaced; of what they give, a point that on ``val`` is dearer than
            another and no more accurate is left out, the first excepted. Of patience, all there are.

    Other arguments and errors as for :func:`fit_operating_point`.
    """
    if points < 2:
        raise ValueError(f"points is {points}; give at least 2.")
    return _Fitting(val, flops, confidence, temperatures, exits, dataset, split).frontier(points)


class _Fitting:
    """Validation data and the choices that all points fitted on them share."""

    def __init__(
        self,
        val: Data,
        flops: Sequence[float],
        confidence: str,
        temperatures: Sequence[float] | torch.Tensor | None,
        exits: Collection[int] | None,
        dataset: str,
        split: str,
    ):
        check_data("val", val)
        logits, targets = val
        self.num_exits, samples = logits.shape[:2]
        check_flops(flops, self.num_exits)
        if samples < self.num_exits:
            raise ValueError(f"There are {samples} validation samples for {self.num_exits} exits; give more.")
        self.val, self.flops, self.confidence = val, [float(value) for value in flops], confidence
        self.early = self._check_exits(exits)
        never = ExitPolicy([math.inf] * self.num_exits, confidence, temperatures)
        self.temperatures = never.temperatures
        self.source = Source(dataset, split, samples)
        self.seen = fingerprints(logits)
        self.correct = logits.argmax(-1) == targets
        self.last_exit_accuracy = 100 * (self.correct[-1].double().sum().item() / samples)
        warn_of_untrained(self.correct, logits.shape[-1], self.early)
        self.search: ThresholdSearch | None = None
        if confidence != PATIENCE:
            scaled = logits if temperatures is None else logits / torch.tensor(self.temperatures)[:, None, None]
            self.search = ThresholdSearch(
                confidence_function(confidence)(scaled), self.correct, self.flops, [*self.early, self.num_exits - 1]
            )

    def _check_exits(self, exits: Collection[int] | None) -> list[int]:
        last = self.num_exits - 1
        if exits is None:
            return list(range(last))
        unknown = [k for k in exits if k not in range(self.num_exits)]
        if unknown:
            raise ValueError(f"exits names {unknown}; the exits are 0 to {last}.")
        return sorted(set(exits) - {last})

    def point(self, policy: ExitPolicy) -> OperatingPoint:
        done = measure(policy, self.val, self.flops)
        return OperatingPoint(policy, done.average_flops, done.accuracy, self.source, seen=self.seen)

    def within(self, budget: float) -> OperatingPoint:
        check_budget(budget, [self.flops[k] for k in (*self.early, self.num_exits - 1)])
        return self._best(within_budget(budget, self.flops[-1]), f"a budget of {budget:g}")

    def as_accurate_as(self, accuracy: float) -> OperatingPoint:
        return self._best(at_accuracy(accuracy, self.flops[-1]), f"an accuracy of {accuracy:.2f} %")

    def frontier(self, points: int) -> list[OperatingPoint]:
        if self.search is None:
            return self._patient()
        return [self.point(self._policy(thresholds)) for thresholds in self.search.frontier(points)]

    def _best(self, value: Value, wanted: str) -> OperatingPoint:
        found: OperatingPoint | None = None
        if self.search is None:
            points = self._patient()
            done = torch.tensor([(point.accuracy, point.average_flops) for point in points], dtype=torch.float64)
            values = value(*done.unbind(1))
            found = points[int(values.argmax())] if values.max() > -math.inf else None
        elif (thresholds := self.search.best(value)) is not None:
            found = self.point(self._policy(thresholds))
        if found is None:
            raise ValueError(
                f"No thresholds were found for {wanted} on the validation data, where the last exit has "
                f"{self.last_exit_accuracy:.2f} %; ask for less."
            )
        return found

    def _policy(self, thresholds: Sequence[float]) -> ExitPolicy:
        return ExitPolicy(thresholds, self.confidence, self.temperatures)

    def _patient(self) -> list[OperatingPoint]:
        """All patiences, from the dearest; the first is never content."""
        points = []
        for patience in (math.inf, *range(len(self.early) - 1, -1, -1)):
            thresholds = [patience if k in self.early else math.inf for k in range(self.num_exits)]
            points.append(self.point(self._policy(thresholds)))
        return points


def check_budget(budget: float, flops: Sequence[float]) -> None:
    """Raise ``ValueError`` unless a budget is between the costs of the first and the last exit that may answer."""
    if not min(flops) <= budget <= max(flops):
        raise ValueError(
            f"A budget of {budget:g} multiply-adds cannot be had or spent; the first exit that may answer takes "
            f"{min(flops):g}, the last {flops[-1]:g}."
        )


def check_loss(loss: float) -> None:
    """Raise ``ValueError`` unless a loss of accuracy is in percentage points."""
    if not 0 <= loss <= 100:
        raise ValueError(f"loss is {loss}; give percentage points from 0 to 100.")


def warn_of_untrained(correct: torch.Tensor, classes: int, exits: Sequence[int]) -> None:
    """Warn where early exits answer no better than chance: correct answers, bool (E, N)."""
    samples = correct.shape[1]
    chance = 1 / classes
    limit = chance + 3 * math.sqrt(chance * (1 - chance) / samples)
    poor = [k for k in exits if correct[k].float().mean().item() <= limit]
    if poor and classes > 1:
        warnings.warn(
            f"Exits {', '.join(map(str, poor))} are right no more often than chance ({chance:.1%}) on the "
            f"{samples} validation samples: are their heads trained?",
            stacklevel=4,
        )
