"""Registration of many architectures at once.

``timm.models.register_model`` takes one function at a time: it copies every pretrained config by running its
``__init__`` and searches a list of all names before it appends one. For the twins of timm's architectures, more than a
thousand, that was half of this package's import. The entries that are made here are those that it makes.
"""

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import DefaultCfg, PretrainedCfg, _registry


def architectures() -> tuple[str, ...]:
    """Names of the registered architectures, deprecated ones left out, in the order of their registration.

    ``timm.list_models`` has the same; it sorts them, which takes longer.
    """
    return tuple(name for name in _registry._model_entrypoints if name not in _registry._deprecated_models)


def default_cfg_of(name: str) -> DefaultCfg | None:
    """The pretrained configs that an architecture is registered with, by tag."""
    return _registry._model_default_cfgs.get(name)  # type: ignore[return-value]  # timm annotates another type


def copied(cfg: PretrainedCfg, **changes: Any) -> PretrainedCfg:
    """As ``dataclasses.replace``, without running ``__init__``, which takes most of its time."""
    copy = object.__new__(PretrainedCfg)
    copy.__dict__ = {**cfg.__dict__, **changes}
    return copy


def register_models(
    module: str, entrypoints: Mapping[str, Callable[..., Any]], default_cfgs: Mapping[str, DefaultCfg]
) -> None:
    """Register architectures, each with the pretrained configs of its name.

    Args:
        module: Name of their module in ``timm.list_modules``.
        entrypoints: The architectures by name, none of which is registered yet.
        default_cfgs: Pretrained configs by the same names; ``architecture`` and ``tag`` are set in them.
    """
    _registry._model_entrypoints.update(entrypoints)
    _registry._model_to_module.update(dict.fromkeys(entrypoints, module))
    _registry._module_to_models[module].update(entrypoints)
    _registry._model_default_cfgs.update(default_cfgs)  # type: ignore[arg-type]
    cfgs, pretrained = _registry._model_pretrained_cfgs, _registry._model_has_pretrained
    for name, default in default_cfgs.items():
        cfgs[name] = default.default
        if default.default.has_weights:
            pretrained.add(name)
        tagged = {f"{name}.{tag}" if tag else name: default.cfgs[tag] for tag in default.tags}
        cfgs.update(tagged)
        _registry._model_with_tags[name] = list(tagged)
        if default.is_pretrained:
            pretrained.update(key for key, cfg in tagged.items() if cfg.tag and cfg.has_weights)
