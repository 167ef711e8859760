"""Confidences: functions from an exit's logits to a number that is larger where its prediction is more certain."""

import math
from collections.abc import Callable

import torch


def max_prob(logits: torch.Tensor) -> torch.Tensor:
    """Largest softmax probability over the last axis, in float32: (..., C) to (...)."""
    return logits.softmax(-1, dtype=torch.float32).amax(-1)


def margin(logits: torch.Tensor) -> torch.Tensor:
    """Difference of the two largest softmax probabilities, in float32: (..., C) to (...)."""
    largest = logits.softmax(-1, dtype=torch.float32).topk(min(2, logits.shape[-1])).values
    return largest[..., 0] - largest[..., 1:].sum(-1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """1 minus the softmax's entropy as a share of its largest value, log C, in float32: (..., C) to (...)."""
    share = torch.special.entr(logits.softmax(-1, dtype=torch.float32)).sum(-1) / math.log(max(2, logits.shape[-1]))
    return (1 - share).clamp(min=0)  # rounding


CONFIDENCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max_prob": max_prob,
    "margin": margin,
    "entropy": entropy,
}
"""Confidences by name: functions from logits (..., C) to (...), in [0, 1], larger where the exit is more certain."""

PATIENCE = "patience"
"""The confidence that compares exits: how many active exits in a row, just before this one, predict the same class."""


def confidence_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The confidence called ``name``, a function of one exit's logits.

    Raises:
        ValueError: If there is none of that name.
    """
    if name == PATIENCE:
        raise ValueError(
            f"confidence is {name!r}, which compares exits; here each exit needs its own: choose one of "
            f"{', '.join(map(repr, CONFIDENCES))}."
        )
    if not isinstance(name, str) or name not in CONFIDENCES:
        raise ValueError(f"confidence is {name!r}; choose one of {', '.join(map(repr, [*CONFIDENCES, PATIENCE]))}.")
    return CONFIDENCES[name]
