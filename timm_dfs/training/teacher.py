"""Distillation of another network, timm's ``--kd-model-name``, into every exit."""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model
from torch import nn

from ..base.model import MultiExitModel
from ..base.objective import Objective

DKD_WEIGHTS = (1.0, 8.0)
"""Weights of the two parts of decoupled knowledge distillation, alpha and beta: those of most pairs of networks on
CIFAR-100 in its paper."""


@dataclass(frozen=True)
class TeacherTerm:
    """Distillation loss of one batch, as timm's ``LogitDistillationTask`` weights it, for one exit after another.

    Attributes:
        logits: The teacher's logits (B, C).
        temperature: Temperature T of both sides; the loss is multiplied by its square.
        weight: Weight of the loss.
        task_weight: Weight of the exit's own loss.
        target: Classes (B,), which ``"dkd"`` needs.
        loss: One of :data:`~timm_dfs.base.objective.TEACHER_LOSSES`.
    """

    logits: torch.Tensor
    temperature: float
    weight: float
    task_weight: float
    target: torch.Tensor | None = None
    loss: str = "kl"

    def added_to(self, loss: torch.Tensor, exit_logits: torch.Tensor) -> torch.Tensor:
        """Weighted sum of an exit's own loss and the distillation of its logits (B, C).

        Raises:
            ValueError: If the teacher's logits have another shape; or if ``"dkd"`` gets targets other than classes.
        """
        if exit_logits.shape != self.logits.shape:
            raise ValueError(
                f"The teacher's logits have shape {tuple(self.logits.shape)}, the network's "
                f"{tuple(exit_logits.shape)}; give a teacher with the same classes."
            )
        ours, its = (F.log_softmax(logits.float() / self.temperature, -1) for logits in (exit_logits, self.logits))
        if self.loss == "dkd":
            of_target, of_others = decoupled(ours, its, self.target)
            divergence = (DKD_WEIGHTS[0] * of_target + DKD_WEIGHTS[1] * of_others).mean()
        else:
            divergence = F.kl_div(ours, its, reduction="batchmean", log_target=True)
        return self.task_weight * loss + self.weight * self.temperature**2 * divergence


def decoupled(ours: torch.Tensor, its: torch.Tensor, target: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of the divergence of a network's predictions from its teacher's (DKD, equation 7).

    The divergence is the first part plus the second times the probability that the teacher gives to other classes than
    the target. Both are computed from log-probabilities: a teacher may give a target all but 1e-8.

    Args:
        ours: The network's log-probabilities (B, C).
        its: The teacher's (B, C).
        target: Classes (B,).

    Returns:
        Divergence of the target class against all others together, and that among the others, (B,) each.

    Raises:
        ValueError: If the targets are no classes, or there are fewer than three classes.
    """
    if target is None or target.shape != ours.shape[:1] or target.is_floating_point():
        shape = None if target is None else tuple(target.shape)
        raise ValueError(
            f"teacher_loss is 'dkd', which needs one class for each of the {len(ours)} images, and the targets have "
            f"shape {shape}; train without mixup, cutmix and soft targets, or take teacher_loss='kl'."
        )
    if ours.shape[-1] < 3:
        raise ValueError(f"teacher_loss='dkd' compares the other classes, and there are {ours.shape[-1]} in all.")
    target = target[:, None]
    indices = torch.arange(ours.shape[-1] - 1, device=target.device)
    of_others = indices + (indices >= target)  # (B, C - 1): every class but the target

    def parts(log_probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        others = log_probabilities.gather(-1, of_others)
        together = others.logsumexp(-1, keepdim=True)
        return torch.cat([log_probabilities.gather(-1, target), together], -1), others - together

    of_ours, of_its = parts(ours), parts(its)
    first, second = (
        F.kl_div(a, b, reduction="none", log_target=True).sum(-1) for a, b in zip(of_ours, of_its, strict=True)
    )
    return first, second


SMALL = 0.75
"""Share of the size that a teacher was trained at below which images are called small."""


def seen_by_teacher(images: torch.Tensor, size: int | None, teacher: nn.Module) -> torch.Tensor:
    """Images (B, C, H, W) at the height and width at which the teacher sees them.

    Args:
        images: The images, as the network sees them.
        size: Height and width in pixels; ``None``: as they are, with a warning if the teacher was trained on larger
            ones.
        teacher: The teacher, perhaps in wrappers.
    """
    if size is not None:
        if images.shape[-2:] == (size, size):
            return images
        enlarged = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
        return enlarged.to(images.dtype)  # in half precision it is not implemented on CPUs
    trained_at = (getattr(unwrap_model(teacher), "pretrained_cfg", None) or {}).get("input_size", (0,))[-1]
    if images.shape[-1] < SMALL * trained_at:
        warnings.warn(
            f"The teacher was trained at {trained_at} pixels and sees {images.shape[-1]}; --model-kwargs "
            f"teacher_size={trained_at} enlarges the images for it.",
            stacklevel=2,
        )
    return images


def check_no_teacher_is_set(objective: Objective) -> None:
    """Raise ``ValueError`` if settings of a teacher would be without effect, because there is none."""
    for name in ("teacher_loss", "teacher_size"):
        if (value := getattr(objective, name)) != getattr(Objective, name):
            raise ValueError(f"{name} is {value!r}, and there is no teacher; give --kd-model-name, or leave it out.")


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
