"""Checks whether weights, configs and presets fit a model."""

from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.models import get_arch_name

from ..base.chain import KEY as CHAIN_KEY
from ..base.model import MultiExitModel
from ..base.objective import Objective
from ..base.partition import changes_values
from ..base.recorded_betas import KEY as BETAS_KEY
from ..calibration.operating_point import check_preset
from ..wrapped.recorded_points import KEY as EXIT_POINTS_KEY
from .packaged import CONFIG_FILE

_RECORDED = {CHAIN_KEY, EXIT_POINTS_KEY, BETAS_KEY}
"""Keys of a state dict that hold settings which weights alone do not tell."""

# Arguments that only the caller may set, not a config: they say where weights come from.
_CALLERS_OWN = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}


def check_config(config: Any, name: str, num_exits: Callable[[dict], int | None], where: str) -> None:
    """Refuse a ``config.json`` of another architecture, or one that asks for what no config may.

    Args:
        config: The file's content.
        name: The architecture it should be of, with or without a tag.
        num_exits: From a model's arguments to its number of exits; None where the arguments do not tell it.
        where: The folder or repository, for messages.

    Raises:
        ValueError: If the architecture is another, an argument is the caller's own, or a preset is refused by
            :func:`~timm_dfs.calibration.operating_point.check_preset`.
    """
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{CONFIG_FILE} of {where} names no architecture; it is not one of timm's.")
    architecture, name = get_arch_name(config["architecture"]), get_arch_name(name)
    if architecture != name:
        raise ValueError(
            f"{where} holds a {architecture}, not a {name}; it is not loaded. Check the repository's name."
        )
    arguments = config.get("model_args", {})
    if not isinstance(arguments, dict) or _CALLERS_OWN & arguments.keys():
        raise ValueError(f"{CONFIG_FILE} of {where} has model_args that only the caller may give: {arguments}.")
    check_presets(arguments.get("presets") or {}, num_exits(arguments), f" of {where}")


def check_presets(presets: Any, num_exits: int | None, of: str = "") -> None:
    """Refuse presets of which one does not fit a model with ``num_exits`` exits (None: unknown), by its name.

    Raises:
        ValueError: If they are not a dict by name, or
            :func:`~timm_dfs.calibration.operating_point.check_preset` refuses one.
    """
    if not isinstance(presets, dict):
        raise ValueError(f"The presets{of} are {presets!r}; give a dict of presets by name.")
    for name, preset in presets.items():
        try:
            check_preset(preset, num_exits)
        except ValueError as error:
            raise ValueError(f"Preset {name!r}{of}: {error}") from error


def fit_checkpoint(
    state_dict: dict, model: MultiExitModel, config: dict, source: str, keep_classes: bool = False
) -> dict:
    """A checkpoint as timm is to load it: complete, without adapters, its classes kept if they are the model's.

    Args:
        state_dict: The checkpoint, its keys already the model's.
        model: The model to load it into.
        config: The pretrained config that timm loads by; corrected in place.
        source: The place it is from, for errors.
        keep_classes: Whether to keep classifiers for which the config asks for new ones.

    Raises:
        ValueError: If keys are missing or unknown.
    """
    # Adapters serve training only, and so do the norms of the augmented parts of a batch (train.py --split-bn).
    state_dict = {
        key: value for key, value in state_dict.items() if not key.startswith("adapters.") and ".aux_bn." not in key
    }
    _check_keys(state_dict, model, source)
    classifier = state_dict.get(f"{config['classifier'][-1]}.weight")
    if classifier is not None and len(classifier) == model.num_classes and (keep_classes or config["num_classes"] >= 0):
        # A fine-tuned checkpoint has the model's classes, whatever the config says, so timm keeps its classifiers. With
        # a negative number in the config train.py asks for fresh ones.
        config["num_classes"] = model.num_classes
    elif classifier is not None and 0 <= config["num_classes"] != model.num_classes:
        config["num_classes"] = len(classifier)  # what the weights have, for messages; timm makes new classifiers
    return state_dict


def _check_keys(state_dict: dict, model: MultiExitModel, source: str) -> None:
    optional = {f"{name}.{part}" for name in model.pretrained_cfg["classifier"] for part in ("weight", "bias")}
    if model.num_classes > 0:  # a model without classes ignores the checkpoint's classifiers
        optional = set()
    # Compared when they are loaded; weights without a chain may be trained further with one.
    optional |= _RECORDED
    expected = {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}
    expected -= _RECORDED
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


