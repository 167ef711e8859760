"""Speed of early exit, compared with the last exit alone and with each earlier exit alone."""

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..base.evaluating import evaluating, require_exits
from ..base.model import MultiExitModel
from ..calibration.budgeted_batch import find_thresholds, geometric_exit_fractions
from ..inference.policy import ExitPolicy
from ..inference.prediction import predict
from .flops import Costs

LAST_EXIT = "last exit alone"
"""The baseline: the network without early exits, no other head computed."""


SETTLE = 0.02
"""Seconds after which the threads of another pool have stopped spinning."""


@dataclass(frozen=True)
class Timing:
    """Speed of one way to predict at one batch size.

    Attributes:
        way: The last exit alone, the network cut off at an earlier exit, or the name of a policy.
        batch_size: Images per batch.
        images_per_second: By the mean time of a batch, the slowest tenth of the batches left out.
        p50: Median time of a batch, milliseconds.
        p95: Time within which 95 % of the batches are done; ``None`` for fewer than 20 batches.
        p99: Time within which 99 % of the batches are done; ``None`` for fewer than 100 batches.
        speedup: Images per second over those of the baseline.
        cost_ratio: Multiply-adds of the last exit alone over this way's, on the same images as ``speedup``.
        achieved: ``speedup / cost_ratio``: 1 where time falls as much as multiply-adds do.
        rounds: Number of batches timed.
        baseline: The way that it is compared with: the last exit alone, in the runtime where that is fastest.
    """

    way: str
    batch_size: int
    images_per_second: float
    p50: float
    p95: float | None
    p99: float | None
    speedup: float
    cost_ratio: float
    achieved: float
    rounds: int
    baseline: str = LAST_EXIT


@dataclass(frozen=True)
class Way:
    """One way to predict, to be timed.

    Attributes:
        run: Predicts a batch, a slice of ``images``.
        images: (N, C, H, W), prepared as ``run`` takes them.
        costs: Multiply-adds of each image (N,).
        is_whole: Whether all images take the network's last exit alone, so that early exit is compared with it.
        pool: Name of the threads that run it. Those of another pool may spin for a while after theirs has run.
    """

    run: Callable[[torch.Tensor], object]
    images: torch.Tensor
    costs: torch.Tensor
    is_whole: bool = False
    pool: str = "PyTorch"


def measure(
    model: MultiExitModel,
    images: torch.Tensor,
    policies: Mapping[str, ExitPolicy],
    batch_sizes: Sequence[int] = (1, 8, 64, 256),
    seconds: float = 10.0,
    least_rounds: int = 5,
    further: Mapping[str, Way] | None = None,
) -> list[Timing]:
    """Time a network with policies, and for comparison its last exit alone and each earlier exit alone.

    All ways take turns on the same batch, so that other load on the machine affects all of them. Under autocast, times
    are of autocast; multiply-adds are the same.

    Args:
        model: A network with exits, as it will be run; :func:`timm_dfs.fuse` makes it faster.
        images: (N, C, H, W), on the model's device and in its memory format; batches are taken from them in turn.
        policies: Operating points by name.
        batch_sizes: Images per batch.
        seconds: Time to measure each batch size for, warm-up not included.
        least_rounds: Least number of batches to measure, even if they take longer.
        further: Ways to predict the same images outside of PyTorch, see :func:`timm_dfs.export.timing.onnx_ways`. All
            ways are then compared with the fastest that is whole.

    Returns:
        For each batch size: the last exit alone, each earlier exit alone, each policy, the further ways.

    Raises:
        ValueError: If there are fewer images than the largest batch, or a policy does not fit.
    """
    require_exits(model)
    if not batch_sizes or min(batch_sizes) < 1 or max(batch_sizes) > len(images):
        raise ValueError(f"batch_sizes is {tuple(batch_sizes)}; give some in 1 … {len(images)}, the number of images.")
    for policy in policies.values():
        policy.check_exits(model.num_exits)
    counted = Costs(model, tuple(images.shape[1:]))
    every_image = torch.ones(len(images), dtype=torch.float64)
    ways = {LAST_EXIT: Way(model, images, counted.of_last_exit_alone() * every_image, is_whole=True)}
    alone = counted.of_exits(lazy=True, heads=())
    for k in range(model.num_exits - 1):
        run = partial(model.walk, visit=_ignore, exits=(k,))
        ways[f"exit {k} alone"] = Way(run, images, alone[k] * every_image)
    with evaluating(model), torch.inference_mode():
        for name, policy in policies.items():
            costs = policy_costs(model, images, policy, max(batch_sizes))
            ways[name] = Way(partial(predict, model, policy=policy), images, costs)
        ways.update(further or {})
        return [
            timing
            for batch_size in batch_sizes
            for timing in _interleaved(ways, images.device, batch_size, seconds, least_rounds)
        ]


