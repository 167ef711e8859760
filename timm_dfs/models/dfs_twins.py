"""Twins with exits of all of timm's architectures: ``dfs_resnet50``, ``dfs_vit_small_patch16_224``, …

A twin is :class:`timm_dfs.MultiExit` around timm's model. Keyword arguments that are not about exits go to the model.
"""

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    clean_state_dict,
    is_model_pretrained,
    load_pretrained,
    load_state_dict,
)
from torch import nn

from ..base.arguments import check_names
from ..base.objective import SETTINGS, take_settings
from ..data.images import TEST_PREPARATION
from ..pretrained.checks import check_last_exit, fit_checkpoint, settle_presets, unreadable
from ..pretrained.packaged import packaged_file, packaged_images, packaged_names
from ..pretrained.sources import resolve
from ..wrapped.families import takes_drop_rate
from ..wrapped.multi_exit import MultiExit
from ..wrapped.recorded_points import refuse_other_points
from ..wrapped.with_classifier import WithClassifier, is_encoder
from ._registry import architectures, copied, default_cfg_of, register_models

PREFIX = "dfs_"

_OURS = ("exits", "beta", "referencing", "head", "exit_drop_rate", "presets", "chain")

_NOT_OF_BASES = ("exits", "beta", "referencing", "presets", "chain", *SETTINGS)
"""Arguments to which no argument of a timm model has a similar name."""


_NO_WEIGHTS: dict[str, Any] = dict(
    url=None, file=None, state_dict=None, hf_hub_id=None, hf_hub_filename=None, custom_load=False
)


class Entrypoint:
    """timm's entrypoint of the twin of one architecture, :func:`create_twin`.

    Args:
        base: timm's name of the architecture.
    """

    __slots__ = ("base",)

    def __init__(self, base: str):
        self.base = base

    @property
    def __name__(self) -> str:
        return PREFIX + self.base

    def __call__(self, pretrained: bool = False, **kwargs: Any) -> MultiExit:
        return create_twin(self.base, pretrained, **kwargs)


def _default_cfg(base: str) -> DefaultCfg:
    """The base's configs under the twin's name: the images that they say are the twin's, the weights are not."""
    known = default_cfg_of(base) or DefaultCfg(deque([""]), {"": PretrainedCfg()})
    name = PREFIX + base
    cfgs = {tag: copied(cfg, **_NO_WEIGHTS, architecture=name, tag=tag or None) for tag, cfg in known.cfgs.items()}
    return DefaultCfg(known.tags.copy(), cfgs)


def _add_packaged(default_cfgs: dict[str, DefaultCfg]) -> None:
    """Add the weights that came with this installation, under the default tag or one of their own."""
    for packaged in sorted(packaged_names()):
        name, _, tag = packaged.partition(".")
        if (default := default_cfgs.get(name)) is None:
            continue
        if tag and tag not in default.cfgs:
            default.tags.append(tag)
        tag = tag or default.tags[0]
        cfg = default.cfgs.get(tag, default.default)
        about = packaged_images(packaged)
        default.cfgs[tag] = copied(cfg, **about, tag=tag or None, file=str(packaged_file(packaged)))
        default.is_pretrained = True


