"""The search for a model's trained weights, one for all architectures; what it finds is checked before use."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models._builder import resolve_pretrained_cfg

from ..data.images import TEST_PREPARATION
from .checks import check_config
from .downloads import HUB_VARIABLE, fetch
from .packaged import BESIDE, CONFIG_FILE, OF_IMAGES, WEIGHTS_FILE, packaged_folder_of

_HUB_PREFIXES = ("hf-hub:", "hf_hub:")

PREFIXES = (*_HUB_PREFIXES, "local-dir:")
"""Prefixes with which timm takes a model's name for a Hub repository or a folder."""

_OF_NAMES = ("hf-hub", "local-dir")
"""timm's words for the source of a model whose name has a prefix."""

_SOURCE_FIELDS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "architecture"}

_DATA_FIELDS = {field.name for field in fields(PretrainedCfg)} - _SOURCE_FIELDS

NumExits = Callable[[dict[str, Any]], int | None]
"""From a model's arguments to its number of exits; None where the arguments do not tell it."""


@dataclass(frozen=True)
class Weights:
    """The weights that a model is to be built with.

    Attributes:
        cfg: timm's pretrained config: the source of the weights, and the images that they were trained on.
        model_args: Keyword arguments that the weights belong to, presets included.
        replaced_presets: Presets of the model's own weights, in whose place the caller gave others.
        changed_images: Fields of the config that say how images are prepared, and that the caller changed.
    """

    cfg: PretrainedCfg
    model_args: dict[str, Any] = field(default_factory=dict)
    replaced_presets: dict[str, Any] = field(default_factory=dict)
    changed_images: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The place that timm loads from, for messages; empty if there is none."""
        cfg = self.cfg
        if cfg.source == "hf-hub":
            return cfg.hf_hub_id or ""
        if cfg.state_dict:
            return "the given state dict"
        return str(cfg.file or cfg.hf_hub_id or cfg.url or "")

    def complete(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A model's keyword arguments: the caller's, and for the rest those that the weights belong to.

        timm takes the arguments in a model's own config for the caller's. Presets among them are dropped, with a
        warning, if the caller gave other weights.
        """
        if self.replaced_presets and kwargs.get("presets") == self.replaced_presets:
            warnings.warn(
                f"Dropped the presets {', '.join(self.replaced_presets)}: the weights from {self.source} are not those "
                "they were fitted to.",
                stacklevel=3,
            )
            kwargs = {key: value for key, value in kwargs.items() if key != "presets"}
        if not self.model_args:
            return kwargs
        return {**self.model_args, "pretrained_model_args": self.model_args, **kwargs}


@dataclass(frozen=True)
class _Place:
    """A model's folder, local or in the Hub's cache; without ``weights`` only its config is of interest."""

    where: str
    config: Path
    weights: Path | None


