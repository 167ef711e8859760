"""A twin with exits of every architecture that timm has: ``dfs_resnet50``, ``dfs_vit_small_patch16_224``, …

A twin is :class:`timm_dfs.MultiExit` around timm's model. Keyword arguments that are not about exits go to the model.
"""

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import DefaultCfg, PretrainedCfg, load_pretrained, load_state_dict, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._registry import _model_default_cfgs

from ..base.arguments import check_names
from ..base.objective import SETTINGS, take_settings
from ..base.partition import JOINT
from ..pretrained.checks import check_presets, fit_checkpoint
from ..pretrained.packaged import WEIGHTS_FILE, packaged_file, packaged_folder, packaged_model_args, packaged_names
from ..pretrained.sources import find_trained
from ..wrapped.exit_points import stages
from ..wrapped.multi_exit import MultiExit
from ..wrapped.with_classifier import WithClassifier, is_encoder

PREFIX = "dfs_"

EXITS = 4
"""Exits of a twin, the last included, or as many as there are stages."""

_OURS = ("exits", "beta", "referencing", "head", "exit_drop_rate", "presets")

_NOT_OF_BASES = ("exits", "beta", "referencing", "presets", *SETTINGS)
"""Arguments to which no argument of a timm model has a similar name."""


def _without_weights(cfg: PretrainedCfg) -> PretrainedCfg:
    """What images the base wants; the twin has no trained exits."""
    return replace(cfg, url=None, file=None, state_dict=None, hf_hub_id=None, hf_hub_filename=None, custom_load=False)


def _default_cfg(base: str) -> DefaultCfg:
    """The base's configs under the twin's name, with the weights that came with this installation, if any did."""
    ours = packaged_folder(PREFIX + base) if PREFIX + base in _PACKAGED else None
    known: Any = _model_default_cfgs.get(base)
    cfgs = {tag: _without_weights(cfg) for tag, cfg in known.cfgs.items()} if known else {"": PretrainedCfg()}
    tags = deque(known.tags) if known else deque([""])
    if ours is not None:
        cfgs[tags[0]] = replace(cfgs[tags[0]], file=str(ours / WEIGHTS_FILE))
    return DefaultCfg(tags=tags, cfgs=cfgs, is_pretrained=ours is not None)


