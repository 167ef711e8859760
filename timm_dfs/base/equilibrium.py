"""Gradient equilibrium: equal weight for every exit's gradient at each exit point (GE; arXiv 1908.06294, sec. 3.2)."""

import torch

from .partition import Onward, PartlyTrained


def balance(onward: Onward, exit_feature: torch.Tensor, exits_left: int) -> tuple[Onward, torch.Tensor]:
    """Scale the gradients that meet at an exit point; values pass unchanged.

    Args:
        onward: Feature for the deeper layers.
        exit_feature: Feature for the exit's head.
        exits_left: Number n of exits from this one to the last, both included. The head's gradient is scaled by 1 / n.
            The gradient of the deeper layers, already an average over their n - 1 exits, is scaled by (n - 1) / n.

    Returns:
        ``onward`` and ``exit_feature`` with scaled gradients.
    """
    share = (exits_left - 1) / exits_left
    if isinstance(onward, PartlyTrained):
        onward = PartlyTrained(_scaled(onward.trained, share), onward.values)
    else:
        onward = _scaled(onward, share)
    return onward, _scaled(exit_feature, 1 / exits_left)


def _scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return _ScaledGradient.apply(x, factor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None
