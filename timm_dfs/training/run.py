"""What a checkpoint of ``train.py`` says about the run that made it."""

import argparse
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..base.objective import SETTINGS


@dataclass(frozen=True)
class TrainingRun:
    """The model that a checkpoint belongs to, and the data that it was validated on.

    Attributes:
        model: Registered name.
        model_args: Keyword arguments for ``timm.create_model``, those of training only left out.
        dataset: ``dataset``, ``data_dir``, ``val_split``, ``input_key`` and ``target_key``, as in ``train.py``.
        epoch: Number of the last epoch finished, from 0.
    """

    model: str
    model_args: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0


def read_run(file: Path) -> TrainingRun:
    """Read it from the checkpoint's own record of ``train.py``'s arguments. Nothing but tensors and those is unpickled.

    Raises:
        ValueError: If the file cannot be read or does not say which model it belongs to.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        args = vars(checkpoint["args"])
        name = args["model"]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no checkpoint of train.py that says which model it belongs to: name the model, and give the "
            "file with --checkpoint."
        ) from error
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Cannot read {file} ({reason}). If writing it was interrupted, take the newest checkpoint-*.pth.tar "
            "beside it; if it is weights alone, name the model and give the file with --checkpoint."
        ) from error
    given = {
        key: args.get(of)
        for key, of in (("num_classes", "num_classes"), ("in_chans", "in_chans"), ("global_pool", "gp"))
    }
    given.update(args.get("model_kwargs") or {})
    return TrainingRun(
        model=name,
        model_args={key: value for key, value in given.items() if key not in SETTINGS and value is not None},
        dataset={key: args.get(key) for key in ("dataset", "data_dir", "val_split", "input_key", "target_key")},
        epoch=int(checkpoint.get("epoch", 0)),
    )
