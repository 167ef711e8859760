"""Arguments of a run of ``train.py`` that started from trained weights."""

from typing import Any

from ..training.run import TrainingRun
from .sources import images_of, settings_of


def complete_args(run: TrainingRun) -> dict[str, Any]:
    """Keyword arguments of a run's model: those that the run records, and for the rest those of its first weights.

    ``train.py --pretrained`` builds the network that a name's weights belong to, but records the command line alone.
    """
    return {**settings_of(run.model), **run.model_args} if _started_by_name(run) else run.model_args


def first_images(run: TrainingRun) -> dict[str, Any]:
    """How images were prepared for a run's first weights, as fields of ``pretrained_cfg``; ``train.py`` goes by it."""
    return images_of(run.model) if _started_by_name(run) else {}


def _started_by_name(run: TrainingRun) -> bool:
    return bool(run.arguments.get("pretrained")) and not run.arguments.get("pretrained_path")
