"""Accuracies and costs of a report, measured on test logits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..base.model import MultiExitModel
from ..calibration.budgeted_batch import BudgetPoint, budgeted_batch
from ..calibration.operating_point import Data, Measurement, measure_policy
from ..calibration.seen import fingerprints, refuse_seen
from ..evaluation.accuracy import Reliability, anytime_accuracy, calibration_error, reliability, risk_coverage
from ..evaluation.flops import Costs
from ..inference.policy import ExitPolicy
from ..inference.prediction import resolve_policy
from .published import Published, published_results
from .without_exits import WithoutExits, networks_without_exits


@dataclass(frozen=True)
class ExitAlone:
    """An exit as a network that ends there: the baseline for early exit at that cost.

    Attributes:
        accuracy: Top-1, percent.
        flops: Multiply-adds, no other head computed.
        calibration_error: Expected calibration error, in [0, 1].
    """

    accuracy: float
    flops: float
    calibration_error: float


@dataclass(frozen=True)
class Point:
    """An operating point stored with the model.

    Attributes:
        policy: Policy of the operating point.
        measured: Accuracy and cost; costs count what :func:`timm_dfs.predict` executes.
        published_flops: Mean cost in the convention of published figures, which skips nothing.
        rescued: Percentage of samples for which the exit taken is right and the last exit wrong.
        harmed: Percentage of samples for which the exit taken is wrong and the last exit right.
        exit_index: Exit that each sample takes (N,).
        fitted_on: Description of the data that the point was fitted on, as stored with the model.
    """

    policy: ExitPolicy
    measured: Measurement
    published_flops: float
    rescued: float
    harmed: float
    exit_index: torch.Tensor
    fitted_on: str


@dataclass(frozen=True)
class Findings:
    """Measurements of one network on one data set's test samples.

    Attributes:
        samples: Number of samples.
        classes: Number of classes.
        exits: Each exit alone (E,).
        flops: Multiply-adds of a sample that takes each exit, with all heads before it computed (E,).
        last_exit_flops: Multiply-adds of the last exit alone.
        points: The model's operating points by name.
        curve: Budgeted batch classification with thresholds from validation logits; empty without those.
        curve_samples: Number of validation samples that fixed the curve's thresholds.
        reliability: Accuracy of each exit by confidence.
        risk_coverage: Coverage and risk of each exit.
        published: Published results of this network on this data set, if there are any.
        published_flops: Multiply-adds of each exit in the published convention (E,).
        published_curve: ``curve`` in that convention; empty where nothing is published.
        rivals: Published networks without early exits on this data set.
    """

    samples: int
    classes: int
    exits: tuple[ExitAlone, ...]
    flops: tuple[float, ...]
    last_exit_flops: float
    points: Mapping[str, Point]
    curve: tuple[BudgetPoint, ...]
    curve_samples: int
    reliability: Reliability
    risk_coverage: list[tuple[torch.Tensor, torch.Tensor]]
    published: Published | None
    published_flops: tuple[float, ...]
    published_curve: tuple[BudgetPoint, ...]
    rivals: tuple[WithoutExits, ...] = ()

    def best_within(self, flops: float) -> tuple[float, float] | None:
        """Mean multiply-adds and accuracy of the most accurate operating point or point of the curve within a cost."""
        points = [(point.measured.average_flops, point.measured.accuracy) for point in self.points.values()]
        points += [(point.average_flops, point.accuracy) for point in self.curve]
        return max((point for point in points if point[0] <= flops), key=lambda point: point[1], default=None)

    @property
    def standard_error(self) -> float:
        """Standard error of the last exit's accuracy over the drawing of the samples, in percentage points."""
        right = self.exits[-1].accuracy / 100
        return 100 * math.sqrt(right * (1 - right) / self.samples)


def find(model: MultiExitModel, test: Data, val: Data | None = None, dataset: str = "") -> Findings:
    """Measure a network's exits and operating points.

    Args:
        model: Network whose ``presets`` are the operating points.
        test: Test logits (E, N, C) and targets (N,), which had no part in any choice.
        val: Validation logits (E, M, C) and targets (M,) that fix the thresholds of the budgeted-batch curve.
        dataset: Name of the data set, for published results.

    Raises:
        ValueError: If the data are not finite logits with targets, do not fit the model, or more than 1 % of the test
            samples are among the validation samples.
    """
    logits, targets = test
    if logits.shape[0] != model.num_exits:
        raise ValueError(f"test has {logits.shape[0]} exits, the model {model.num_exits}; give logits of this model.")
    accuracy, error = anytime_accuracy(logits, targets), calibration_error(logits, targets)
    if val is not None:
        refuse_seen(fingerprints(val[0]), logits, "test", "the budgeted-batch curve")
    costs = Costs(model)
    alone = costs.of_exits(lazy=True, heads=())
    flops, published_flops = costs.of_exits(lazy=True), costs.of_exits()
    published = published_results(dataset, model.num_classes, published_flops)
    policies = {name: resolve_policy(model, name) for name in model.presets}
    return Findings(
        samples=len(targets),
        classes=model.num_classes,
        exits=tuple(ExitAlone(*row) for row in zip(accuracy.tolist(), alone, error.tolist(), strict=True)),
        flops=tuple(flops),
        last_exit_flops=costs.of_last_exit_alone(),
        points={
            name: _point(
                policy, model.presets[name], test, costs.of_exits(lazy=True, heads=policy.answering), published_flops
            )
            for name, policy in policies.items()
        },
        curve=tuple(budgeted_batch(val, test, flops)) if val else (),
        curve_samples=len(val[1]) if val else 0,
        reliability=reliability(logits, targets),
        risk_coverage=risk_coverage(logits, targets),
        published=published,
        published_flops=tuple(published_flops),
        published_curve=tuple(budgeted_batch(val, test, published_flops)) if val and published else (),
        rivals=networks_without_exits(dataset, model.num_classes),
    )


def _point(policy: ExitPolicy, preset: dict, test: Data, flops: list[int], published_flops: list[int]) -> Point:
    logits, targets = test
    exits = policy.exit_index(logits)
    taken = (policy.predicted(logits).argmax(-1) == targets).gather(0, exits[None])[0]
    last = logits[-1].argmax(-1) == targets
    return Point(
        policy=policy,
        measured=measure_policy(policy, test, flops),
        published_flops=measure_policy(policy, test, published_flops).average_flops,
        rescued=100 * (taken & ~last).double().mean().item(),
        harmed=100 * (last & ~taken).double().mean().item(),
        exit_index=exits,
        fitted_on=_fitted_on(preset),
    )


def _fitted_on(preset: dict) -> str:
    source = preset.get("fitted_on")
    if not source:
        return "not recorded"
    return f"{source['dataset']}, {source['split']}: {source['samples']:,} samples"
