"""Operating points within a latency, from the latency of each exit measured on the machine that will run the model."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..inference.policy import ExitPolicy
from .fit import Fitting
from .operating_point import Data, Latency, OperatingPoint, check_flops

SLOWEST = 0.04
"""Share of the samples fitted on that may leave at an exit slower than a 95th percentile: a fifth of the 5 % is kept in
reserve, because other samples and the time of one exit vary."""


def fit_latency(
    val: Data,
    flops: Sequence[float],
    latencies: Sequence[float],
    policy: ExitPolicy,
    *,
    mean: float | None = None,
    p95: float | None = None,
    threads: int = 1,
    machine: str = "",
    dataset: str = "",
    split: str = "validation",
) -> OperatingPoint:
    """Fit the most accurate thresholds within a latency.

    Samples are taken to need exactly their exit's latency, as images predicted one by one do on an idle machine. If
    that is a median, half of the images that leave there take longer: keep a distance from a limit that matters.

    Args:
        val: Validation logits (E, N, C) and targets (N,).
        flops: Multiply-adds up to and including each exit (E,), for the record.
        latencies: Milliseconds up to and including each exit (E,), e.g. from
            :func:`timm_dfs.evaluation.latency.exit_latencies`.
        policy: Its confidence, temperatures and ensemble are kept.
        mean: Largest mean latency, milliseconds.
        p95: Latency, milliseconds, that at most 5 % of the samples exceed. Give exactly one of the two.
        threads: Threads, for the record.
        machine: Processor or accelerator, for the record.
        dataset: Name of the data set of ``val``, for the record.
        split: Name of its split.

    Raises:
        ValueError: If not exactly one limit is given, it is shorter than the first exit takes, or the data do not fit.
    """
    num_exits = len(val[0])
    check_flops(flops, num_exits)
    check_latencies(latencies, num_exits)
    check_limit(latencies, mean, p95)
    kept = (policy.confidence, policy.temperatures, policy.ensemble)
    if mean is not None:
        found = Fitting(val, latencies, *kept, None, dataset, split).within(min(mean, max(latencies)))
    else:
        # A sample costs 1 if it exceeds the limit; costs must be above 0, so others cost next to nothing.
        late = [1.0 if latency > p95 else 1e-9 * (k + 1) for k, latency in enumerate(latencies)]  # type: ignore[operator]
        found = Fitting(val, late, *kept, None, dataset, split).within(min(SLOWEST, max(late)))
    exits = found.policy.exit_index(val[0])
    taken = torch.tensor(latencies, dtype=torch.float64)[exits]
    record = Latency(
        mean_ms=taken.mean().item(),
        p95_ms=percentile(taken, 95),
        threads=threads,
        machine=machine,
    )
    cost = torch.tensor(flops, dtype=torch.float64)[exits].mean().item()
    return replace(found, average_flops=cost, latency=record)


def percentile(values: torch.Tensor, percent: int) -> float:
    """The least of the values (N,) that so many percent of them do not exceed."""
    return values.sort().values[math.ceil(len(values) * percent / 100) - 1].item()


def check_latencies(latencies: Sequence[float], num_exits: int) -> None:
    """Raise ``ValueError`` unless there is one latency above 0 for each exit."""
    try:
        check_flops(latencies, num_exits)
    except ValueError:
        raise ValueError(f"latencies is {list(latencies)}; give milliseconds for each of {num_exits} exits.") from None


def check_limit(latencies: Sequence[float], mean: float | None, p95: float | None) -> None:
    """Raise ``ValueError`` unless exactly one limit is given and the fastest exit keeps to it."""
    if (mean is None) == (p95 is None):
        raise ValueError(f"mean is {mean} and p95 is {p95}; give exactly one of them, in milliseconds.")
    limit = mean if mean is not None else p95
    if not min(latencies) <= limit < math.inf:  # type: ignore[operator]
        raise ValueError(
            f"A latency of {limit:g} ms is out of range: here the first exit takes {min(latencies):.3g} ms, the last "
            f"{latencies[-1]:.3g} ms."
        )