def unreadable(error: Exception, file: str, name: str) -> Exception:
    """The error that says why a file of weights cannot be loaded into the model of this name, and what can be."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"There is no weights file {file}; check the path.")
    reason = "it holds pickled objects or is no checkpoint" if "weights_only" in str(error) else repr(error)
    return ValueError(
        f"Cannot load {file} into {name}: {reason}. Give a .safetensors file or a checkpoint of tensors only "
        "(nothing else is unpickled) that was saved by this model or by the official code for it."
    )


def check_last_exit(model: MultiExitModel, objective: Objective, classes: int) -> None:
    """Refuse to freeze a last exit, and perhaps to learn from it, whose classifier is not that of the weights loaded.

    Args:
        model: The model, with its weights.
        objective: The settings that it is to be trained with.
        classes: Number of classes of the weights, by which timm decides whether to keep their classifiers; negative if
            new ones were asked for.

    Raises:
        ValueError: If ``objective`` freezes the last exit and its classifier is new.
    """
    if objective.freezes_last_exit and classes != model.num_classes:
        raise ValueError(
            f"These settings freeze the last exit, but its classifier is new: the weights have "
            f"{classes if classes > 0 else 'other'} classes, and num_classes is {model.num_classes}. Give the weights' "
            "number of classes (train.py --num-classes), or the last exit a weight in loss_weights."
        )


def settle_presets(
    model: MultiExitModel, trained: dict, given: dict, loaded: bool, changed_images: Sequence[str] = ()
) -> None:
    """Check a model's presets; drop, with a warning, those that came with weights and do not fit the model as built.

    The arguments that the weights belong to are noted, so that timm saves them with the caller's.

    Args:
        model: The model.
        trained: The ``model_args`` of its weights; empty if there are none.
        given: The arguments that the model was created with, those of the weights among them.
        loaded: Whether the weights were loaded.
        changed_images: Fields by which images are prepared in another way than for the weights.

    Raises:
        ValueError: If a preset that did not come with weights does not fit.
    """
    model._model_args = trained
    if model.presets != trained.get("presets"):
        check_presets(model.presets, model.num_exits)
        return
    if not loaded:
        model.drop_presets(model.presets, "the weights they were fitted to are not loaded; give pretrained=True")
    if changed_images:
        model.drop_presets(
            model.presets, f"they were fitted to images prepared with another {' and '.join(changed_images)}"
        )
    if changes := changed_arguments(model, trained, given):
        model.drop_presets(model.presets, f"the model's {' and '.join(changes)} are not those they were fitted to")
    unfit = {}
    for name, preset in model.presets.items():
        try:
            check_preset(preset, model.num_exits)
        except ValueError as error:
            unfit[name] = str(error).rstrip(".")
    model.drop_presets(unfit, "; ".join(dict.fromkeys(unfit.values())))
    model.presets_belong_to_weights()


def changed_arguments(model: MultiExitModel, trained: dict, given: dict) -> list[str]:
    """Names of the arguments that decide logits and differ from those that the weights belong to."""
    cfg = model.pretrained_cfg
    usual = dict(num_classes=cfg.get("num_classes"), in_chans=cfg["input_size"][0], chain=0.0)
    if model.pool_type is not None:
        usual["global_pool"] = "avg"
    ours = dict(given, num_classes=model.num_classes, in_chans=model.in_chans, chain=model.chain)
    changed = [
        key
        for key, value in ours.items()
        if key not in _IRRELEVANT and "drop" not in key and not _same(key, value, trained.get(key, usual.get(key)))
    ]
    ratios = _decisive_beta(model.referencing, model.beta)
    if not _same("beta", ratios, _decisive_beta(trained.get("referencing"), trained.get("beta"))):
        changed.append("beta or referencing")
    return changed


def _decisive_beta(referencing: str | None, beta: Any) -> Any:
    """The partition ratio where it decides logits: without referencing."""
    return beta if changes_values(referencing, beta) else None


_IRRELEVANT = {
    "presets",
    "pretrained_model_args",
    "beta",
    "referencing",
    "exits",
    "head",
    "bn_momentum",
    "device",
    "dtype",
    *_CALLERS_OWN,
}
"""Arguments that decide no logits, or that weights fit only if they are the same."""


def _same(name: str, one: Any, other: Any) -> bool:
    """Whether two values of an argument are the same; a height alone is that of a square."""
    if name == "img_size" and one is not None and other is not None:
        one, other = to_2tuple(one), to_2tuple(other)
    return one == other or (isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and [*one] == [*other])
