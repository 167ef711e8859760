"""Deep Feature Surgery for timm: networks with exits, trained with less gradient conflict."""

from . import models
from .base.model import MultiExitModel
from .base.objective import Objective
from .base.partition import Partition
from .calibration.budgeted_batch import BudgetPoint, budgeted_batch, find_thresholds
from .calibration.ensemble import fit_ensemble
from .calibration.fit import fit_operating_point, operating_frontier
from .calibration.operating_point import Measurement, OperatingPoint, measure_policy
from .calibration.presets import fit_presets
from .calibration.risk import bound_risk, control_risk
from .calibration.temperature import fit_temperatures
from .data.images import open_image
from .evaluation.accuracy import anytime_accuracy, calibration_error, collect_logits
from .evaluation.flops import exit_flops
from .export import export_executorch, export_onnx
from .hub.folder import write_presets
from .inference.ensemble import ensemble_logits
from .inference.fusion import fuse
from .inference.policy import ExitPolicy
from .inference.prediction import Prediction, predict
from .training import task
from .training.conflict import GradientConflict, gradient_conflict
from .training.losses import ExitsLoss
from .version import __version__ as __version__
from .wrapped.multi_exit import MultiExit

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
    "ensemble_logits",
    "exit_flops",
    "export_executorch",
    "export_onnx",
    "find_thresholds",
    "fit_ensemble",
    "fit_operating_point",
    "fit_presets",
    "fit_temperatures",
    "fuse",
    "gradient_conflict",
    "measure_policy",
    "models",
    "open_image",
    "operating_frontier",
    "predict",
    "write_presets",
]

task.install()
