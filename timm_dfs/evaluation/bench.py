"""How fast early exit is, against the network without it and the network cut off at each exit."""

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
from .flops import exit_flops, last_exit_flops

LAST_EXIT = "last exit alone"
"""The rival: the network without early exits, no other head computed."""


@dataclass(frozen=True)
class Timing:
    """How fast one way to answer is at one batch size.

    Attributes:
        way: The last exit alone, a network cut off at an exit, or a policy by its name.
        batch_size: Images a batch.
        images_per_second: By the mean batch, the slowest tenth left out.
        p50, p95, p99: Milliseconds that a batch takes, or less, in that share of the rounds.
        speedup: Images per second over those of the last exit alone, of the same rounds.
        cost_ratio: The last exit alone's multiply-adds over this one's mean on these images.
        achieved: ``speedup / cost_ratio``: 1 where it is as fast as its arithmetic says.
    """

    way: str
    batch_size: int
    images_per_second: float
    p50: float
    p95: float
    p99: float
    speedup: float
    cost_ratio: float
    achieved: float


def measure(
    model: MultiExitModel,
    images: torch.Tensor,
    policies: Mapping[str, ExitPolicy],
    batch_sizes: Sequence[int] = (1, 8, 64, 256),
    seconds: float = 10.0,
    least_rounds: int = 5,
) -> list[Timing]:
    """Time a network with policies against its last exit alone and against each exit alone.

    All ways take turns, batch by batch, so that what else the machine does hits all of them.

    Args:
        model: A network with exits, as it is to be run; :func:`timm_dfs.fuse` makes it faster.
        images: (N, C, H, W), on the model's device and in its memory format; batches are drawn from them in turn.
        policies: Operating points by name.
        batch_sizes: Images a batch.
        seconds: How long to measure each batch size, warm-up not included.
        least_rounds: Rounds to measure even if they take longer.

    Returns:
        For each batch size the last exit alone, each early exit alone, each policy.

    Raises:
        ValueError: If there are fewer images than the largest batch, or a policy does not fit.
    """
    require_exits(model)
    if not batch_sizes or min(batch_sizes) < 1 or max(batch_sizes) > len(images):
        raise ValueError(f"batch_sizes is {tuple(batch_sizes)}; give some in 1 … {len(images)}, the number of images.")
    for policy in policies.values():
        policy.check_exits(model.num_exits)
    size = tuple(images.shape[1:])
    ways: dict[str, Callable[[torch.Tensor], object]] = {LAST_EXIT: model}
    full = last_exit_flops(model, size)
    costs: dict[str, float] = {LAST_EXIT: full}
    for k in range(model.num_exits - 1):
        ways[f"exit {k} alone"] = partial(model.walk, visit=_ignore, exits=(k,))
        costs[f"exit {k} alone"] = exit_flops(model, size, lazy=True, heads=(k,))[k]
    with evaluating(model), torch.inference_mode():
        for name, policy in policies.items():
            ways[name] = partial(predict, model, policy=policy)
            by_exit = torch.tensor(exit_flops(model, size, lazy=True, heads=policy.answering), dtype=torch.float64)
            left = torch.cat([predict(model, x, policy).exit_index for x in images.split(max(batch_sizes))])
            costs[name] = by_exit[left.cpu()].mean().item()
        return [
            timing
            for batch_size in batch_sizes
            for timing in _interleaved(ways, costs, images, batch_size, seconds, least_rounds)
        ]


def _ignore(exit_index: int, logits: torch.Tensor) -> None:
    pass


def _interleaved(
    ways: Mapping[str, Callable[[torch.Tensor], object]],
    costs: Mapping[str, float],
    images: torch.Tensor,
    batch_size: int,
    seconds: float,
    least_rounds: int,
) -> list[Timing]:
    batches = [batch for batch in images.split(batch_size) if len(batch) == batch_size]
    took: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run(batches[0])
    start, rounds = time.perf_counter(), 0
    while rounds < least_rounds or time.perf_counter() - start < seconds:
        for name, run in ways.items():
            _wait(images.device)
            before = time.perf_counter()
            run(batches[rounds % len(batches)])
            _wait(images.device)
            took[name].append(1e3 * (time.perf_counter() - before))
        rounds += 1
    # A policy takes longer over some batches than over others, so the mean counts; without the slowest rounds, in which
    # the machine did something else.
    typical = {name: _trimmed_mean(times) for name, times in took.items()}
    rows = []
    for name, times in took.items():
        speedup, ratio = typical[LAST_EXIT] / typical[name], costs[LAST_EXIT] / costs[name]
        p50, p95, p99 = (_percentile(times, share) for share in (0.5, 0.95, 0.99))
        speed = 1e3 * batch_size / typical[name]
        rows.append(Timing(name, batch_size, speed, p50, p95, p99, speedup, ratio, speedup / ratio))
    return rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trimmed_mean(times: Sequence[float]) -> float:
    """The mean without the slowest tenth."""
    return statistics.fmean(sorted(times)[: math.ceil(0.9 * len(times))])


def _percentile(times: Sequence[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def exits_logits(model: MultiExitModel, images: torch.Tensor) -> torch.Tensor:
    """Logits (E, N, C) of every exit for images (N, C, H, W), in float32 on the CPU."""
    with evaluating(model), torch.inference_mode():
        return torch.cat([torch.stack(model.forward_exits(x)) for x in images.split(128)], 1).float().cpu()


def halving_policy(
    model: MultiExitModel, logits: torch.Tensor, input_size: Sequence[int], exits: Collection[int] | None = None
) -> ExitPolicy:
    """Thresholds with which images cost on average half of the last exit alone, by geometric exit fractions.

    They are fixed on those images themselves, without labels: good for timing, worth nothing for accuracy.

    Args:
        model: A network with exits.
        logits: The images' logits (E, N, C), from :func:`exits_logits`.
        input_size: Their (channels, height, width).
        exits: The exits that may answer, besides the last; all by default.
    """
    last = model.num_exits - 1
    heads = sorted({*(range(last) if exits is None else exits), last})
    costs = torch.tensor(exit_flops(model, input_size, lazy=True, heads=heads), dtype=torch.float64)
    policies = []
    for p in range(1, 151):
        fractions = torch.zeros(model.num_exits)
        fractions[heads] = geometric_exit_fractions(p / 50, len(heads))
        policies.append(ExitPolicy(find_thresholds(logits, fractions)))
    half = last_exit_flops(model, input_size) / 2
    return min(policies, key=lambda policy: abs(costs[policy.exit_index(logits)].mean().item() - half))
