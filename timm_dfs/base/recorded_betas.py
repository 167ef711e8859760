"""Partition ratios in the state dict of a network without referencing.

With ``referencing="off"`` each side of a partition sees zeros in the other's channels, in eval mode as well, so that
the ratios decide logits. Weights alone do not tell them. With referencing, or jointly trained, they decide gradients.
"""

import warnings
from typing import Any

import torch

from .chain import TOLERANCE
from .partition import changes_values

KEY = "betas_without_referencing"
"""Key of a state dict that holds the ratio of each early exit, shallow to deep."""


def betas_of(model: Any) -> list[float]:
    """Ratio of each early exit if they decide the logits; else none."""
    return [partition.beta for partition in model.partitions] if changes_values(model.referencing, model.beta) else []


def note_betas(model: Any, state_dict: dict, prefix: str, *_) -> None:
    """Add the ratios of a network without referencing to its state dict."""
    if betas := betas_of(model):
        device = next(model.parameters()).device
        of_exits = [torch.full((), beta, device=device) for beta in betas]  # no copy: CUDA graphs capture it
        state_dict[prefix + KEY] = torch.stack(of_exits)


def compare_betas(model: Any, state_dict: dict, prefix: str, *_) -> None:
    """Remove the ratios from a state dict that is to be loaded, after comparing them with the model's.

    Weights without them may be loaded into a network without referencing, to train them further; a warning says so.

    Raises:
        ValueError: If the weights were trained with other ratios.
    """
    found, ours = state_dict.pop(prefix + KEY, None), betas_of(model)
    if found is None and ours and state_dict:
        warnings.warn(
            "The weights were not trained with referencing='off', as the model has it, with which its logits are wrong "
            "until it is trained further.",
            stacklevel=2,
        )
    if found is None or found.is_meta:
        return
    trained = found.tolist()
    if ours and len(trained) != len(ours):
        raise ValueError(
            f"The weights are of a network with {len(trained) + 1} exits, and the model has {len(ours) + 1}; create it "
            "with the exits that they were trained with."
        )
    if len(trained) != len(ours) or any(abs(a - b) > TOLERANCE for a, b in zip(trained, ours)):
        raise ValueError(
            f"The weights were trained with referencing='off' and beta={[round(beta, 3) for beta in trained]}, but the "
            f"model has referencing={model.referencing!r} and beta={model.beta!r}, with which its logits would be "
            f"wrong; create it with those. To train the weights further otherwise, remove {KEY!r} from the state dict."
        )
