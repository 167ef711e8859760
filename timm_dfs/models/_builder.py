"""Registered models built through timm's own machinery, with the weights that their pretrained config names."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from timm.models import DefaultCfg, PretrainedCfg, build_model_with_cfg, clean_state_dict, generate_default_cfgs

from ..base.features import ExitFeatures
from ..base.model import MultiExitModel
from ..base.objective import take_settings
from ..pretrained.checks import check_last_exit, fit_checkpoint, settle_presets, unreadable
from ..pretrained.packaged import packaged_file, packaged_names
from ..pretrained.sources import resolve

_PAPER = dict(
    license="apache-2.0",
    origin_url="https://github.com/GongCheng1919/dfs",
    paper_name="Deep Feature Surgery: Towards Accurate and Efficient Multi-Exit Networks",
    paper_ids="arXiv:2407.13986",
)

Model = TypeVar("Model", bound=MultiExitModel)


def pretrained_cfgs(cfgs: dict[str, dict]) -> dict[str, DefaultCfg]:
    """timm's ``default_cfgs`` from plain dicts, with the packaged weights of those that have any.

    A model's other packaged weights, in folders named ``NAME.TAG``, become its pretrained tags, as timm has them.
    """
    packaged = packaged_names()
    with_files: dict[str, dict | PretrainedCfg] = {}
    for name, cfg in cfgs.items():
        cfg = dict(_PAPER, **cfg)
        tags = sorted(other for other in packaged if other.startswith(f"{name}."))
        for tagged in (name, *tags):
            file = packaged_file(tagged)
            with_files[tagged] = dict(cfg, file=str(file)) if file else cfg
    return generate_default_cfgs(with_files)


def build_model(
    model_cls: type[Model],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[dict, Model], dict],
    num_exits: Callable[[dict], int],
    architecture: Mapping[str, Any] = MappingProxyType({}),
    **kwargs,
) -> Model:
    """Build a registered model, with the weights that :func:`~timm_dfs.pretrained.sources.resolve` finds.

    Args:
        model_cls: The model's class.
        variant: Its registered name.
        pretrained: Whether to load weights.
        filter_fn: Renames the keys of an official checkpoint.
        num_exits: From the class's arguments to the number of exits they make.
        architecture: The class's arguments that the registered name stands for; those of weights and the caller's win.
        **kwargs: The arguments that timm passes to an entrypoint, the class's own, and the settings of
            :class:`timm_dfs.Objective`.

    Raises:
        ValueError: If there are no weights, they cannot be read, or they do not fit the model.
        FileNotFoundError: If the file that is to hold them does not exist.
    """
    given_cfg, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    weights = resolve(
        variant,
        given_cfg,
        overlay,
        pretrained,
        lambda args: num_exits({**architecture, **args}),
        kwargs.get("cache_dir"),
    )
    if pretrained and not weights.source:
        raise ValueError(
            f"There are no trained weights for {variant} yet. Train them with timm's train.py "
            f"(--device-modules timm_dfs --model {variant}, see recipes/), give your own with "
            "pretrained_cfg_overlay=dict(file=...), or use pretrained=False."
        )
    kwargs = {**architecture, **weights.complete(kwargs)}
    trained = kwargs.get("pretrained_model_args") or {}
    objective, kwargs = take_settings(kwargs)
    exits = num_exits(kwargs)
    objective.check_exits(exits)  # before anything is loaded

    def checked_filter_fn(state_dict: dict, model: Model) -> dict:
        # timm removes DataParallel's prefixes from a file's keys, but not from those of a given state dict.
        state_dict = filter_fn(clean_state_dict(state_dict), model)
        return fit_checkpoint(state_dict, model, model.pretrained_cfg, weights.source, objective.freezes_last_exit)

    try:
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            # timm gives all named classifiers another number of classes
            pretrained_cfg=replace(weights.cfg, classifier=tuple(f"heads.{k}.fc" for k in range(exits))),  # type: ignore[arg-type]
            pretrained_filter_fn=checked_filter_fn,
            feature_cfg=dict(feature_cls=ExitFeatures, out_indices=tuple(range(exits))),
            **kwargs,
        )
    except (ValueError, TypeError):
        raise
    except Exception as error:  # a damaged or foreign file can make timm, torch or the renaming raise anything
        file = weights.cfg.file
        if not pretrained or file is None or weights.source != file:
            raise
        raise unreadable(error, file, variant) from error
    if isinstance(model, MultiExitModel):  # features_only wraps it
        # The caller's arguments alone are saved with weights, so that the architecture's own are no change.
        usual = {key for key, value in architecture.items() if key not in trained and kwargs[key] == value}
        given = {key: value for key, value in kwargs.items() if key not in usual}
        settle_presets(model, trained, given, loaded=pretrained, changed_images=weights.changed_images)
        if pretrained:
            check_last_exit(model, objective, model.pretrained_cfg["num_classes"])
        model.train_for(objective)
    return model
