"""Training loss of a network with exits."""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import distributed, nn

from ..base.objective import Objective
from .teacher import TeacherTerm

_logger = logging.getLogger(__name__)

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Loss of one exit, called as ``criterion(logits, target)``."""

LOG_INTERVAL = 50
"""Number of batches between two lines in the log, as in timm's ``train.py``."""


class ExitsLoss(nn.Module):
    """Weighted sum of the exits' losses (DFS, equation 1), with distillation from the last exit or another network.

    Each exit's mean criterion and accuracy are logged every :data:`LOG_INTERVAL` batches, by the first process.

    Args:
        criterion: Loss of one exit, called with logits (B, C) and the targets.
        objective: Weights and distillation; by default an unweighted sum.

    Raises:
        ValueError: If the objective has an aggregator, which needs the exits' gradients; or, when called, if features
            are to be distilled and the outputs have no distances.

    Example:
        >>> import torch, timm_dfs
        >>> loss = timm_dfs.ExitsLoss(torch.nn.CrossEntropyLoss(), timm_dfs.Objective(loss_weights=[0.5, 1]))
        >>> logits = torch.zeros(4, 2), torch.zeros(4, 2)  # two exits, four samples, two classes
        >>> round(loss(logits, torch.tensor([0, 1, 0, 1])).item(), 4)  # 1.5 log(2)
        1.0397
    """

    def __init__(self, criterion: Criterion, objective: Objective | None = None):
        super().__init__()
        self.criterion = criterion
        self.objective = objective or Objective()
        if self.objective.aggregator and type(self) is ExitsLoss:
            raise ValueError(
                f"aggregator is {self.objective.aggregator!r}, which a loss of logits cannot apply; train with timm's "
                "ClassificationTask(model, criterion), as train.py does."
            )
        self._batches = 0
        self._sums: list[torch.Tensor] = []

    def of_each_exit(
        self, outputs: Sequence[torch.Tensor], target: torch.Tensor, teacher: TeacherTerm | None = None
    ) -> list[torch.Tensor]:
        """Weighted loss of each exit, E scalars.

        Args:
            outputs: Outputs of a model in training mode: the exits' logits, E tensors (B, C), and with feature
                distillation the early exits' distances from the last exit's feature (E - 1,).
            target: Targets (B,), or (B, C) if the criterion takes soft targets.
            teacher: Distillation from another network, which is added to each exit's loss before its weight.
        """
        objective = self.objective
        logits, distances = outputs, None
        if objective.distill_feature_weight > 0:
            *logits, distances = outputs
            if distances.shape != (len(logits) - 1,):
                raise ValueError(
                    f"distill_feature_weight is {objective.distill_feature_weight}, but the model's outputs have no "
                    "distances of features; create the model with that weight."
                )
        losses = [self.criterion(exit_logits, target) for exit_logits in logits]
        self._log(losses, logits, target)
        if objective.distill_weight > 0:
            last = F.softmax(logits[-1].detach() / objective.distill_temperature, -1)
            for k, exit_logits in enumerate(logits[:-1]):
                soft = F.cross_entropy(exit_logits / objective.distill_temperature, last)
                losses[k] = (1 - objective.distill_weight) * losses[k] + objective.distill_weight * soft
        if distances is not None:
            for k, distance in enumerate(distances):
                losses[k] = losses[k] + objective.distill_feature_weight * distance
        if teacher is not None:
            losses = [teacher.added_to(loss, exit_logits) for loss, exit_logits in zip(losses, logits)]
        if objective.loss_weights is not None:
            losses = [weight * loss for weight, loss in zip(objective.loss_weights, losses, strict=True)]
        return losses

    def forward(
        self,
        outputs: torch.Tensor | Sequence[torch.Tensor],
        target: torch.Tensor,
        teacher: TeacherTerm | None = None,
    ) -> torch.Tensor:
        """Loss, a scalar, of a model's outputs.

        Args:
            outputs: Outputs in training mode, as for :meth:`of_each_exit`; or, in eval mode, the last exit's logits
                (B, C), whose loss is the criterion and the teacher's term alone.
            target: Targets, as for :meth:`of_each_exit`.
            teacher: Distillation from another network, as for :meth:`of_each_exit`.
        """
        if isinstance(outputs, torch.Tensor):
            loss = self.criterion(outputs, target)
            return loss if teacher is None else teacher.added_to(loss, outputs)
        return torch.stack(self.of_each_exit(outputs, target, teacher)).sum()

    @torch.no_grad()
    def _log(self, losses: list[torch.Tensor], logits: Sequence[torch.Tensor], target: torch.Tensor) -> None:
        """Log every exit's mean criterion and accuracy since the last line; ``train.py`` logs the sum only."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
            return
        correct = [_accuracy(exit_logits, target) for exit_logits in logits]
        self._sums.append(torch.stack([torch.stack(losses).detach().float(), torch.stack(correct)]))
        if self._batches % LOG_INTERVAL == 0:  # including the first batch, so that a short run has a line
            loss, accuracy = torch.stack(self._sums).mean(0).tolist()
            self._sums.clear()
            _logger.info(
                f"Exits 0 to {len(loss) - 1}:  Loss: {' '.join(f'{value:#.3g}' for value in loss)}  "
                f"Acc@1: {' '.join(f'{value:.1f}' for value in accuracy)}"
            )
        self._batches += 1


def _accuracy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Top-1 accuracy in percent. The class of a soft target is its largest; NaN for targets of several classes."""
    one_class = torch.ones((), dtype=torch.bool, device=logits.device)
    if target.ndim == 2 and target.shape == logits.shape:
        one_class = ((target.sum(-1) - 1).abs() < 1e-3).all()
        target = target.argmax(-1)
    if target.shape != logits.shape[:1]:
        return logits.new_full((), float("nan"), dtype=torch.float32)
    return torch.where(one_class, 100 * (logits.argmax(-1) == target).float().mean(), float("nan"))
