"""Trained weights outside of this installation: a Hub repository, or a folder like one, checked before use."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from .checks import check_config
from .downloads import HUB_VARIABLE, fetch
from .packaged import CONFIG_FILE, WEIGHTS_FILE

_SOURCE_FIELDS = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "architecture"}

_DATA_FIELDS = {field.name for field in fields(PretrainedCfg)} - _SOURCE_FIELDS


@dataclass(frozen=True)
class Trained:
    """Trained weights and what belongs to them.

    Attributes:
        overlay: For timm's ``pretrained_cfg_overlay``: the file, and the config of the images it was trained on.
        model_args: Keyword arguments that the weights belong to, presets included.
    """

    overlay: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)


def find_trained(
    name: str,
    cfg: PretrainedCfg,
    overlay: dict[str, Any] | None,
    packaged: Path | None,
    num_exits: Callable[[dict], int | None],
    cache_dir: str | Path | None = None,
) -> Trained | None:
    """Weights for ``name`` from where :data:`HUB_VARIABLE` or its pretrained config says, if that is outside.

    From the Hub only ``.safetensors`` is taken, unless the caller's overlay has ``hf_hub_filename``; a checkpoint
    so asked for is read as tensors only.

    Args:
        name: The model's registered name, with its pretrained tag if it has one.
        cfg: Its pretrained config, overlay included.
        overlay: The caller's own part of it.
        packaged: The weights' file that came with this installation, if one did.
        num_exits: From the class's arguments to the number of exits they make; None if that cannot be told.
        cache_dir: The Hub's cache.

    Returns:
        None if the weights are packaged, the caller's own file or nowhere.

    Raises:
        ValueError: If what is there is not what it is called: see :func:`check_config`.
        FileNotFoundError: If it is not there.
    """
    file = (overlay or {}).get("hf_hub_filename") or WEIGHTS_FILE
    if cfg.source == "hf-hub":
        return _from_hub(str(cfg.hf_hub_id), file, name, num_exits, cache_dir)
    if cfg.source == "local-dir" or cfg.state_dict or (cfg.file and Path(str(cfg.file)) != packaged):
        return None
    place = os.environ.get(HUB_VARIABLE)
    if place and (os.sep in place or Path(place).is_dir()):
        folder = Path(place) / name
        if not (folder / WEIGHTS_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(
                f"{HUB_VARIABLE} is {place}, but there is no {WEIGHTS_FILE} and {CONFIG_FILE} in {folder}; unset it, "
                "or name another folder."
            )
        return _trained(folder / WEIGHTS_FILE, folder / CONFIG_FILE, name, num_exits, str(folder))
    if place:
        return _from_hub(f"{place}/{name}", file, name, num_exits, cache_dir)
    if cfg.hf_hub_id and not cfg.file:
        return _from_hub(str(cfg.hf_hub_id), file, name, num_exits, cache_dir)
    return None


def _from_hub(
    repo: str, file: str, name: str, num_exits: Callable[[dict], int | None], cache_dir: str | Path | None
) -> Trained:
    config = fetch(repo, CONFIG_FILE, cache_dir)
    repo_id = repo.partition("@")[0]
    try:
        weights = fetch(f"{repo_id}@{config.parent.name}", file, cache_dir)  # of the same commit
    except FileNotFoundError as error:
        if file == WEIGHTS_FILE and "has no" in str(error):
            raise FileNotFoundError(
                f"{error} Pickled checkpoints of the Hub's are not loaded; if you trust one, name it with "
                "pretrained_cfg_overlay=dict(hf_hub_filename=...), and its tensors alone are read."
            ) from error
        raise
    return _trained(weights, config, name, num_exits, repo)


def _trained(weights: Path, config: Path, name: str, num_exits: Callable[[dict], int | None], where: str) -> Trained:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE} of {where} is no JSON ({error}).") from error
    check_config(content, name, num_exits, where)
    data = {key: value for key, value in content.get("pretrained_cfg", {}).items() if key in _DATA_FIELDS}
    if content.get("num_classes"):
        data["num_classes"] = content["num_classes"]
    overlay = dict(
        data, file=str(weights), source="", custom_load=False, hf_hub_id=None, url=None, hf_hub_filename=None
    )
    return Trained(overlay, content.get("model_args", {}))
