"""Ensembles of exits: an exit predicts together with the exits before it, whose logits are computed anyway.

The logarithms of the exits' probabilities are averaged with weights, which is their geometric mean (Zero Time Waste,
Wołczyk et al., NeurIPS 2021, arXiv 2106.05409, section 3.2). A softmax does not change if a number is added to all
logits, so that logits can be averaged instead.
"""

import math
from collections.abc import Collection, Sequence
from numbers import Real

import torch

from .precision import at_least_float32

MEAN = "mean"
"""The ensemble in which all exits have the same weight."""

Weights = tuple[tuple[float, ...], ...]
"""For each exit the weights of the exits up to it."""


def check_ensemble(ensemble: object, num_exits: int) -> str | Weights | None:
    """An ensemble as :class:`timm_dfs.ExitPolicy` takes it, its weights as numbers.

    Raises:
        ValueError: Unless it is None, ``"mean"``, or for exit k a row of k + 1 finite weights of at least 0, the last
            of which, the exit's own, is above 0.
    """
    if ensemble is None or (isinstance(ensemble, str) and ensemble == MEAN):
        return ensemble  # type: ignore[return-value]
    rows = ensemble.tolist() if isinstance(ensemble, torch.Tensor) else ensemble
    if isinstance(rows, str) or not isinstance(rows, Sequence) or len(rows) != num_exits:
        raise ValueError(
            f"ensemble is {ensemble!r}; give {MEAN!r}, or for each of {num_exits} exits a row of weights, such as "
            "fit_ensemble() returns."
        )
    return tuple(_row(k, row) for k, row in enumerate(rows))


def _row(k: int, row: object) -> tuple[float, ...]:
    if (
        not isinstance(row, Sequence)
        or len(row) != k + 1
        or not all(isinstance(weight, Real) and not isinstance(weight, bool) for weight in row)
    ):
        raise ValueError(f"ensemble has the row {row!r} for exit {k}; give {k + 1} weights, of exits 0 to {k}.")
    weights = [float(weight) for weight in row]
    if not all(0 <= weight < math.inf for weight in weights) or weights[-1] == 0:
        raise ValueError(
            f"ensemble has the weights {weights} for exit {k}; each must be finite and at least 0, and the last one, "
            "the exit's own, above 0."
        )
    return tuple(weights)


def effective_weights(ensemble: str | Weights, exit_index: int, exits: Collection[int]) -> dict[int, float]:
    """Weights, of sum 1, by which an exit averages the logits of those exits up to it that are active.

    Args:
        ensemble: From :func:`check_ensemble`.
        exit_index: The exit.
        exits: The active exits, ``exit_index`` among them. Others contribute nothing: their weights are shared out in
            proportion. An exit of weight 0 is left out.
    """
    active = [j for j in sorted(exits) if j <= exit_index]
    weights = {j: 1.0 if isinstance(ensemble, str) else ensemble[exit_index][j] for j in active}
    total = math.fsum(weights.values())
    return {j: weight / total for j, weight in weights.items() if weight}


class Ensemble:
    """State of an ensemble for one batch: the logits of the exits before.

    Args:
        ensemble: From :func:`check_ensemble`.
        exits: The active exits.
    """

    def __init__(self, ensemble: str | Weights, exits: Collection[int]):
        self._weights = {k: effective_weights(ensemble, k, exits) for k in exits}
        self._logits: dict[int, torch.Tensor] = {}

    def combine(self, exit_index: int, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of the ensemble at an active exit, given the exit's own, in float32 at least.

        It is called in the order of the exits.
        """
        self._logits[exit_index] = at_least_float32(logits)
        parts = [self._logits[j] * weight for j, weight in self._weights[exit_index].items()]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def go_on(self, rows: torch.Tensor) -> None:
        """Note that only these rows of the batch (int64 indices) go on to the next exit."""
        self._logits = {k: logits[rows] for k, logits in self._logits.items()}


def ensemble_logits(
    logits: torch.Tensor, ensemble: str | Sequence[Sequence[float]] = MEAN, exits: Collection[int] | None = None
) -> torch.Tensor:
    """Combine each exit's logits with those of the exits before it.

    Args:
        logits: Logits (E, N, C) of all exits.
        ensemble: ``"mean"``, or for each exit weights, as for :class:`timm_dfs.ExitPolicy`.
        exits: The active exits, by default all. The logits of others are left as they are, and contribute nothing.

    Returns:
        Logits (E, N, C), in float32 at least.

    Raises:
        ValueError: If ``logits`` has another shape, or the ensemble or exits do not fit.

    Example:
        >>> import torch, timm_dfs
        >>> logits = torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]])  # 2 exits, 1 sample, 2 classes
        >>> timm_dfs.ensemble_logits(logits)[1]
        tensor([[1., 2.]])
        >>> timm_dfs.ensemble_logits(logits, [[1], [3, 1]])[1]
        tensor([[1.5000, 1.0000]])
    """
    if logits.ndim != 3:
        raise ValueError(f"Logits have shape {tuple(logits.shape)}; give (exits, samples, classes).")
    if ensemble is None:
        raise ValueError(f"ensemble is None; give {MEAN!r}, or weights for each exit.")
    num_exits = len(logits)
    active = range(num_exits) if exits is None else sorted(set(exits))
    if not set(active) <= set(range(num_exits)):
        raise ValueError(f"exits is {list(active)}; the exits are 0 to {num_exits - 1}.")
    state = Ensemble(check_ensemble(ensemble, num_exits), active)  # type: ignore[arg-type]
    combined = at_least_float32(logits).clone()
    for k in active:
        combined[k] = state.combine(k, logits[k])
    return combined
