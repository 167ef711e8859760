"""Weights with which exits predict together."""

from collections.abc import Collection

import torch
import torch.nn.functional as F

from ..inference.ensemble import MEAN, Weights, check_ensemble, ensemble_logits
from .logits import check_data, early_exits, halves
from .operating_point import Data

DIGITS = 3
"""Decimals of fitted weights, so that a config can be read."""

STEPS = 50
"""Steps of L-BFGS for each exit."""


def fit_ensemble(val_logits: torch.Tensor, val_targets: torch.Tensor, exits: Collection[int] | None = None) -> Weights:
    """Fit to each exit the weights of the exits up to it, with least cross-entropy (Zero Time Waste, section 3.2).

    A scale is fitted with them and dropped: :func:`timm_dfs.fit_temperatures` finds it again.

    Args:
        val_logits: Validation logits (E, N, C).
        val_targets: Validation targets (N,).
        exits: The active exits, by default all; the last one always is. Weights of others are 0, except for themselves.

    Returns:
        For exit k weights of exits 0 … k, of sum 1, for the argument ``ensemble`` of :class:`timm_dfs.ExitPolicy`.

    Raises:
        ValueError: If shapes disagree, logits are not finite, targets are not classes, or there is no such exit.

    Example:
        >>> import torch, timm_dfs
        >>> targets = torch.arange(60) % 3
        >>> good = 3.0 * torch.nn.functional.one_hot(targets, 3)
        >>> logits = torch.stack([-good, good])  # 2 exits; the first is always wrong
        >>> timm_dfs.fit_ensemble(logits, targets)[1][1] > 0.8
        True
    """
    check_data("val", (val_logits, val_targets))
    last = len(val_logits) - 1
    active = {*early_exits(exits, len(val_logits)), last}
    rows = []
    for k in range(len(val_logits)):
        used = [j for j in range(k) if j in active and k in active] + [k]
        weights = _fit(val_logits[used], val_targets) if len(used) > 1 else [1.0]
        row = [0.0] * (k + 1)
        for j, weight in zip(used[:-1], weights):
            row[j] = round(weight, DIGITS)
        row[k] = max(round(1 - sum(row), DIGITS), 10**-DIGITS)
        rows.append(row)
    return check_ensemble(rows, len(rows))  # type: ignore[return-value]


@torch.inference_mode(False)
@torch.enable_grad()
def _fit(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Weights (J,) of sum 1 of exits' logits (J, N, C)."""
    logits, targets = logits.to(torch.float32, copy=True), targets.to(torch.int64, copy=True)
    logits /= logits.std().clamp(min=torch.finfo().tiny)  # the search starts at a scale of 1
    start = logits.new_full((len(logits),), 1 / len(logits)).log()
    logarithms = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logarithms], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(torch.einsum("j,jnc->nc", logarithms.exp(), logits), targets)
        # Where all predictions are right, ever larger weights are better; this counts as much as one sample does.
        value = value + ((logarithms - start) ** 2).mean() / len(targets)
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return logarithms.detach().softmax(0).tolist()


def choose_ensemble(val: Data) -> str | Weights | None:
    """Choose between exits that predict alone, their mean, and fitted weights, on samples held out of the fit.

    Weights are fitted to one half of the samples; the choice that is most accurate on the other half, on average over
    exits, is then fitted to all. Of equally accurate choices the simpler is taken.

    Args:
        val: Validation logits (E, N, C) and targets (N,), at least two samples.

    Returns:
        ``None``, ``"mean"`` or weights.
    """
    check_data("val", val)
    (logits, targets), (others, expected) = halves(val)
    fitted = fit_ensemble(logits, targets)
    candidates: list[str | Weights | None] = [None, MEAN, fitted]
    best = max(candidates, key=lambda ensemble: _accuracy(others, expected, ensemble))  # the first of equal ones
    return fit_ensemble(*val) if best is fitted else best


def _accuracy(logits: torch.Tensor, targets: torch.Tensor, ensemble: str | Weights | None) -> float:
    if ensemble is not None:
        logits = ensemble_logits(logits, ensemble)
    return (logits.argmax(-1) == targets).double().mean().item()
