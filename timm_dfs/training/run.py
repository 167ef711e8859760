"""Record of a run of ``train.py`` in a checkpoint: the model that was trained, and everything it was trained with."""

import argparse
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..base.objective import SETTINGS

_MODEL_ARGUMENTS = dict(num_classes="num_classes", global_pool="gp", bn_eps="bn_eps")
"""Arguments of ``timm.create_model`` and the flags of ``train.py`` that set them. Drop rates and the momentum of batch
norm are left out: they change training only."""

_UNSUPPORTED = dict(
    naflex_loader="validated on sequences of patches (--naflex-loader), which this package does not load",
    tta="averaged groups of consecutive predictions (--tta), which is no test-time augmentation of images",
)
"""Flags that change what ``train.py`` validates, in a way that is not reproduced here."""


@dataclass(frozen=True)
class TrainingRun:
    """Model and arguments of a run.

    Attributes:
        model: Registered name.
        model_args: Keyword arguments for ``timm.create_model``; settings of the objective are left out.
        arguments: All arguments of ``train.py``, by the names of its parser.
        epoch: Number of the last finished epoch, from 0.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0

    @property
    def keeps_classes(self) -> bool:
        """Whether the last exit was frozen: then its classes are those of its first weights, not of the data."""
        given = self.arguments.get("model_kwargs") or {}  # of an older version, perhaps: Objective might refuse them
        weights = given.get("loss_weights")
        return given.get("train_backbone") is False and bool(weights) and weights[-1] == 0

    def check_reproducible(self) -> None:
        """Raise ``ValueError`` if ``train.py`` validated the run in a way that is not reproduced here."""
        for flag, what in _UNSUPPORTED.items():
            if self.arguments.get(flag):
                raise ValueError(f"The run {what}; train and validate without that flag.")


def read_run(file: Path) -> TrainingRun:
    """Read the record from a checkpoint of ``train.py``. Only tensors and the record are unpickled.

    Args:
        file: ``last.pth.tar``, ``model_best.pth.tar`` or ``checkpoint-*.pth.tar``.

    Raises:
        ValueError: If the file cannot be read or does not name its model.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        arguments = dict(vars(checkpoint["args"]))
        name = arguments["model"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no checkpoint of train.py that names its model: name the model, and give the file with "
            "--checkpoint."
        ) from error
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Cannot read {file} ({reason}). If writing it was interrupted, take the newest checkpoint-*.pth.tar "
            "beside it; if it holds weights alone, name the model and give the file with --checkpoint."
        ) from error
    given = {key: arguments.get(flag) for key, flag in _MODEL_ARGUMENTS.items()}
    given["in_chans"] = arguments.get("in_chans") or (arguments.get("input_size") or [None])[0]
    given.update(arguments.get("model_kwargs") or {})
    return TrainingRun(
        model=name,
        model_args={key: value for key, value in given.items() if key not in SETTINGS and value is not None},
        arguments=arguments,
        epoch=int(checkpoint.get("epoch", 0)),
    )