def resolve(
    variant: str,
    given_cfg: str | dict[str, Any] | PretrainedCfg | None,
    overlay: dict[str, Any] | None,
    pretrained: bool,
    num_exits: NumExits,
    cache_dir: str | Path | None = None,
) -> Weights:
    """The weights for a registered model, from the first of these that is there:

    1. a file or state dict that the caller's pretrained config names;
    2. the Hub repository or folder that the model's name is (``hf-hub:``, ``local-dir:``);
    3. the folder or Hub namespace that :data:`HUB_VARIABLE` names;
    4. this installation;
    5. the Hub repository that the model's pretrained config names.

    In 3 a model is looked for under its registered name; a pretrained tag other than the architecture's default is part
    of it (``dfs_vgg7_cifar100.joint``). From the Hub only ``.safetensors`` is taken, unless the caller's overlay has
    ``hf_hub_filename``; a checkpoint so asked for is read as tensors only.

    timm has read the ``config.json`` of 2 when this is called. It is read again here, also without ``pretrained``: a
    config that was damaged on its way from the Hub is deleted from the cache and refused.

    Args:
        variant: Registered name, without a tag.
        given_cfg: The entrypoint's ``pretrained_cfg``: a tag or a config.
        overlay: The entrypoint's ``pretrained_cfg_overlay``; its values win over those of the weights' config.
        pretrained: Whether weights are wanted.
        num_exits: From the model's arguments to the number of exits.
        cache_dir: The Hub's cache.

    Returns:
        The weights; with an empty ``source`` if there are none.

    Raises:
        ValueError: If a config is not what it should be, see :func:`check_config`.
        FileNotFoundError: If a folder or repository that was named does not hold the model.
        OSError: If a file of the Hub's arrived damaged.
    """
    overlay = overlay or {}
    cfg = resolve_pretrained_cfg(variant, given_cfg, overlay)  # type: ignore[arg-type]  # a PretrainedCfg is fine too
    default = get_pretrained_cfg(variant)
    tag = None if default is not None and cfg.tag == default.tag else cfg.tag
    own = resolve_pretrained_cfg(variant, given_cfg)  # type: ignore[arg-type]
    if own.source in _OF_NAMES and pretrained and (overlay.get("file") or overlay.get("state_dict")):
        return _instead(variant, own, overlay, num_exits, cache_dir)
    place = _locate(f"{variant}.{tag}" if tag else variant, cfg, overlay, pretrained, cache_dir)
    if place is None:
        return Weights(cfg)
    config = _read(place)
    check_config(config, variant, num_exits, place.where)
    if place.weights is None:
        return Weights(cfg)
    data = dict(config.get("pretrained_cfg", {}))
    data.setdefault("tag", tag)
    data.update({key: config[key] for key in BESIDE if config.get(key)})
    if data:  # what it does not say does not hold for it, though the registered config says it of other weights
        data = {**dict.fromkeys(TEST_PREPARATION), **data}
    changed = tuple(key for key in OF_IMAGES if key in overlay and _listed(overlay[key]) != _listed(data.get(key)))
    data.update(overlay)
    cfg = replace(
        cfg,
        **{key: value for key, value in data.items() if key in _DATA_FIELDS},
        file=str(place.weights),
        source="",
        custom_load=False,
        url=None,
        state_dict=None,
        hf_hub_id=None,
        hf_hub_filename=None,
    )
    return Weights(cfg, config.get("model_args", {}), changed_images=changed)


def _listed(value: Any) -> Any:
    """A value as JSON holds it, to be compared with one that was read."""
    return list(value) if isinstance(value, tuple) else value


def _instead(
    variant: str, own: PretrainedCfg, overlay: dict[str, Any], num_exits: NumExits, cache_dir: str | Path | None
) -> Weights:
    """The caller's weights for a model that is a Hub repository or a folder, of which only the config is used."""
    place = _named(own, None, cache_dir)
    config = _read(place)
    check_config(config, variant, num_exits, place.where)
    without_source = replace(own, source="", file=None, hf_hub_id=None, hf_hub_filename=None)
    cfg = resolve_pretrained_cfg(variant, without_source, overlay)  # type: ignore[arg-type]
    return Weights(cfg, replaced_presets=config.get("model_args", {}).get("presets") or {})


def settings_of(name: str) -> dict[str, Any]:
    """Keyword arguments, without presets, that the weights of a registered name belong to; empty if it has none.

    Args:
        name: A registered name, perhaps with a tag. A name with a prefix has none: timm reads its config itself.
    """
    if name.startswith(PREFIXES):
        return {}
    return {key: value for key, value in _of_name(name).model_args.items() if key != "presets"}


def images_of(name: str) -> dict[str, Any]:
    """Fields of the config of a registered name's weights that say how images are prepared; empty if it has none."""
    if name.startswith(PREFIXES) or not (weights := _of_name(name)).source:
        return {}
    return {key: getattr(weights.cfg, key) for key in OF_IMAGES}


