"""Where weights come from, and building a model with them through timm's own machinery."""

from collections.abc import Callable
from typing import TypeVar

from timm.models import DefaultCfg, PretrainedCfg, build_model_with_cfg, generate_default_cfgs
from timm.models._builder import resolve_pretrained_cfg

from ..base.features import ExitFeatures
from ..base.model import MultiExitModel
from ..base.objective import take_settings
from ..base.partition import JOINT
from ..pretrained.checks import check_presets, fit_checkpoint
from ..pretrained.packaged import packaged_file, packaged_model_args, packaged_names
from ..pretrained.sources import find_trained

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
    **kwargs,
) -> Model:
    """Build a registered model, with weights from the file, folder or Hub its pretrained config names.

    Args:
        model_cls: The model's class.
        variant: Its registered name.
        pretrained: Whether to load weights.
        filter_fn: Renames the keys of an official checkpoint.
        num_exits: From the class's arguments to the number of exits they make.
        **kwargs: What timm passes to an entrypoint, the class's own arguments, and the settings of
            :class:`~timm_dfs.objective.Objective`.

    Raises:
        ValueError: If there are no weights, they cannot be read, or they do not fit the model.
        FileNotFoundError: If the file that is to hold them does not exist.
    """
    source, file = "", None
    if pretrained:
        given_cfg, overlay = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
        cfg = resolve_pretrained_cfg(variant, given_cfg, overlay)
        name = f"{variant}.{cfg.tag}" if cfg.tag else variant
        trained = find_trained(name, cfg, overlay, packaged_file(name), num_exits, kwargs.get("cache_dir"))
        if trained is not None:
            kwargs["pretrained_cfg_overlay"] = {**(overlay or {}), **trained.overlay}
            kwargs = {**trained.model_args, "pretrained_model_args": trained.model_args, **kwargs}
            cfg = resolve_pretrained_cfg(variant, given_cfg, kwargs["pretrained_cfg_overlay"])
        source = _source(cfg)
        if not source:
            raise ValueError(
                f"There are no trained weights for {variant} yet. Train them with timm's train.py "
                f"(--device-modules timm_dfs --model {variant}, see recipes/), give your own with "
                "pretrained_cfg_overlay=dict(file=...), or use pretrained=False."
            )
        file = source if source == cfg.file else None
        if packaged := packaged_model_args(file):
            kwargs = {**packaged, "pretrained_model_args": packaged, **kwargs}
    if kwargs.get("beta") == JOINT:
        kwargs["beta"] = None
    objective, kwargs = take_settings(kwargs)
    objective.check_exits(num_exits(kwargs))  # before anything is loaded
    classifiers = tuple(f"heads.{k}.fc" for k in range(num_exits(kwargs)))  # timm adapts those to another num_classes
    kwargs["pretrained_cfg_overlay"] = dict(kwargs.get("pretrained_cfg_overlay") or {}, classifier=classifiers)

    def checked_filter_fn(state_dict: dict, model: Model) -> dict:
        state_dict = filter_fn(state_dict, model)
        return fit_checkpoint(state_dict, model, model.pretrained_cfg, source)

    try:
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=checked_filter_fn,
            feature_cfg=dict(feature_cls=ExitFeatures, out_indices=tuple(range(len(classifiers)))),
            **kwargs,
        )
    except (ValueError, TypeError):
        raise
    except Exception as error:  # whatever a damaged or foreign file makes timm, torch and our renaming stumble over
        if file is None:
            raise
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"There is no weights file {file}; check the path.") from error
        reason = "it holds pickled objects or is no checkpoint" if "weights_only" in str(error) else repr(error)
        raise ValueError(
            f"Cannot load {file} into {variant}: {reason}. Give a .safetensors file or a checkpoint of tensors only "
            "(nothing else is unpickled) that was saved by this model or by the official code for it."
        ) from error
    if isinstance(model, MultiExitModel):  # features_only wraps it
        check_presets(model, kwargs.get("pretrained_model_args") or {})
        model.train_for(objective)
    return model


def _source(cfg: PretrainedCfg) -> str:
    """Where timm loads from, given this config; empty if nowhere."""
    if cfg.source == "hf-hub":
        return cfg.hf_hub_id or ""
    if cfg.state_dict:
        return "the given state dict"
    return str(cfg.file or cfg.hf_hub_id or cfg.url or "")
