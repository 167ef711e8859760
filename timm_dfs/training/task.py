"""How the plugin gets hold of the loss in timm's ``train.py``.

``train.py`` builds ``timm.task.ClassificationTask(model, criterion)`` and has imported that class before the
plugin is imported, so replacing the name would come too late: the classes themselves are taught what a model with
exits needs.
"""

import functools
from collections.abc import Callable
from typing import Any

from timm.task import ClassificationTask, FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.task.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from ..base.model import MultiExitModel
from .aggregation import AggregatedExitsLoss
from .losses import Criterion, ExitsLoss


def install() -> None:
    """Make timm's training tasks train every exit of a :class:`MultiExitModel`, or refuse. Repeating it is harmless."""
    if getattr(ClassificationTask.__init__, "of_timm_dfs", False):
        return
    _replace(ClassificationTask, "__init__", _training_every_exit)
    _replace(ClassificationTask, "prepare_distributed", _on_processors_too)
    _replace(TrainingTask, "get_clip_parameters", _excluding_every_head)
    for task in (LogitDistillationTask, FeatureDistillationTask, TokenDistillationTask):
        _replace(task, "__init__", _refusing_exits)


def _replace(task: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    original = getattr(task, name)
    replacement: Any = functools.wraps(original)(make(original))
    replacement.of_timm_dfs = True
    setattr(task, name, replacement)


def _with_exits(model: nn.Module) -> MultiExitModel | None:
    """The model inside compiled and distributed wrappers, if it has exits."""
    model = unwrap_model(model)
    return model if isinstance(model, MultiExitModel) else None


def exits_loss(model: MultiExitModel, criterion: Criterion) -> ExitsLoss:
    """The loss that ``model.objective`` asks for."""
    if model.objective.aggregator:
        return AggregatedExitsLoss(criterion, model.objective, model.parameters(), model.num_exits)
    return ExitsLoss(criterion, model.objective)


def _training_every_exit(original: Callable) -> Callable:
    def __init__(self, model, *args, **kwargs):
        original(self, model, *args, **kwargs)
        if (with_exits := _with_exits(model)) is not None:
            self.criterion = exits_loss(with_exits, self.criterion)

    return __init__


def _on_processors_too(original: Callable) -> Callable:
    """DistributedDataParallel wants no device ids on the CPU; ``train.py`` gives them always."""

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
                f"timm's {type(self).__name__} would train one of this network's {model.num_exits} exits only. Leave "
                "out --kd-model-name; --model-kwargs distill_weight=0.3 makes the last exit teach the others."
            )
        original(self, student_model, *args, **kwargs)

    return __init__
