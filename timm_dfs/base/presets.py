"""Presets as a model's ``config.json`` can hold them."""

import json
import math
from typing import Any

import torch


def presets_as_json(presets: dict[str, dict]) -> dict[str, dict]:
    """Presets with None for an infinite threshold, which JSON cannot hold and which means the same: never exit.

    Raises:
        ValueError: If a preset holds something else that JSON cannot: another infinity, NaN, or an object.
    """
    written = {name: _finite(preset) for name, preset in presets.items()}
    for name, preset in written.items():
        try:
            json.dumps(preset, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Preset {name!r} cannot be written as JSON: {error}. It is {preset}.") from error
    return written


def _finite(preset: Any) -> Any:
    if not isinstance(preset, dict) or "thresholds" not in preset:
        return preset
    thresholds = preset["thresholds"]
    if isinstance(thresholds, torch.Tensor):
        thresholds = thresholds.tolist()
    return dict(preset, thresholds=[None if value == math.inf else value for value in thresholds])