def policy_costs(model: MultiExitModel, images: torch.Tensor, policy: ExitPolicy, batch_size: int = 64) -> torch.Tensor:
    """Multiply-adds of each image (N,) with a policy."""
    by_exit = Costs(model, tuple(images.shape[1:])).of_exits(lazy=True, heads=policy.answering)
    with evaluating(model), torch.inference_mode():
        left = torch.cat([predict(model, x, policy).exit_index for x in images.split(batch_size)])
    return torch.tensor(by_exit, dtype=torch.float64)[left.cpu()]


def _ignore(exit_index: int, logits: torch.Tensor) -> None:
    pass


def _interleaved(
    ways: Mapping[str, Way], device: torch.device, batch_size: int, seconds: float, least_rounds: int
) -> list[Timing]:
    batches = {
        name: [batch for batch in way.images.split(batch_size) if len(batch) == batch_size]
        for name, way in ways.items()
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        way.run(batches[name][0])
    start, rounds = time.perf_counter(), 0
    last_pool = None
    while rounds < least_rounds or time.perf_counter() - start < seconds:
        for name, way in ways.items():
            batch = batches[name][rounds % len(batches[name])]
            if last_pool not in (None, way.pool):
                time.sleep(SETTLE)
                way.run(batch)  # not timed
            last_pool = way.pool
            wait(device)
            before = time.perf_counter()
            way.run(batch)
            wait(device)
            took[name].append(1e3 * (time.perf_counter() - before))
        rounds += 1
    # A policy takes longer for some batches than for others, so means are compared, and of the same batches for every
    # way, in time and in multiply-adds. Left out are the slowest rounds, in which the machine did something else.
    by_time = sorted(range(rounds), key=lambda i: sum(times[i] for times in took.values()))
    kept = by_time[: math.ceil(0.9 * rounds)]
    typical = {name: statistics.fmean(times[i] for i in kept) for name, times in took.items()}
    of_batch = {
        name: [part.mean().item() for part in way.costs.split(batch_size)[: len(batches[name])]]
        for name, way in ways.items()
    }
    cost = {name: statistics.fmean(of[i % len(of)] for i in kept) for name, of in of_batch.items()}
    baseline = min((name for name, way in ways.items() if way.is_whole), key=typical.__getitem__)
    rows = []
    for name, times in took.items():
        speedup, ratio = typical[baseline] / typical[name], cost[baseline] / cost[name]
        p50, p95, p99 = statistics.median(times), _percentile(times, 95), _percentile(times, 99)
        speed = 1e3 * batch_size / typical[name]
        achieved = speedup / ratio
        rows.append(Timing(name, batch_size, speed, p50, p95, p99, speedup, ratio, achieved, rounds, baseline))
    return rows


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _percentile(times: Sequence[float], percent: int) -> float | None:
    """The least time that so many percent of ``times`` do not exceed; ``None`` if fewer than one time is beyond it."""
    beyond = len(times) * (100 - percent) // 100
    return sorted(times)[-1 - beyond] if beyond >= 1 else None


def exits_logits(model: MultiExitModel, images: torch.Tensor) -> torch.Tensor:
    """Logits (E, N, C) of all exits for images (N, C, H, W), in float32 on the CPU."""
    with evaluating(model), torch.inference_mode():
        return torch.cat([torch.stack(model.forward_exits(x)) for x in images.split(128)], 1).float().cpu()


def halving_policy(
    model: MultiExitModel, logits: torch.Tensor, input_size: Sequence[int], exits: Collection[int] | None = None
) -> ExitPolicy:
    """Fit thresholds with which images cost on average half of the last exit alone, by geometric exit fractions.

    They are fitted to the images that are timed, without labels: they serve timing and say nothing about accuracy.

    Args:
        model: A network with exits.
        logits: Logits (E, N, C) of the images, from :func:`exits_logits`.
        input_size: (channels, height, width) of the images.
        exits: Earlier exits that may be active; by default all.
    """
    last = model.num_exits - 1
    active = sorted({*(range(last) if exits is None else exits), last})
    counted = Costs(model, input_size)
    costs = torch.tensor(counted.of_exits(lazy=True, heads=active), dtype=torch.float64)
    policies = []
    for p in range(1, 151):
        fractions = torch.zeros(model.num_exits)
        fractions[active] = geometric_exit_fractions(p / 50, len(active))
        policies.append(ExitPolicy(find_thresholds(logits, fractions)))
    half = counted.of_last_exit_alone() / 2
    return min(policies, key=lambda policy: abs(costs[policy.exit_index(logits)].mean().item() - half))
