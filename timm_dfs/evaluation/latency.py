"""Latency of each exit on this machine."""

import statistics
import time

import torch

from ..base.evaluating import as_images, require_exits
from ..base.model import MultiExitModel
from ..inference.ensemble import MEAN
from ..inference.policy import ExitPolicy
from ..inference.prediction import predict
from .bench import wait

ROUNDS = 15
"""Times each exit is measured; the median counts."""

HOT = 1e3
"""Temperature at which no confidence comes near 1, so that thresholds alone choose the exit."""


def exit_latencies(model: MultiExitModel, image: torch.Tensor, rounds: int = ROUNDS) -> list[float]:
    """Measure how long :func:`timm_dfs.predict` takes for one image that leaves at each exit.

    Exits take turns, so that other load on the machine affects all of them. Exits predict together, by their largest
    probability, which takes a little longer than alone.

    Args:
        model: A network with exits.
        image: (1, C, H, W).
        rounds: Times each exit is measured.

    Returns:
        Medians, milliseconds (E,), never falling from one exit to the next.

    Raises:
        ValueError: If the network's logits are not finite, so that no early exit can be taken.
    """
    require_exits(model)
    image, exits = as_images(model, image), model.num_exits
    policies = [
        ExitPolicy([1.0] * k + [0.0] * (exits - k), temperatures=[HOT] * exits, ensemble=MEAN) for k in range(exits)
    ]
    took: list[list[float]] = [[] for _ in policies]
    for i in range(rounds + 1):
        for k, (policy, times) in enumerate(zip(policies, took)):
            wait(image.device)
            before = time.perf_counter()
            prediction = predict(model, image, policy)
            wait(image.device)
            if i:  # the first round warms up
                times.append(1e3 * (time.perf_counter() - before))
            elif int(prediction.exit_index) != k:
                raise ValueError(f"The image left at exit {int(prediction.exit_index)}, not {k}; check the weights.")
    medians = torch.tensor([statistics.median(times) for times in took], dtype=torch.float64)
    return medians.cummax(0).values.tolist()
