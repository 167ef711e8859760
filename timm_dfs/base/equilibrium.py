"""Gradient equilibrium: every exit counts the same at each exit point (GE; arXiv 1908.06294, section 3.2)."""

import torch

from .partition import Onward, PartlyTrained


def balance(onward: Onward, exit_feature: torch.Tensor, exits_left: int) -> tuple[Onward, torch.Tensor]:
    """Scale the gradients that meet at an exit point; values pass unchanged.

    Args:
        onward: The feature for the deeper layers.
        exit_feature: The same for the exit's head.
        exits_left: How many exits from this one to the last: n. The head's gradient is scaled by 1 / n, and that of
            the deeper layers, which has been scaled to one exit's measure already, by (n - 1) / n.
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
