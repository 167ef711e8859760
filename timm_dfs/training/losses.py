"""The training loss of a network with exits."""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import distributed, nn

from ..base.objective import Objective

_logger = logging.getLogger(__name__)

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LOG_INTERVAL = 50
"""Batches between two lines in the log, as in ``train.py``."""


class ExitsLoss(nn.Module):
    """Weighted sum of a criterion over all exits (DFS, equation 1), the last exit teaching the others if asked.

    What each exit's criterion and accuracy were is logged every :data:`LOG_INTERVAL` batches, by the first process.

    Args:
        criterion: Loss of one exit: called with logits (B, C) and whatever targets the criterion takes.
        objective: Weights and distillation; by default a plain sum.
    """

    def __init__(self, criterion: Criterion, objective: Objective | None = None):
        super().__init__()
        self.criterion = criterion
        self.objective = objective or Objective()
        self._batches = 0
        self._sums: list[torch.Tensor] = []

    def of_each_exit(self, outputs: Sequence[torch.Tensor], target: torch.Tensor) -> list[torch.Tensor]:
        """Weighted loss of each exit, E scalars.

        Args:
            outputs: The exits' logits, E tensors (B, C); with feature distillation, then the early exits' distances
                from the last exit's feature (E - 1,), as a model in training mode gives them.
            target: Targets (B,), or (B, C) where the criterion takes such.
        """
        objective = self.objective
        logits, distances = outputs, None
        if objective.distill_feature_weight > 0:
            *logits, distances = outputs
        losses = [self.criterion(exit_logits, target) for exit_logits in logits]
        self._log(losses, logits, target)
        if objective.distill_weight > 0:
            teacher = F.softmax(logits[-1].detach() / objective.distill_temperature, -1)
            for k, exit_logits in enumerate(logits[:-1]):
                soft = F.cross_entropy(exit_logits / objective.distill_temperature, teacher)
                losses[k] = (1 - objective.distill_weight) * losses[k] + objective.distill_weight * soft
        if distances is not None:
            for k, distance in enumerate(distances):
                losses[k] = losses[k] + objective.distill_feature_weight * distance
        if objective.loss_weights is not None:
            losses = [weight * loss for weight, loss in zip(objective.loss_weights, losses, strict=True)]
        return losses

    def forward(self, outputs: torch.Tensor | Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Loss of what a model puts out; one tensor (eval mode's last exit) counts as one exit."""
        if isinstance(outputs, torch.Tensor):
            return self.criterion(outputs, target)
        return torch.stack(self.of_each_exit(outputs, target)).sum()

    @torch.no_grad()
    def _log(self, losses: list[torch.Tensor], logits: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        """Every exit's criterion and accuracy since the last line, because ``train.py`` knows one output only."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
            return
        correct = [_accuracy(exit_logits, target) for exit_logits in logits]
        self._sums.append(torch.stack([torch.stack(losses).detach().float(), torch.stack(correct)]))
        if self._batches % LOG_INTERVAL == 0:  # the first batch too: a run of few batches has a line
            loss, accuracy = torch.stack(self._sums).mean(0).tolist()
            self._sums.clear()
            _logger.info(
                f"Exits 0 to {len(loss) - 1}:  Loss: {' '.join(f'{value:#.3g}' for value in loss)}  "
                f"Acc@1: {' '.join(f'{value:.1f}' for value in accuracy)}"
            )
        self._batches += 1


def _accuracy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Top-1 in percent, for soft targets that of their likeliest class; NaN where targets are not of one class."""
    one_class = torch.ones((), dtype=torch.bool, device=logits.device)
    if target.ndim == 2 and target.shape == logits.shape:
        one_class = ((target.sum(-1) - 1).abs() < 1e-3).all()
        target = target.argmax(-1)
    if target.shape != logits.shape[:1]:
        return logits.new_full((), float("nan"), dtype=torch.float32)
    return torch.where(one_class, 100 * (logits.argmax(-1) == target).float().mean(), float("nan"))
