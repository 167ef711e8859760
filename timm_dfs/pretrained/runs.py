"""Arguments of a run of ``train.py`` that started from trained weights."""

from typing import Any

from ..training.run import TrainingRun
from .sources import settings_of


def complete_args(run: TrainingRun) -> dict[str, Any]:
    """Keyword arguments of a run's model: those that the run records, and for the rest those of its first weights.

    ``train.py --pretrained`` builds the network that a name's weights belong to, but records the command line alone.
    """
    if not run.arguments.get("pretrained") or run.arguments.get("pretrained_path"):
        return run.model_args
    return {**settings_of(run.model), **run.model_args}
