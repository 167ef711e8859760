"""Deep Feature Surgery for timm: networks with exits, trained without gradient conflict."""

from . import factory, models, task
from .budget import BudgetPoint, budgeted_batch, find_thresholds
from .conflict import GradientConflict, gradient_conflict
from .evaluate import anytime_accuracy, calibration_error, collect_logits
from .flops import exit_flops
from .inference import Prediction, predict
from .losses import ExitsLoss
from .multi_exit import MultiExitModel
from .objective import Objective
from .partition import Partition
from .policy import ExitPolicy
from .version import __version__ as __version__
from .wrapped import MultiExit

__all__ = [
    "BudgetPoint",
    "ExitPolicy",
    "ExitsLoss",
    "GradientConflict",
    "MultiExit",
    "MultiExitModel",
    "Objective",
    "Partition",
    "Prediction",
    "anytime_accuracy",
    "budgeted_batch",
    "calibration_error",
    "collect_logits",
    "exit_flops",
    "find_thresholds",
    "gradient_conflict",
    "models",
    "predict",
]

factory.install()
task.install()
