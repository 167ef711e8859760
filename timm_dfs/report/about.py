"""Facts about a report: network, data, machine and training."""

import json
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from ..evaluation.machine import describe_machine
from ..hub.folder import RESULTS_FILE
from ..pretrained.packaged import packaged_folder
from ..training.run import read_run
from ..version import __version__


@dataclass(frozen=True)
class About:
    """Facts about a report.

    Attributes:
        model: Name of the model, as on the command line.
        dataset: Name of the data set, as on the command line.
        split: Split that was measured on.
        val_split: Split that fixed the curve's thresholds, if there is a curve.
        training: Description of the training of the weights; empty if nothing is recorded.
        epochs: Number of epochs, if recorded.
        command: Command that made the report.
        machine: Processor, threads and versions.
        versions: Further versions.
        date: Date and time, in UTC.
    """

    model: str
    dataset: str
    split: str
    val_split: str | None = None
    training: str = ""
    epochs: int | None = None
    command: str = ""
    machine: str = field(default_factory=describe_machine)
    versions: str = field(default_factory=lambda: _versions())
    date: str = field(default_factory=lambda: f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC")


def training_of(model_name: str, checkpoint: Path | None = None) -> tuple[str, int | None]:
    """Description of the training of a model's weights and number of epochs; ``("", None)`` if nothing is recorded.

    Sources are a checkpoint of ``train.py``, or the results beside packaged weights or in a model's folder.

    Raises:
        ValueError: If the results cannot be read.
    """
    if checkpoint is not None:
        return "", None
    if Path(model_name).is_file():
        epochs = read_run(Path(model_name)).epoch + 1
        return f"a checkpoint of train.py after {_epochs(epochs)}", epochs
    if model_name.startswith("local-dir:"):
        folder: Path | None = Path(model_name.removeprefix("local-dir:"))
    else:
        folder = packaged_folder(model_name)
    if folder is None or not (folder / RESULTS_FILE).is_file():
        return "", None
    try:
        results = json.loads((folder / RESULTS_FILE).read_text())
        training = results["training"]
        phases = [int(phase["epochs"]) for phase in (*training.get("earlier_phases", ()), training)]
        epochs = sum(phases)
        parts = [" + ".join([*map(str, phases[:-1]), _epochs(phases[-1])])]
        if "samples" in training:
            parts[0] += f" on {int(training['samples']):,} images"
        parts += [f"recipe {training['recipe']}"] if training.get("recipe") else []
        parts += [str(training["hardware"])] if training.get("hardware") else []
        start = results.get("base_model") or results.get("base_weights", {}).get("source")
        base = f", from the weights of {start}" if start else ""
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Cannot read how the weights were trained from {folder / RESULTS_FILE} ({type(error).__name__}: {error}); "
            "remove the file or correct it."
        ) from error
    return f"{', '.join(parts)}{base}", epochs


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"


def _versions() -> str:
    import matplotlib

    return f"Python {platform.python_version()}, timm_dfs {__version__}, matplotlib {matplotlib.__version__}"
