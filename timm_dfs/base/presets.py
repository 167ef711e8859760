"""Presets as a model's ``config.json`` can hold them, and whether the weights are still those they were fitted to."""

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


def classifier_biases(model: Any) -> torch.Tensor:
    """Biases of the exits' classifiers, or a row of weights of those without, as one vector: any training changes it.

    A copy in float32 on the CPU; empty for weights that are not there (of the meta device) or of another kind.
    """
    found = []
    for classifier in model.get_classifier():
        bias, weight = getattr(classifier, "bias", None), getattr(classifier, "weight", None)
        values = bias if isinstance(bias, torch.Tensor) else weight[0] if isinstance(weight, torch.Tensor) else None
        if values is not None and not values.is_meta:
            found.append(values.detach().float().flatten())
    if len({values.device for values in found}) > 1:
        found = [values.cpu() for values in found]
    return torch.cat(found).cpu() if found else torch.empty(0)  # one transfer from the device


def were_trained(biases: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether :func:`classifier_biases` changed by more than a conversion to half precision rounds them."""
    return biases.shape == before.shape and not torch.allclose(biases, before, rtol=2**-8, atol=1e-6)


def _finite(preset: Any) -> Any:
    if not isinstance(preset, dict) or "thresholds" not in preset:
        return preset
    thresholds = preset["thresholds"]
    if isinstance(thresholds, torch.Tensor):
        thresholds = thresholds.tolist()
    return dict(preset, thresholds=[None if value == math.inf else value for value in thresholds])
