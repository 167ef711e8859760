"""Weights that came with this installation."""

import json
from pathlib import Path
from typing import Any

from ..data.images import TEST_PREPARATION

WEIGHTS_FILE = "model.safetensors"

CONFIG_FILE = "config.json"

BESIDE = ("num_classes", "label_names")
"""Fields of ``PretrainedCfg`` that timm writes beside it in ``config.json``, and reads from there."""

OF_IMAGES = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""Fields of ``PretrainedCfg`` that say how images are prepared."""

_PACKAGE = Path(__file__).parent.parent


def _hubs() -> tuple[Path, Path]:
    return _PACKAGE / "pretrained" / "weights", _PACKAGE.parent / "hub"  # in a wheel; in a checkout


def packaged_folder(name: str) -> Path | None:
    """Folder with the weights that came with this installation under a model's name; ``None`` if none did."""
    for hub in _hubs():
        if (hub / name / WEIGHTS_FILE).is_file() and (hub / name / CONFIG_FILE).is_file():
            return hub / name
    return None


def packaged_folder_of(file: str | None) -> Path | None:
    """The packaged folder that a weights file lies in; ``None`` for any other file."""
    if file is None or Path(file).name != WEIGHTS_FILE:
        return None
    folder = Path(file).parent
    return folder if packaged_folder(folder.name) == folder else None


def packaged_file(name: str) -> Path | None:
    """The weights in :func:`packaged_folder`."""
    folder = packaged_folder(name)
    return folder / WEIGHTS_FILE if folder else None


def packaged_images(name: str) -> dict[str, Any]:
    """What the config in :func:`packaged_folder` says of the images and classes, as fields of ``PretrainedCfg``."""
    folder = packaged_folder(name)
    if folder is None:
        return {}
    config = json.loads((folder / CONFIG_FILE).read_text())
    recorded = {**dict.fromkeys(TEST_PREPARATION), **config["pretrained_cfg"]}
    recorded.update((key, config[key]) for key in BESIDE if config.get(key))
    return {
        field: tuple(value) if isinstance(value, list) else value
        for field, value in recorded.items()
        if field in (*OF_IMAGES, *TEST_PREPARATION, *BESIDE)
    }


def packaged_names() -> set[str]:
    """Names of the models with weights in this installation, tags included."""
    return {folder.name for hub in _hubs() if hub.is_dir() for folder in hub.iterdir() if packaged_folder(folder.name)}
