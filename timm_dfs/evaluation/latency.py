"""Latency of each exit on this machine."""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from ..base.evaluating import as_images, evaluating, require_exits
from ..base.model import MultiExitModel

ROUNDS = 15
"""Times each exit is measured; the median counts."""


def exit_latencies(model: MultiExitModel, images: torch.Tensor, rounds: int = ROUNDS) -> list[float]:
    """Measure the time up to and including each exit, with the heads of all exits before it.

    Exits take turns, so that other load on the machine affects all of them.

    Args:
        model: A network with exits.
        images: One batch (B, C, H, W).
        rounds: Times each exit is measured.

    Returns:
        Medians, milliseconds a batch (E,), never falling from one exit to the next.
    """
    require_exits(model)
    images = as_images(model, images)
    ways: list[Callable[[], object]] = [
        partial(model.walk, images, _ignore, tuple(range(k + 1))) for k in range(model.num_exits)
    ]
    took: list[list[float]] = [[] for _ in ways]
    with evaluating(model), torch.inference_mode():
        for i in range(rounds + 1):
            for run, times in zip(ways, took):
                _wait(images.device)
                before = time.perf_counter()
                run()
                _wait(images.device)
                if i:  # the first round warms up
                    times.append(1e3 * (time.perf_counter() - before))
    medians = torch.tensor([statistics.median(times) for times in took], dtype=torch.float64)
    return medians.cummax(0).values.tolist()


def _ignore(exit_index: int, logits: torch.Tensor) -> None:
    pass


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
