"""Adaptation of timm's training tasks, so that the unmodified ``train.py`` trains every exit.

``train.py`` builds ``timm.task.ClassificationTask(model, criterion)`` and imports that class before the plugin.
Replacing the class in its module would have no effect there, so methods of the class are replaced instead.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
)
from timm.task.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from ..base.model import MultiExitModel
from .aggregation import AggregatedExitsLoss
from .losses import Criterion, ExitsLoss
from .teacher import TeacherTerm, check_no_teacher_is_set, check_teacher, seen_by_teacher


def install() -> None:
    """Make timm's training tasks train every exit of a :class:`MultiExitModel`, or refuse. Can be called repeatedly."""
    if getattr(ClassificationTask.__init__, "of_timm_dfs", False):
        return
    _replace(ClassificationTask, "__init__", _training_every_exit)
    for task in (ClassificationTask, MultiLabelClassificationTask):
        _replace(task, "forward", _following_the_settings)
    _replace(LogitDistillationTask, "__init__", _with_a_teacher)
    _replace(LogitDistillationTask, "forward", _teaching_every_exit)
    _replace(ClassificationTask, "prepare_distributed", _without_device_ids_on_cpu)
    _replace(LogitDistillationTask, "prepare_distributed", _without_device_ids_on_cpu)
    _replace(TrainingTask, "get_clip_parameters", _excluding_every_head)
    for refused in (FeatureDistillationTask, TokenDistillationTask):
        _replace(refused, "__init__", _refusing_exits)


def _replace(task: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    original = getattr(task, name)
    replacement: Any = functools.wraps(original)(make(original))
    replacement.of_timm_dfs = True
    setattr(task, name, replacement)


def _with_exits(model: nn.Module) -> MultiExitModel | None:
    """The model inside compiled and distributed wrappers; ``None`` if it has no exits."""
    model = unwrap_model(model)
    return model if isinstance(model, MultiExitModel) else None


def exits_loss(model: MultiExitModel, criterion: Criterion) -> ExitsLoss:
    """Training loss of a model, as ``model.objective`` sets it.

    Args:
        model: A network with exits.
        criterion: Loss of one exit.
    """
    if model.objective.aggregator:
        own = model.parameters, model.num_exits, model.recomputed_buffers
        return AggregatedExitsLoss(criterion, model.objective, *own)
    return ExitsLoss(criterion, model.objective)


def _training_every_exit(original: Callable) -> Callable:
    def __init__(self, model, *args, **kwargs):
        original(self, model, *args, **kwargs)
        if (with_exits := _with_exits(model)) is not None:
            check_no_teacher_is_set(with_exits.objective)
            self.criterion = exits_loss(with_exits, self.criterion)

    return __init__


def _follow(task: TrainingTask, model: MultiExitModel, taught: bool) -> None:
    """Make a task's loss that of the model's settings, which ``train_for`` may have changed since."""
    if isinstance(task.criterion, ExitsLoss) and task.criterion.objective is not model.objective:
        if not taught:
            check_no_teacher_is_set(model.objective)
        task.criterion = exits_loss(model, task.criterion.criterion)


def _following_the_settings(original: Callable) -> Callable:
    def forward(self, input, target):
        if (model := _with_exits(self.trainable_module)) is not None:
            _follow(self, model, taught=False)
        return original(self, input, target)

    return forward


def _with_a_teacher(original: Callable) -> Callable:
    def __init__(self, student_model, teacher_model, *args, **kwargs):
        original(self, student_model, teacher_model, *args, **kwargs)
        if (model := _with_exits(student_model)) is not None:
            check_teacher(self.teacher.model, model, isinstance(teacher_model, str), self.temperature)
            self.criterion = exits_loss(model, self.criterion)

    return __init__


def _teaching_every_exit(original: Callable) -> Callable:
    def forward(self, input, target):
        if (model := _with_exits(self.trainable_module)) is None:
            return original(self, input, target)
        _follow(self, model, taught=True)
        objective = model.objective
        with torch.inference_mode():
            seen = seen_by_teacher(input, objective.teacher_size, self.teacher.model)
            logits = self.teacher(self.teacher.normalize_input(seen, self.student_mean, self.student_std))
        # A copy: tensors made in inference mode cannot be saved for the backward pass.
        weights = self.temperature, self.distill_loss_weight, self.task_loss_weight
        term = TeacherTerm(logits.clone(), *weights, target, objective.teacher_loss)
        outputs = self.trainable_module(input)
        return dict(loss=self.criterion(outputs, target, term), output=outputs)

    return forward


def _without_device_ids_on_cpu(original: Callable) -> Callable:
    """Leave out device ids, which ``train.py`` always gives, on the CPU, where DistributedDataParallel refuses them."""

    def prepare_distributed(self, device_ids=None, **kwargs):
        if _with_exits(self.trainable_module) is not None and self.device.type == "cpu":
            device_ids = None
        return original(self, device_ids=device_ids, **kwargs)

    return prepare_distributed


def _excluding_every_head(original: Callable) -> Callable:
    def get_clip_parameters(self, exclude_head=False):
        model = _with_exits(self.get_trainable_module())
        if model is None or not exclude_head:
            return original(self, exclude_head)
        classifiers = {parameter for classifier in model.get_classifier() for parameter in classifier.parameters()}
        return [parameter for parameter in model.parameters() if parameter not in classifiers]

    return get_clip_parameters


def _refusing_exits(original: Callable) -> Callable:
    def __init__(self, student_model, *args, **kwargs):
        if (model := _with_exits(student_model)) is not None:
            raise ValueError(
                f"timm's {type(self).__name__} would train only one of this network's {model.num_exits} exits. Give "
                "--kd-distill-type logit, which teaches all of them; or leave out --kd-model-name: --model-kwargs "
                "distill_weight=0.3 distils the last exit into the others."
            )
        original(self, student_model, *args, **kwargs)

    return __init__
