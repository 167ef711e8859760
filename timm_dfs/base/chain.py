"""Chained exits, as in BoostNet (Yu et al., "Boosted Dynamic Neural Networks", AAAI 2023, arXiv 2211.16726).

An exit is trained on what the exits before it leave to be corrected, as in gradient boosting: with f_k the output of
exit k's classifier, its logits are z_0 = f_0 and z_k = f_k + chain · sg(z_{k-1}), where sg is the stop-gradient.
"""

import math
import warnings
from collections.abc import Callable, Collection
from numbers import Real
from typing import Any

import torch
from torch import nn

from .rows import take

KEY = "chain"
"""Key of a state dict that holds the chain of a network with chained exits. Weights alone do not tell it, and logits
are wrong with another."""

TOLERANCE = 1e-3
"""Largest difference between two chains that are the same, one of them perhaps stored in half precision."""


def check_chain(chain: float) -> float:
    """The chain as a float.

    Raises:
        ValueError: Unless it is a number in [0, 1].
    """
    if not isinstance(chain, Real) or isinstance(chain, bool) or not 0 <= chain <= 1:
        raise ValueError(
            f"chain is {chain!r}; give a number in [0, 1], the share of the previous exit's logits that an exit adds "
            "to its own (0.5 in BoostNet; 0: none)."
        )
    return float(chain)


class ChainedVisitor:
    """Visitor of all exits of a walk that passes chained logits to another visitor.

    Args:
        visit: The other visitor.
        exits: Exits at which it is called; at the others, logits are accumulated only.
        chain: Share of the previous exit's logits that is added to an exit's own.
    """

    def __init__(
        self, visit: Callable[[int, torch.Tensor], torch.Tensor | None], exits: Collection[int], chain: float
    ) -> None:
        self._visit, self._exits, self._chain = visit, exits, chain
        self._before: torch.Tensor | None = None  # chained logits of the previous exit, of the active samples

    def __call__(self, exit_index: int, logits: torch.Tensor) -> torch.Tensor | None:
        if self._before is not None:
            logits = torch.add(logits, self._before, alpha=self._chain)
        rows = self._visit(exit_index, logits) if exit_index in self._exits else None
        before = logits.detach()
        self._before = before if rows is None else take(before, rows)
        return rows


def note_chain(model: Any, state_dict: dict, prefix: str, *_) -> None:
    """Add the chain of a network with chained exits to its state dict."""
    if model.chain:
        like = next(model.parameters())
        state_dict[prefix + KEY] = torch.full((), model.chain, device=like.device)  # no copy: graphs capture it


def compare_chain(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Remove the chain from a state dict that is to be loaded, after comparing it with the model's.

    Weights without one may be loaded into a network with chained exits, to train them further; a warning says so.

    Raises:
        ValueError: If the weights were trained with another chain.
    """
    found = state_dict.pop(prefix + KEY, None)
    if found is None and model.chain and state_dict:
        warnings.warn(
            f"The weights were not trained with a chain, but the model has chain={model.chain:g}, with which its "
            "logits are wrong until it is trained further.",
            stacklevel=2,
        )
    if found is None or found.is_meta:
        return
    if not math.isclose(found.item(), model.chain, rel_tol=0, abs_tol=TOLERANCE):  # type: ignore[arg-type]
        raise ValueError(
            f"The weights were trained with chain={found.item():.3g}, but the model has chain={model.chain:g}, with "
            f"which its logits would be wrong; create it with chain={found.item():.3g}. To train the weights further "
            f"with another chain, remove {KEY!r} from the state dict."
        )
