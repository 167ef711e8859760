"""The training loss of a network with exits."""

from collections.abc import Callable, Sequence

import torch
from torch import nn


class ExitsLoss(nn.Module):
    """Sum of a criterion over all exits (DFS, equation 1).

    Args:
        criterion: Loss of one exit: called with logits (B, C) and whatever targets the criterion takes.
    """

    def __init__(self, criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.criterion = criterion

    def forward(self, logits: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Loss of the exits' logits, E tensors (B, C); one tensor (eval mode's last exit) counts as one exit."""
        if isinstance(logits, torch.Tensor):
            return self.criterion(logits, target)
        return torch.stack([self.criterion(exit_logits, target) for exit_logits in logits]).sum()
