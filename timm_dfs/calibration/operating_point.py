"""Operating points: a fitted policy with its accuracy and cost, and its measurement on other data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch

from ..inference.confidence import PATIENCE
from ..inference.ensemble import Weights
from ..inference.policy import ExitPolicy
from .logits import check_data
from .seen import refuse_seen

Data = tuple[torch.Tensor, torch.Tensor]
"""Logits (E, N, C) and targets (N,)."""


OF_POLICY = ("thresholds", "confidence", "temperatures", "ensemble")
"""Fields of a preset that make its policy."""


@dataclass(frozen=True)
class Source:
    """The data that an operating point was fitted on.

    Attributes:
        dataset: Name of the data set.
        split: Name of its split.
        samples: Number of its samples.
    """

    dataset: str
    split: str
    samples: int


@dataclass(frozen=True)
class Risk:
    """A bound on the accuracy that an operating point gives up; see :mod:`timm_dfs.calibration.risk`.

    Attributes:
        max_accuracy_drop: Largest drop in accuracy from the last exit's to the policy's, percentage points.
        confidence_level: Probability, over the drawing of the samples, with which the bound holds.
        samples: Number of samples that the bound was computed on.
    """

    max_accuracy_drop: float
    confidence_level: float
    samples: int


@dataclass(frozen=True)
class Latency:
    """Latency of an operating point, for single images on one machine; see :mod:`timm_dfs.calibration.latency`.

    Attributes:
        mean_ms: Mean over the samples, milliseconds.
        p95_ms: Milliseconds that at most 5 % of the samples exceed.
        threads: Threads when exits were timed.
        machine: Processor or accelerator.
    """

    mean_ms: float
    p95_ms: float
    threads: int
    machine: str


@dataclass(frozen=True)
class OperatingPoint:
    """A fitted policy, with its accuracy and cost on the samples that it was fitted on.

    Attributes:
        policy: The policy.
        average_flops: Mean multiply-adds per sample.
        accuracy: Top-1, percent, on the samples fitted on; on others it is somewhat lower.
        fitted_on: The data fitted on.
        risk: Bound on the drop in accuracy on other samples, if one was computed.
        latency: Latency on the machine that the point was fitted for, if it was.

    Example:
        >>> import torch, timm_dfs
        >>> logits, targets = 9 * torch.eye(4).repeat(2, 1, 1), torch.arange(4)  # 2 exits, 4 samples, 4 classes
        >>> point = timm_dfs.fit_operating_point((logits, targets), flops=[10, 30], max_accuracy_drop=0)
        >>> point.accuracy, point.average_flops
        (100.0, 10.0)
        >>> sorted(point.preset())  # as config.json holds it
        ['accuracy', 'average_flops', 'confidence', 'fitted_on', 'thresholds']
    """

    policy: ExitPolicy
    average_flops: float
    accuracy: float
    fitted_on: Source
    risk: Risk | None = None
    latency: Latency | None = None
    seen: frozenset[bytes] = field(default=frozenset(), repr=False, compare=False)

    def preset(self) -> dict:
        """The point as ``config.json`` holds it; infinity, which JSON does not know, is written as None."""
        policy = self.policy
        return dict(
            thresholds=policy.json_thresholds,
            confidence=policy.confidence,
            **({"temperatures": list(policy.temperatures)} if policy.temperatures else {}),
            **({"ensemble": _as_lists(policy.ensemble)} if policy.ensemble else {}),
            average_flops=self.average_flops,
            accuracy=self.accuracy,
            fitted_on=vars(self.fitted_on).copy(),
            **({"risk": vars(self.risk).copy()} if self.risk else {}),
            **({"latency": vars(self.latency).copy()} if self.latency else {}),
        )


def _as_lists(ensemble: str | Weights) -> str | list[list[float]]:
    return ensemble if isinstance(ensemble, str) else [list(row) for row in ensemble]


def check_preset(preset: dict, num_exits: int | None) -> None:
    """Refuse a preset whose known fields are not what :meth:`OperatingPoint.preset` writes.

    Calibration, saving, loading and publishing all check with this function. Only ``thresholds`` is required, and
    fields of other names are not checked. A threshold is on the scale of its confidence: in [0, 1], or for patience in
    [0, E - 1]; None, or infinity, is for an exit that never predicts.

    Args:
        preset: The preset.
        num_exits: Number of exits E of the model; None if it is unknown.

    Raises:
        ValueError: If a field is not what is said above.
    """
    policy = ExitPolicy.from_preset(preset)
    exits = len(policy.thresholds) if num_exits is None else num_exits
    policy.check_exits(exits)
    largest = exits - 1 if policy.confidence == PATIENCE else 1
    for value in policy.thresholds:
        if not 0 <= value <= largest and value != math.inf:
            raise ValueError(
                f"It has the threshold {value:g}, but {policy.confidence} is in [0, {largest}]; give None (null in "
                "JSON) for an exit that never predicts."
            )
    for name, highest in (("average_flops", math.inf), ("accuracy", 100.0)):
        if name in preset and not _in_range(preset[name], highest):
            raise ValueError(f"{name} is {preset[name]!r}; give a number from 0 to {highest}.")
    for name, kind in (("fitted_on", Source), ("risk", Risk), ("latency", Latency)):
        if name in preset:
            value = preset[name]
            wanted = kind.__dataclass_fields__
            if not isinstance(value, dict) or not wanted.keys() <= value.keys():
                raise ValueError(f"{name} is {value!r}; give a dict with {', '.join(wanted)}.")
            numbers = [key for key, of in wanted.items() if of.type is not str]
            if not all(_in_range(value[key], math.inf) for key in numbers):
                raise ValueError(f"{name} is {value!r}; {' and '.join(numbers)} must be numbers.")


def _in_range(value: object, highest: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= highest and value < math.inf


@dataclass(frozen=True)
class Measurement:
    """Accuracy and cost of a policy on samples.

    Attributes:
        accuracy: Top-1, percent.
        average_flops: Mean multiply-adds per sample.
        exit_shares: Share of the samples that left at each exit (E,).
        last_exit_accuracy: Top-1 of the last exit on all samples, on its own, percent.
        samples: Number of samples.

    Example:
        >>> import torch
        >>> from timm_dfs import ExitPolicy, measure_policy
        >>> logits, targets = 9 * torch.eye(4).repeat(2, 1, 1), torch.arange(4)  # 2 exits, 4 samples, 4 classes
        >>> measure_policy(ExitPolicy([None, 0.0]), (logits, targets), flops=[10, 30]).exit_shares
        (0.0, 1.0)
    """

    accuracy: float
    average_flops: float
    exit_shares: tuple[float, ...]
    last_exit_accuracy: float
    samples: int


def measure_policy(policy: ExitPolicy | OperatingPoint, test: Data, flops: Sequence[float]) -> Measurement:
    """Measure a policy, or an operating point's policy, on test data.

    Args:
        policy: The policy. An operating point remembers the samples that it was fitted on.
        test: Test logits (E, N, C) and targets (N,).
        flops: Multiply-adds up to and including each exit (E,).

    Raises:
        ValueError: If the point was fitted on these samples, or the data do not fit the policy.

    Example:
        >>> import torch
        >>> from timm_dfs import ExitPolicy, measure_policy
        >>> logits, targets = 9 * torch.eye(4).repeat(2, 1, 1), torch.arange(4)  # 2 exits, 4 samples, 4 classes
        >>> measured = measure_policy(ExitPolicy([0.5, 0.0]), (logits, targets), flops=[10, 30])
        >>> measured.accuracy, measured.average_flops
        (100.0, 10.0)
    """
    check_data("test", test)
    check_flops(flops, len(test[0]))
    if isinstance(policy, OperatingPoint):
        refuse_seen(policy.seen, test[0], "test", "the operating point")
        policy = policy.policy
    return measure(policy, test, flops)


def measure(policy: ExitPolicy, data: Data, flops: Sequence[float]) -> Measurement:
    """Measure a policy as :func:`measure_policy` does, on any data."""
    logits, targets = data
    exits, at_exit = outcomes(policy, data)
    samples = len(targets)
    return Measurement(
        accuracy=100 * (at_exit.double().sum().item() / samples),
        average_flops=torch.tensor(flops, dtype=torch.float64)[exits].sum().item() / samples,
        exit_shares=tuple((torch.bincount(exits, minlength=len(logits)).double() / samples).tolist()),
        last_exit_accuracy=100 * ((logits[-1].argmax(-1) == targets).double().sum().item() / samples),
        samples=samples,
    )


def outcomes(policy: ExitPolicy, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """The exit that each sample takes (N,), and whether its prediction there is its target (N,)."""
    logits, targets = data
    exits = policy.exit_index(logits)
    correct = policy.predicted(logits).argmax(-1) == targets
    return exits, correct.gather(0, exits[None])[0]


def check_flops(flops: Sequence[float], num_exits: int) -> None:
    """Raise ``ValueError`` unless there is one finite cost above 0 for each exit."""
    if len(flops) != num_exits or not all(0 < value < math.inf for value in flops):
        raise ValueError(f"flops is {list(flops)}; give the multiply-adds of each of {num_exits} exits.")
