"""Everything a report shows of accuracy and cost, measured on test logits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..base.model import MultiExitModel
from ..calibration.budgeted_batch import BudgetPoint, budgeted_batch
from ..calibration.operating_point import Data, Measurement, measure_policy
from ..calibration.seen import fingerprints, refuse_seen
from ..evaluation.accuracy import Reliability, anytime_accuracy, calibration_error, reliability, risk_coverage
from ..evaluation.flops import exit_flops, last_exit_flops
from ..inference.policy import ExitPolicy
from ..inference.prediction import resolve_policy
from .published import Published, published_results


@dataclass(frozen=True)
class ExitAlone:
    """An exit as a network of its own, cut off there: early exit's rival at lower cost.

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
    """An operating point that came with the model.

    Attributes:
        policy: Its policy.
        measured: What it does; costs are those of what :func:`timm_dfs.predict` executes.
        published_flops: Its mean cost as published figures count, nothing skipped.
        rescued: Percent of the samples whose early answer is right and whose last exit's is wrong.
        harmed: Percent of the samples of which the reverse is true.
        exit_index: The exit that answers each sample (N,).
        fitted_on: What the model says of the data that it was fitted on, in words.
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
    """What was measured of one network on one data set's test samples.

    Attributes:
        samples: How many samples.
        classes: How many classes.
        exits: Each exit alone (E,).
        flops: What a sample costs that leaves at each exit, all heads before it computed (E,).
        last_exit_flops: What the last exit alone costs.
        points: The model's operating points by name.
        curve: Budgeted batch classification with thresholds from validation logits; empty without those.
        curve_samples: How many validation samples fixed its thresholds.
        reliability: How often each exit is right, by its confidence.
        risk_coverage: Coverage and risk of each exit.
        published: What others published of this network on this data set, if anything is known.
        published_flops: What each exit costs as published figures count (E,).
        published_curve: ``curve`` in that count; empty where nothing is published.
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

    @property
    def standard_error(self) -> float:
        """Of the last exit's accuracy, in percentage points, over the drawing of the samples."""
        right = self.exits[-1].accuracy / 100
        return 100 * math.sqrt(right * (1 - right) / self.samples)


def find(model: MultiExitModel, test: Data, val: Data | None = None, dataset: str = "") -> Findings:
    """Measure a network's exits and operating points.

    Args:
        model: The network; its ``presets`` are the operating points.
        test: Test logits (E, N, C) and targets (N,), which had no part in any choice.
        val: Validation logits (E, M, C) and targets (M,), from which the budgeted-batch curve gets its thresholds.
        dataset: Name of the data set, for published results.

    Raises:
        ValueError: If the data are not finite logits with targets, do not fit the model, or more than 1 % of the test
            samples are among the validation samples.
    """
    logits, targets = test
    if logits.shape[0] != model.num_exits:
        raise ValueError(f"test has {logits.shape[0]} exits, the model {model.num_exits}; they must be of one network.")
    accuracy, error = anytime_accuracy(logits, targets), calibration_error(logits, targets)
    if val is not None:
        refuse_seen(fingerprints(val[0]), logits, "test", "the budgeted-batch curve")
    alone = exit_flops(model, lazy=True, heads=())
    flops, published_flops = exit_flops(model, lazy=True), exit_flops(model)
    published = published_results(dataset, model.num_classes, published_flops)
    executed = {tuple(range(model.num_exits)): flops}  # by the exits that may answer: counting takes seconds
    policies = {name: resolve_policy(model, name) for name in model.presets}
    for policy in policies.values():
        if policy.answering not in executed:
            executed[policy.answering] = exit_flops(model, lazy=True, heads=policy.answering)
    return Findings(
        samples=len(targets),
        classes=model.num_classes,
        exits=tuple(ExitAlone(*row) for row in zip(accuracy.tolist(), alone, error.tolist(), strict=True)),
        flops=tuple(flops),
        last_exit_flops=last_exit_flops(model),
        points={
            name: _point(policy, model.presets[name], test, executed[policy.answering], published_flops)
            for name, policy in policies.items()
        },
        curve=tuple(budgeted_batch(val, test, flops)) if val else (),
        curve_samples=len(val[1]) if val else 0,
        reliability=reliability(logits, targets),
        risk_coverage=risk_coverage(logits, targets),
        published=published,
        published_flops=tuple(published_flops),
        published_curve=tuple(budgeted_batch(val, test, published_flops)) if val and published else (),
    )


def _point(policy: ExitPolicy, preset: dict, test: Data, flops: list[int], published_flops: list[int]) -> Point:
    logits, targets = test
    exits = policy.exit_index(logits)
    right = logits.argmax(-1) == targets
    answered, last = right.gather(0, exits[None])[0], right[-1]
    return Point(
        policy=policy,
        measured=measure_policy(policy, test, flops),
        published_flops=measure_policy(policy, test, published_flops).average_flops,
        rescued=100 * (answered & ~last).double().mean().item(),
        harmed=100 * (last & ~answered).double().mean().item(),
        exit_index=exits,
        fitted_on=_fitted_on(preset),
    )


def _fitted_on(preset: dict) -> str:
    source = preset.get("fitted_on")
    if not source:
        return "not recorded"
    return f"{source['dataset']}, {source['split']}: {source['samples']:,} samples"