def has_weights(name: str) -> bool:
    """Whether there are trained weights for a registered name, perhaps with a tag; a name with a prefix has some.

    Raises:
        FileNotFoundError: If the name has weights of its own, and :data:`HUB_VARIABLE` a place without any for it.
    """
    if name.startswith(PREFIXES):
        return True
    try:
        return bool(_of_name(name).source)
    except FileNotFoundError:
        own = get_pretrained_cfg(name)
        if own is not None and (own.file or own.hf_hub_id):
            raise
        return False


def _of_name(name: str) -> Weights:
    variant, _, tag = name.partition(".")
    return resolve(variant, tag or None, None, True, lambda _: None)


def check_named(name: str, cache_dir: str | Path | None = None) -> None:
    """Check the ``config.json`` of a Hub repository before timm reads it; other names pass.

    Whoever calls ``timm.create_model`` through this package gets thereby a clear error, and a damaged file is deleted
    even if so little is left of it that timm could not read on to :func:`resolve`.

    Raises:
        FileNotFoundError, OSError: See :func:`fetch`.
    """
    if name.startswith(_HUB_PREFIXES):
        fetch(name.partition(":")[2], CONFIG_FILE, cache_dir)


def _locate(
    name: str, cfg: PretrainedCfg, overlay: dict[str, Any], pretrained: bool, cache_dir: str | Path | None
) -> _Place | None:
    file = overlay.get("hf_hub_filename") or WEIGHTS_FILE
    if cfg.source in _OF_NAMES:
        return _named(cfg, file if pretrained else None, cache_dir)
    packaged = packaged_folder_of(cfg.file)
    if not pretrained or cfg.state_dict or (cfg.file and packaged is None):
        return None
    hub = os.environ.get(HUB_VARIABLE)
    if hub and not overlay.get("file"):
        return _in_hub_variable(hub, name, file, cache_dir)
    if packaged is not None:
        return _Place(str(packaged), packaged / CONFIG_FILE, packaged / WEIGHTS_FILE)
    if cfg.hf_hub_id:
        return _on_hub(str(cfg.hf_hub_id), file, cache_dir)
    return None


def _named(cfg: PretrainedCfg, file: str | None, cache_dir: str | Path | None) -> _Place:
    if cfg.source == "local-dir":  # timm finds the weights
        return _Place(str(cfg.file), Path(str(cfg.file)) / CONFIG_FILE, None)
    return _on_hub(str(cfg.hf_hub_id), file, cache_dir)


def _in_hub_variable(hub: str, name: str, file: str, cache_dir: str | Path | None) -> _Place:
    if os.sep not in hub and not Path(hub).is_dir():
        return _on_hub(f"{hub}/{name}", file, cache_dir)
    folder = Path(hub) / name
    if not (folder / WEIGHTS_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{HUB_VARIABLE} is {hub}, but there is no {WEIGHTS_FILE} and {CONFIG_FILE} in {folder}; unset it, "
            "or name another folder."
        )
    return _Place(str(folder), folder / CONFIG_FILE, folder / WEIGHTS_FILE)


def _on_hub(repo: str, file: str | None, cache_dir: str | Path | None) -> _Place:
    config = fetch(repo, CONFIG_FILE, cache_dir)
    if file is None:
        return _Place(repo, config, None)
    repo_id = repo.partition("@")[0]
    try:
        return _Place(repo, config, fetch(f"{repo_id}@{config.parent.name}", file, cache_dir))  # of the same commit
    except FileNotFoundError as error:
        if file == WEIGHTS_FILE and "has no" in str(error):
            raise FileNotFoundError(
                f"{error} Pickled checkpoints are not loaded from the Hub; if you trust one, name it with "
                "pretrained_cfg_overlay=dict(hf_hub_filename=...), and only its tensors are read."
            ) from error
        raise


def _read(place: _Place) -> dict[str, Any]:
    try:
        return json.loads(place.config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE} of {place.where} is not JSON ({error}).") from error
