"""Whether weights, configs and presets fit a model."""

from collections.abc import Callable
from typing import Any

from timm.models import get_arch_name

from ..base.model import MultiExitModel
from ..calibration.operating_point import check_preset
from ..inference.policy import ExitPolicy
from .packaged import CONFIG_FILE

# What a config may not decide for whoever loads it: where weights come from.
_CALLERS_OWN = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def check_config(config: Any, name: str, num_exits: Callable[[dict], int | None], where: str) -> None:
    """Refuse a ``config.json`` that is not one of ``name``'s, tags aside, or asks for what no config may.

    Raises:
        ValueError: If the architecture is another, an argument is the caller's own, or a preset has not one threshold
            in [0, 1], or null, for each exit.
    """
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{CONFIG_FILE} of {where} names no architecture; it is none of timm's.")
    architecture, name = get_arch_name(config["architecture"]), get_arch_name(name)
    if architecture != name:
        raise ValueError(
            f"{where} holds a {architecture}, not a {name}; it is not loaded. Check the repository's name."
        )
    arguments = config.get("model_args", {})
    if not isinstance(arguments, dict) or _CALLERS_OWN & arguments.keys():
        raise ValueError(f"{CONFIG_FILE} of {where} has model_args that only the caller may give: {arguments}.")
    exits = num_exits(arguments)
    for preset_name, preset in (arguments.get("presets") or {}).items():
        try:
            policy = ExitPolicy.from_preset(preset)
            if exits is not None:
                policy.check_exits(exits)
        except ValueError as error:
            raise ValueError(f"Preset {preset_name!r} of {where}: {error}") from error
        bad = [value for value in preset["thresholds"] if value is not None and not 0 <= value <= 1]
        if bad:
            raise ValueError(
                f"Preset {preset_name!r} of {where} has the threshold {bad[0]}; confidences are in [0, 1], and null is "
                "for an exit that never answers."
            )


def fit_checkpoint(state_dict: dict, model: MultiExitModel, config: dict, source: str) -> dict:
    """A checkpoint of ours as timm is to load it: complete, without adapters, its classes kept if they are the model's.

    Args:
        state_dict: The checkpoint, its keys ours.
        model: The model to load it into.
        config: The pretrained config that timm loads by; corrected in place.
        source: Where it is from, for errors.

    Raises:
        ValueError: If keys are missing or unknown.
    """
    # Adapters serve training only, and so do the norms of the augmented parts of a batch (train.py --split-bn).
    state_dict = {
        key: value for key, value in state_dict.items() if not key.startswith("adapters.") and ".aux_bn." not in key
    }
    _check_keys(state_dict, model, source)
    classifier = state_dict.get(f"{config['classifier'][-1]}.weight")
    if classifier is not None and len(classifier) == model.num_classes and config["num_classes"] > 0:
        # A fine-tuned checkpoint has our classes, whatever the config says: timm keeps its classifiers. A negative
        # number in the config is train.py's way to have fresh ones.
        config["num_classes"] = model.num_classes
    return state_dict


def _check_keys(state_dict: dict, model: MultiExitModel, source: str) -> None:
    optional = {f"{name}.{part}" for name in model.pretrained_cfg["classifier"] for part in ("weight", "bias")}
    if model.num_classes > 0:  # without classes, those of the checkpoint are let go
        optional = set()
    expected = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
    present = {key for key in state_dict if not key.endswith("num_batches_tracked")} - optional
    problems = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', …' if len(keys) > 3 else ''})"
        for what, keys in (("missing", expected - present), ("unknown", present - expected))
        if keys
    ]
    if problems:
        raise ValueError(
            f"The weights from {source} do not fit {type(model).__name__}: {' and '.join(problems)} of its "
            f"{len(expected)} tensors. Give the exits and other settings that they were trained with."
        )


def check_presets(model: MultiExitModel, trained: dict) -> None:
    """Drop presets that came with weights, whose ``model_args`` are ``trained``, where they do not fit the model.

    Raises:
        ValueError: If one that did not come with weights does not fit.
    """
    came_with_weights = model.presets == trained.get("presets")
    changes = [
        what
        for what, changed in (
            ("classes", model.num_classes != model.pretrained_cfg.get("num_classes")),
            ("values", (model.referencing == "off") != (trained.get("referencing", model.referencing) == "off")),
            ("pooling", model.pool_type not in (None, trained.get("global_pool", "avg"))),
        )
        if changed
    ]
    if changes and came_with_weights:
        model.drop_presets(model.presets, f"the model's {' and '.join(changes)} are not those they were fitted to")
    unfit = {}
    for name, preset in model.presets.items():
        try:
            check_preset(preset, model.num_exits)
        except ValueError as error:
            if not came_with_weights:
                raise ValueError(f"Preset {name!r}: {error}") from error
            unfit[name] = str(error).rstrip(".")
    model.drop_presets(unfit, "; ".join(dict.fromkeys(unfit.values())))