def create_twin(base: str, pretrained: bool = False, **kwargs: Any) -> MultiExit:
    """timm's model ``base`` with exits.

    Args:
        base: timm's name of the architecture.
        pretrained: Load the exits' weights from a file, folder or Hub repository that the pretrained config names;
            without any, the base's own weights, with fresh exits and a warning.
        **kwargs: ``exits``, ``beta``, ``referencing``, ``head``, ``exit_drop_rate``, ``presets`` and ``chain`` are
            :class:`timm_dfs.MultiExit`'s; the settings of :class:`timm_dfs.Objective`; the rest is the base's.

    Raises:
        ValueError: If a module cannot be an exit point, or weights do not fit.
    """
    name = PREFIX + base
    check_names(name, kwargs, _NOT_OF_BASES)
    features_only = kwargs.pop("features_only", False)
    given_cfg, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    weights = resolve(name, given_cfg, overlay, pretrained, _num_exits, kwargs.get("cache_dir"))
    cfg, kwargs = weights.cfg, weights.complete(kwargs)
    if cfg.state_dict:  # timm removes the prefixes of wrappers from a file's keys only
        cfg = replace(cfg, state_dict=clean_state_dict(cfg.state_dict))
        overlay = dict(overlay or {}, state_dict=cfg.state_dict)
    elif cfg.file:  # also where it is not the overlay but the whole config that names it
        overlay = dict(overlay or {}, file=cfg.file)
    trained_args = kwargs.pop("pretrained_model_args", None) or {}
    objective, kwargs = take_settings(kwargs)
    drop_rate = kwargs.get("drop_rate", 0.0)
    if not takes_drop_rate(base):
        kwargs.pop("drop_rate", None)
    base_overlay = {key: value for key, value in cfg.to_dict().items() if key not in (*_SOURCE, *_OF_TWIN)}
    base_overlay.update((key, getattr(cfg, key)) for key in TEST_PREPARATION)  # None, too
    if features_only:
        _refuse_features_of_twin(name, base, weights.source if pretrained else "")
        kwargs = {key: value for key, value in kwargs.items() if key not in _OURS}
        return timm.create_model(  # type: ignore[return-value]
            _tagged(base, cfg, pretrained),
            pretrained,
            pretrained_cfg_overlay=base_overlay,
            features_only=True,
            **kwargs,
        )
    exit_args = {key: kwargs.pop(key) for key in _OURS if key in kwargs}
    exit_args["drop_rate"] = exit_args.pop("exit_drop_rate", drop_rate)
    from_base = pretrained and not weights.source
    state_dict = _weights(cfg, name) if pretrained else None
    if state_dict and not _has_exits(state_dict):
        from_base = True
        base_overlay.update(_fitting(state_dict, cfg, overlay or {}, kwargs, objective.freezes_last_exit))
    backbone: Any = timm.create_model(
        _tagged(base, cfg, from_base),
        pretrained=from_base,
        pretrained_cfg_overlay=base_overlay,
        **kwargs,
    )
    if is_encoder(backbone):
        backbone = WithClassifier(backbone, kwargs.get("num_classes", 0), drop_rate)
    if from_base and state_dict and not _fingerprints(state_dict) & _fingerprints(backbone.state_dict()):
        raise ValueError(f"The weights from {weights.source} are neither {name}'s nor {base}'s; give one of theirs.")
    if "img_size" in kwargs:
        channels = backbone.pretrained_cfg["input_size"][0]
        backbone.pretrained_cfg["input_size"] = (channels, *to_2tuple(kwargs["img_size"]))
    model = MultiExit(backbone, **exit_args)
    model.pretrained_cfg = _config(cfg, model)
    classes_loaded = base_overlay["num_classes"]
    if from_base:
        trained_ones = sorted(packaged for packaged in packaged_names() if packaged.startswith(f"{name}."))
        warnings.warn(
            f"{name} has the weights of timm's {base}; its {model.num_exits - 1} early exits are untrained. Train them "
            "(train.py --pretrained, see docs/training.md) before use"
            f"{', or take ' + ' or '.join(trained_ones) if trained_ones else ''}.",
            stacklevel=2,
        )
    elif pretrained:
        config = dict(model.pretrained_cfg)

        def load_base(weights: dict[str, Any]) -> nn.Module:
            its = dict(base_overlay, num_classes=model.num_classes, state_dict=weights)
            return timm.create_model(base, pretrained=True, pretrained_cfg_overlay=its, **kwargs)

        def fitting(weights: dict[str, Any], model: MultiExit) -> dict[str, Any]:
            weights = _checked(weights, model, config, objective.freezes_last_exit)
            return _resized(weights, model, cfg.input_size[1:], load_base if "img_size" in kwargs else None)

        load_pretrained(
            model,
            pretrained_cfg=config,
            num_classes=model.num_classes,
            in_chans=model.in_chans,
            filter_fn=fitting,
        )
        classes_loaded = config["num_classes"]
        if isinstance(points := trained_args.get("exits"), (list, tuple)):  # weights of older files do not record them
            refuse_other_points(model, points)
    if pretrained:
        check_last_exit(model, objective, classes_loaded)
        if classes_loaded > 0:  # as timm does with a model's own config, which here was a copy
            model.pretrained_cfg["num_classes"] = classes_loaded
            if len(model.pretrained_cfg.get("label_names") or ()) not in (0, classes_loaded):
                model.pretrained_cfg.update(label_names=None, label_descriptions=None)
    settle_presets(model, trained_args, kwargs, loaded=pretrained, changed_images=weights.changed_images)
    model.train_for(objective)
    return model


