"""Exit points in the state dict: heads are numbered, so that weights alone do not tell after which modules they go.

Where the modules have features of one width, as a vision transformer's blocks have, weights would load at other exit
points, and the early exits' logits would be wrong.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .taps import last_called

KEY = "exit_points"
"""Key of a state dict that holds the names of a network's exit points, in UTF-8, separated by spaces."""


def encoded(points: Sequence[str]) -> torch.Tensor:
    """Names of exit points as a tensor of bytes, on the CPU: moving averages of weights ask for it in every step."""
    return torch.tensor(list(" ".join(points).encode()), dtype=torch.uint8)


def decoded(recorded: torch.Tensor) -> list[str]:
    """Names of exit points from a tensor of bytes, which may have become floating point when weights were averaged."""
    return bytes(recorded.double().round().int().tolist()).decode().split()


def note_exit_points(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Add the exit points of a network to its state dict."""
    state_dict[prefix + KEY] = encoded(points_of(model))


def compare_exit_points(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Remove the exit points from a state dict that is to be loaded, after comparing them with the model's.

    Raises:
        ValueError: If the weights were trained with other exit points.
    """
    found = state_dict.pop(prefix + KEY, None)
    if found is not None and not found.is_meta:
        refuse_other_points(model, decoded(found))


def points_of(model: Any) -> list[str]:
    """Names that the argument ``exits`` takes."""
    return [name.removeprefix("backbone.") for name in model.exit_points]


def refuse_other_points(model: Any, trained: Sequence[str]) -> None:
    """Raise ``ValueError`` unless weights were trained with a network's exit points, perhaps by other names."""
    modules, points = dict(model.backbone.named_modules()), points_of(model)

    def outputs(names: Sequence[str]) -> list[nn.Module | None]:
        return [last_called(modules[name]) if name in modules else None for name in names]

    if outputs(trained) != outputs(points):
        raise ValueError(
            f"The weights were trained with exits after {', '.join(trained)}, but the model has them after "
            f"{', '.join(points)}, where their logits would be wrong; create it with exits={list(trained)}. To train "
            f"the weights further with other exits, load their state dict without its key {KEY!r}."
        )