def _entrypoint(base: str) -> Callable[..., MultiExit]:
    def create(pretrained: bool = False, **kwargs: Any) -> MultiExit:
        return create_twin(base, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = PREFIX + base
    create.__doc__ = f"timm's {base} with partitioned exits, see :class:`timm_dfs.MultiExit`."
    create.__module__ = __name__
    return create


def create_twin(base: str, pretrained: bool = False, **kwargs: Any) -> MultiExit:
    """timm's model ``base`` with exits.

    Args:
        base: timm's name of the architecture.
        pretrained: Load the exits' weights from a file, folder or Hub repository that the pretrained config names;
            without any, the base's own weights, with fresh exits and a warning.
        **kwargs: ``exits``, ``beta``, ``referencing``, ``head``, ``exit_drop_rate`` and ``presets`` are
            :class:`timm_dfs.MultiExit`'s; the settings of :class:`timm_dfs.Objective`; the rest is the base's.

    Raises:
        ValueError: If an exit cannot be where it is wanted, or weights do not fit.
    """
    name = PREFIX + base
    check_names(name, kwargs, _NOT_OF_BASES)
    if kwargs.pop("features_only", False):
        return timm.create_model(  # type: ignore[return-value]
            base, pretrained=pretrained, features_only=True, **_bases_own(kwargs)
        )
    given_cfg, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    cfg = resolve_pretrained_cfg(name, given_cfg, overlay)
    tag = given_cfg if isinstance(given_cfg, str) else None
    if pretrained and (
        found := find_trained(name, cfg, overlay, packaged_file(name), _num_exits, kwargs.get("cache_dir"))
    ):
        overlay = {**(overlay or {}), **found.overlay}
        kwargs = {**found.model_args, "pretrained_model_args": found.model_args, **kwargs}
        cfg = resolve_pretrained_cfg(name, given_cfg, overlay)
    trained = (cfg.hf_hub_id if cfg.source == "hf-hub" else None) or cfg.state_dict or cfg.file or cfg.url
    if pretrained and trained:
        if packaged := packaged_model_args(cfg.file):
            kwargs = {**packaged, "pretrained_model_args": packaged, **kwargs}
    trained_args = kwargs.pop("pretrained_model_args", None) or {}
    objective, kwargs = take_settings(kwargs)
    exit_args = {key: kwargs.pop(key) for key in _OURS if key in kwargs}
    if exit_args.get("beta") == JOINT:
        exit_args["beta"] = None
    exit_args["drop_rate"] = exit_args.pop("exit_drop_rate", kwargs.get("drop_rate", 0.0))
    from_base = pretrained and not trained
    base_overlay = {key: value for key, value in cfg.to_dict().items() if key not in (*_SOURCE, *_OF_TWIN)}
    state_dict = _weights(cfg) if pretrained else None
    if state_dict and not _has_exits(state_dict):
        from_base = True
        base_overlay.update(_fitting(state_dict, cfg, overlay or {}, kwargs))
    backbone: Any = timm.create_model(
        f"{base}.{tag}" if tag and from_base else base,
        pretrained=from_base,
        pretrained_cfg_overlay=base_overlay,
        **kwargs,
    )
    if is_encoder(backbone):
        backbone = WithClassifier(backbone, kwargs.get("num_classes", 0))
    if from_base and state_dict and not _fingerprints(state_dict) & _fingerprints(backbone.state_dict()):
        raise ValueError(f"The weights from {cfg.file or 'the given state dict'} are none of {name}'s or {base}'s.")
    if "img_size" in kwargs:
        backbone.pretrained_cfg["input_size"] = (3, *to_2tuple(kwargs["img_size"]))
    exits = exit_args.pop("exits", min(EXITS, len(stages(backbone))))
    model = MultiExit(backbone, exits, **exit_args)
    model.pretrained_cfg = _config(cfg, model)
    if from_base:
        warnings.warn(
            f"{name} has the weights of timm's {base}; its {model.num_exits - 1} early exits are untrained. Train them "
            "(train.py --pretrained, see docs/training.md) before use.",
            stacklevel=2,
        )
    elif pretrained:
        config = dict(model.pretrained_cfg)
        load_pretrained(
            model,
            pretrained_cfg=config,
            num_classes=model.num_classes,
            in_chans=model.in_chans,
            filter_fn=lambda weights, model: _checked(weights, model, config),
        )
    check_presets(model, trained_args)
    model.train_for(objective)
    return model


def _num_exits(model_args: dict[str, Any]) -> int | None:
    exits = model_args.get("exits")
    return len(exits) + 1 if isinstance(exits, (list, tuple)) else exits


def _bases_own(kwargs: dict[str, Any]) -> dict[str, Any]:
    _, rest = take_settings(kwargs)
    return {
        key: value for key, value in rest.items() if key not in (*_OURS, "pretrained_cfg", "pretrained_cfg_overlay")
    }


def _config(cfg: PretrainedCfg, model: MultiExit) -> dict[str, Any]:
    """The base's config, with the twin's source of weights and the names that its parameters have."""
    config = {key: value for key, value in model.pretrained_cfg.items() if key not in _SOURCE}
    config.update((key, value) for key, value in cfg.to_dict().items() if key in (*_SOURCE, "architecture", "tag"))
    classifiers, first_convs = (_names(config.get(key)) for key in ("classifier", "first_conv"))
    config["classifier"] = (*(f"heads.{k}.fc" for k in range(len(model.heads))), *classifiers)
    config["first_conv"] = first_convs
    return config


_OF_TWIN = ("architecture", "tag", "classifier", "first_conv")

_SOURCE = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")


def _names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    return tuple(f"backbone.{name}" for name in ([value] if isinstance(value, str) else value or ()))


def _weights(cfg: PretrainedCfg) -> dict[str, Any] | None:
    """Those at hand: a published model's are its own, exits included."""
    if cfg.source in ("hf-hub", "local-dir"):
        return None
    return cfg.state_dict or (load_state_dict(str(cfg.file)) if cfg.file else None)


def _has_exits(state_dict: dict[str, Any]) -> bool:
    return any(key.startswith(("heads.0.", "middle_heads.0.")) for key in state_dict) and any(
        key.startswith(("backbone.", "backbone_model.")) for key in state_dict
    )


def _fingerprints(state_dict: dict[str, Any]) -> set[tuple[int, float]]:
    """What tells whether weights are the same, whatever they are called: timm renames, and ignores what is foreign."""
    return {(value.numel(), round(value.double().sum().item(), 3)) for value in state_dict.values() if value.ndim > 1}


def _fitting(
    state_dict: dict[str, Any], cfg: PretrainedCfg, overlay: dict[str, Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The overlay for the base's weights in a file: its own classes, where they are the wanted ones, are kept."""
    classifier = state_dict.get(f"{cfg.classifier}.weight")
    wanted = kwargs.get("num_classes")
    if classifier is not None and len(classifier) == wanted and overlay.get("num_classes", wanted) > 0:
        return dict(overlay, num_classes=wanted)
    return overlay


def _checked(state_dict: dict[str, Any], model: MultiExit, config: dict[str, Any]) -> dict[str, Any]:
    if any(key.startswith("backbone_model.") for key in state_dict):
        state_dict = _from_official(state_dict)
    source = str(config.get("file") or config.get("hf_hub_id") or "the given state dict")
    return fit_checkpoint(state_dict, model, config, source)


def _from_official(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The keys of the official ViT wrapper; of a block that it has twice, ``blocks.*`` is the one it runs."""
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


BASES = tuple(name for name in timm.list_models() if not name.startswith(PREFIX))
"""timm's architectures."""

_PACKAGED = packaged_names()  # once: to look for each folder is a quarter of the import

default_cfgs = {PREFIX + base: _default_cfg(base) for base in BASES}

for _base in BASES:
    globals()[PREFIX + _base] = register_model(_entrypoint(_base))