def _num_exits(model_args: dict[str, Any]) -> int | None:
    exits = model_args.get("exits")
    return len(exits) + 1 if isinstance(exits, (list, tuple)) else exits


def _tagged(base: str, cfg: PretrainedCfg, pretrained: bool) -> str:
    """The base's name, with the tag of its own weights where those are loaded and are timm's."""
    tagged = f"{base}.{cfg.tag}"
    return tagged if cfg.tag and pretrained and is_model_pretrained(tagged) else base


def _refuse_features_of_twin(name: str, base: str, source: str) -> None:
    if source:
        raise ValueError(
            f"features_only of {name} gives the features of timm's {base} with its own weights, not with those from "
            f"{source}; leave out features_only and call forward_intermediates, or use pretrained=False."
        )


def _config(cfg: PretrainedCfg, model: MultiExit) -> dict[str, Any]:
    """The base's config, with the twin's source of weights and the names that its parameters have."""
    config = {key: value for key, value in model.pretrained_cfg.items() if key not in _SOURCE}
    config.update((key, value) for key, value in cfg.to_dict().items() if key in _SOURCE)
    config.update(architecture=cfg.architecture, tag=cfg.tag)
    if isinstance(model.backbone, WithClassifier):  # the config is the encoder's, whose classifier timm has left out
        first = config.get("first_conv") or ()
        first = [first] if isinstance(first, str) else first
        config.update(classifier="head.fc", first_conv=[f"encoder.{name}" for name in first])
    classifiers, first_convs = (_names(config.get(key)) for key in ("classifier", "first_conv"))
    config["classifier"] = (*(f"heads.{k}.fc" for k in range(len(model.heads))), *classifiers)
    config["first_conv"] = first_convs
    return config


_OF_TWIN = ("architecture", "tag", "classifier", "first_conv")

_SOURCE = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")


def _names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return tuple(f"backbone.{name}" for name in ([value] if isinstance(value, str) else value or ()))


def _weights(cfg: PretrainedCfg, name: str) -> dict[str, Any] | None:
    """The state dict at hand, of the twin or the base; None for a published model, which has its exits.

    Raises:
        ValueError: If the file is damaged or no checkpoint of tensors.
        FileNotFoundError: If there is no such file.
    """
    if cfg.source in ("hf-hub", "local-dir"):
        return None
    if cfg.state_dict or not cfg.file:
        return cfg.state_dict
    try:
        return load_state_dict(str(cfg.file))
    except Exception as error:  # a damaged or foreign file can make torch and safetensors raise anything
        raise unreadable(error, str(cfg.file), name) from error


def _has_exits(state_dict: dict[str, Any]) -> bool:
    return any(key.startswith(("heads.0.", "middle_heads.0.")) for key in state_dict) and any(
        key.startswith(("backbone.", "backbone_model.")) for key in state_dict
    )


def _fingerprints(state_dict: dict[str, Any]) -> set[tuple[int, float]]:
    """Fingerprints that identify weights under any name: timm renames keys, and ignores unknown ones."""
    return {(value.numel(), round(value.double().sum().item(), 3)) for value in state_dict.values() if value.ndim > 1}


def _fitting(
    state_dict: dict[str, Any], cfg: PretrainedCfg, overlay: dict[str, Any], kwargs: dict[str, Any], keep: bool
) -> dict[str, Any]:
    """The overlay for loading the base's weights from a file; the classifier is kept if it has the wanted classes.

    ``train.py --pretrained-path`` asks for a new one whatever the classes, which ``keep`` overrules.
    """
    names = [cfg.classifier] if isinstance(cfg.classifier, str) else list(cfg.classifier or ())
    classifier = state_dict.get(f"{names[-1]}.weight") if names else None
    wanted = kwargs.get("num_classes")
    if classifier is not None and len(classifier) == wanted and (keep or overlay.get("num_classes", wanted) > 0):
        return dict(overlay, num_classes=wanted)
    return overlay


