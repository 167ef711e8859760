"""Deep Feature Surgery for timm: networks with exits, trained with less gradient conflict."""

from . import factory, models, task
from .budget import BudgetPoint, budgeted_batch, find_thresholds
from .conflict import GradientConflict, gradient_conflict
from .evaluate import anytime_accuracy, calibration_error, collect_logits
from .flops import exit_flops
from .fusion import fuse
from .inference import Prediction, predict
from .losses import ExitsLoss
from .multi_exit import MultiExitModel
from .objective import Objective
from .operating_points import (
    Measurement,
    OperatingPoint,
    fit_operating_point,
    measure_policy,
    operating_frontier,
)
from .partition import Partition
from .policy import ExitPolicy
from .presets import fit_presets, write_presets
from .risk import bound_risk, control_risk
from .temperature import fit_temperatures
from .version import __version__ as __version__
from .wrapped import MultiExit

__all__ = [
    "BudgetPoint",
    "ExitPolicy",
    "ExitsLoss",
    "GradientConflict",
    "Measurement",
    "MultiExit",
    "MultiExitModel",
    "Objective",
    "OperatingPoint",
    "Partition",
    "Prediction",
    "anytime_accuracy",
    "bound_risk",
    "budgeted_batch",
    "calibration_error",
    "collect_logits",
    "control_risk",
    "exit_flops",
    "find_thresholds",
    "fit_operating_point",
    "fit_presets",
    "fit_temperatures",
    "fuse",
    "gradient_conflict",
    "measure_policy",
    "models",
    "operating_frontier",
    "predict",
    "write_presets",
]

factory.install()
task.install()
