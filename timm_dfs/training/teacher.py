"""Distillation of another network, timm's ``--kd-model-name``, into every exit."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import nn

from ..base.model import MultiExitModel


@dataclass(frozen=True)
class TeacherTerm:
    """Distillation loss of one batch, as timm's ``LogitDistillationTask`` defines it, for one exit after another.

    Attributes:
        logits: The teacher's logits (B, C).
        temperature: Temperature T of both sides; the divergence is multiplied by its square.
        weight: Weight of the divergence.
        task_weight: Weight of the exit's own loss.
    """

    logits: torch.Tensor
    temperature: float
    weight: float
    task_weight: float

    def added_to(self, loss: torch.Tensor, exit_logits: torch.Tensor) -> torch.Tensor:
        """Weighted sum of an exit's own loss and the divergence of its logits (B, C) from the teacher's.

        Raises:
            ValueError: If the teacher's logits have another shape.
        """
        if exit_logits.shape != self.logits.shape:
            raise ValueError(
                f"The teacher's logits have shape {tuple(self.logits.shape)}, the network's "
                f"{tuple(exit_logits.shape)}; give a teacher with the same classes."
            )
        ours, its = (F.log_softmax(logits.float() / self.temperature, -1) for logits in (exit_logits, self.logits))
        divergence = F.kl_div(ours, its, reduction="batchmean", log_target=True) * self.temperature**2
        return self.task_weight * loss + self.weight * divergence


def check_teacher(teacher: nn.Module, model: MultiExitModel, named: bool, temperature: float) -> None:
    """Refuse a teacher of other classes, and a temperature that is not positive.

    Args:
        teacher: The teacher, perhaps in wrappers.
        model: The network that it is to teach.
        named: Whether timm created it from a name. timm gives it the network's number of classes, with a random
            classifier if its weights have another number.
        temperature: Temperature of the distillation.

    Raises:
        ValueError: If the teacher's classes are not as many as the network's, or the temperature is not positive.
    """
    teacher = unwrap_model(teacher)
    classes = getattr(teacher, "num_classes", model.num_classes)
    if named:
        classes = teacher.pretrained_cfg.get("num_classes", classes)
    if classes != model.num_classes:
        raise ValueError(
            f"The teacher, a {type(teacher).__name__}, was trained on {classes} classes, and this network has "
            f"{model.num_classes}; give a teacher that was trained on the same classes, for instance the folder or Hub "
            "repository of a fine-tuned network (--kd-model-name local-dir:FOLDER or hf-hub:REPOSITORY)."
        )
    if not temperature > 0:
        raise ValueError(f"The temperature of the distillation is {temperature}; give a positive number.")