def _checked(state_dict: dict[str, Any], model: MultiExit, config: dict[str, Any], keep: bool) -> dict[str, Any]:
    if any(key.startswith("backbone_model.") for key in state_dict):
        state_dict = _from_official(state_dict)
    source = str(config.get("file") or config.get("hf_hub_id") or "the given state dict")
    return fit_checkpoint(state_dict, model, config, source, keep)


def _resized(
    state_dict: dict[str, Any],
    model: MultiExit,
    trained_size: Sequence[int],
    load: Callable[[dict[str, Any]], nn.Module] | None,
) -> dict[str, Any]:
    """A twin's checkpoint for images of the model's size: timm fits the base's part, as it does for the base itself.

    Args:
        state_dict: The checkpoint, its keys the model's.
        model: The model to load it into.
        trained_size: (height, width) of the images that the weights were trained on.
        load: From the base's part to a base of the model's size with these weights; None if no size was asked for.

    Raises:
        ValueError: If the sizes differ and none was asked for, or timm does not fit this base's weights to another.
    """
    size = model.pretrained_cfg["input_size"][1:]
    prefix = "backbone.encoder." if isinstance(model.backbone, WithClassifier) else "backbone."
    ours = {key: value for key, value in model.state_dict().items() if key.startswith(prefix)}
    own = {key: value for key, value in state_dict.items() if key in ours}
    classifiers, adapted = (
        {f"{name}.{part}" for name in model.pretrained_cfg[key] for part in ("weight", "bias")}
        for key in ("classifier", "first_conv")
    )  # timm's load_pretrained adapts these for any base
    other = [key for key in own if key not in classifiers | adapted and own[key].shape != ours[key].shape]
    if not other and (load is None or tuple(size) == tuple(trained_size)):
        return state_dict
    shapes = "; ".join(f"{key} has {tuple(own[key].shape)}, not {tuple(ours[key].shape)}" for key in other[:3])
    differ = f"The weights are not for this model and images of {'x'.join(map(str, size))} pixels ({shapes})"
    if load is None:
        raise ValueError(f"{differ}; give the settings that they were trained with, img_size among them.")
    own.update((key, ours[key]) for key in classifiers & ours.keys())
    try:
        base = load({key.removeprefix(prefix): value for key, value in own.items()})
    except RuntimeError as error:
        raise ValueError(
            f"{differ}, and timm cannot resize them; give the settings that they were trained with, as img_size."
        ) from error
    resized = {prefix + key: value for key, value in base.state_dict().items()}
    return state_dict | {key: value for key, value in resized.items() if key not in classifiers}


def _from_official(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Rename the keys of the official ViT wrapper. It holds some blocks twice, and runs those called ``blocks.*``."""
    renamed: dict[str, Any] = {}
    for key, value in state_dict.items():
        if key.startswith("backbone_model."):
            renamed.setdefault("backbone." + key.removeprefix("backbone_model."), value)
        elif key.startswith("blocks."):
            renamed["backbone." + key] = value
        elif key.startswith("middle_norms."):
            index, _, name = key.removeprefix("middle_norms.").partition(".")
            renamed[f"heads.{index}.body.0.{name}"] = value
        elif key.startswith("middle_heads."):
            index, _, name = key.removeprefix("middle_heads.").partition(".")
            renamed[f"heads.{index}.fc.{name}"] = value
        else:
            renamed[key] = value
    return renamed


BASES = tuple(name for name in architectures() if not name.startswith(PREFIX))
"""timm's architectures."""

default_cfgs = {PREFIX + base: _default_cfg(base) for base in BASES}

_add_packaged(default_cfgs)

_entrypoints = {PREFIX + base: Entrypoint(base) for base in BASES}

register_models("dfs_twins", _entrypoints, default_cfgs)

globals().update(_entrypoints)  # as timm's modules have them

__all__ = list(_entrypoints)
