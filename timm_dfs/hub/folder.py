"""The folder in which a model is published: weights, config, measured results, and files generated from them."""

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf

from ..base.caches import forget
from ..base.evaluating import evaluating, require_exits
from ..base.model import MultiExitModel
from ..base.new_folder import is_new, new_folder
from ..base.partition import changes_values
from ..base.presets import presets_as_json
from ..data.images import given_labels
from ..models.dfs_twins import PREFIX
from ..pretrained.checks import check_presets
from ..pretrained.packaged import CONFIG_FILE, OF_IMAGES, WEIGHTS_FILE
from ..pretrained.sources import check_named

RESULTS_FILE = "results.json"

CARD_FILE = "README.md"

CURVE_FILE = "curve.svg"

BASE_LICENSE_FILE = "LICENSE.base"
"""Licence of the weights that training started from, where it has to go with them."""


def load(name: str, **kwargs: Any) -> MultiExitModel:
    """Create a model with its weights, in eval mode, as ``timm.create_model`` does.

    Raises:
        ValueError: If the network has no exits.
        OSError: If it is on the Hub and its config cannot be downloaded or is damaged.
    """
    check_named(name, kwargs.get("cache_dir"))
    model = timm.create_model(name, pretrained=True, **kwargs)
    if not isinstance(model, MultiExitModel):
        raise ValueError(f"{name} is a network without exits; give a dfs_* model.")
    return model.eval()


def full_name(model: MultiExitModel) -> str:
    """A model's name with its pretrained tag, if it has one: ``ARCHITECTURE.TAG``."""
    architecture, tag = (model.pretrained_cfg.get(key) for key in ("architecture", "tag"))
    return f"{architecture}.{tag}" if tag else str(architecture)


def write_weights(model: MultiExitModel, folder: Path) -> None:
    """Write a model's weights in half precision, and the config from which timm rebuilds it, presets included.

    Raises:
        ValueError: If half precision cannot hold a weight, a preset does not fit the model, or timm cannot rebuild it
            from its name.
    """
    check_presets(model.presets, model.num_exits)
    check_rebuilt(model)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for key, value in model.state_dict().items():
        weights[key] = value.half() if value.is_floating_point() else value
        if not weights[key].isfinite().all():
            raise ValueError(
                f"{key} does not fit into half precision or is not finite: its largest value is {value.max()}."
            )
    _write(model, weights, folder)


def _write(model: MultiExitModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    # Adapters serve training only.
    contiguous = {key: value.contiguous() for key, value in weights.items() if not key.startswith("adapters.")}
    save_file(contiguous, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    names = given_labels(model)
    dropped = model.pretrained_cfg.get("num_classes") != model.num_classes  # timm takes the names for the base's
    config = dict(label_names=list(names)) if names and dropped else None
    save_config_for_hf(model, str(folder / CONFIG_FILE), config)


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write measured results."""
    (folder / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n")


def golden_batch(model: MultiExitModel) -> torch.Tensor:
    """Two images that are the same on every machine, to compare a model's logits on: (2, C, H, W)."""
    shape = (2, model.in_chans, *model.pretrained_cfg["input_size"][1:])
    return torch.arange(torch.Size(shape).numel()).mul(0.37).sin().reshape(shape)


def golden_logits(model: MultiExitModel) -> list[list[list[float]]]:
    """The first five logits of every exit for each image of :func:`golden_batch`: exits × images × 5."""
    with evaluating(model), torch.inference_mode():
        return torch.stack(model.forward_exits(golden_batch(model)))[:, :, :5].tolist()


def write_presets(model: MultiExitModel, folder: str | Path) -> None:
    """Write a model's presets into the ``config.json`` beside its weights, or into a new folder with both.

    The file, or the folder, is written under another name and then renamed, so it is never incomplete.

    Args:
        model: The model; its ``presets`` replace the folder's.
        folder: A folder with the weights of this model, or one that does not exist yet or is empty.

    Raises:
        ValueError: If the folder holds no model, other weights, or a model that computes something else from them; a
            preset does not fit the model, or timm cannot rebuild it from its name.

    Example:
        >>> import tempfile, timm, timm_dfs
        >>> model = timm.create_model("dfs_vgg7_cifar100", depths=(1, 1), widths=(4, 4))
        >>> model.presets = {"fast": dict(thresholds=[0.9, 0.0])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     timm_dfs.write_presets(model, f"{folder}/vgg")
        ...     timm.create_model(f"local-dir:{folder}/vgg", pretrained=True).presets
        {'fast': {'thresholds': [0.9, 0.0]}}
    """
    folder = Path(folder)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    require_exits(model)
    check_presets(model.presets, model.num_exits)
    check_rebuilt(model)
    if is_new(folder):
        with new_folder(folder) as new:
            _write(model, model.state_dict(), new)
        return
    check_same(model, folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config.setdefault("model_args", {})["presets"] = presets_as_json(model.presets)
    new = folder / f".{CONFIG_FILE}.new"
    new.write_text(json.dumps(config, indent=2, allow_nan=False))
    os.replace(new, folder / CONFIG_FILE)


def check_rebuilt(model: MultiExitModel) -> None:
    """Raise ``ValueError`` unless timm can rebuild a model from a config: by a name of ours, for its images' size."""
    if model.is_fused:
        raise ValueError("The model is a fused copy, which timm cannot rebuild; save the model that was fused.")
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or ""
    if not timm.is_model(name) or not name.startswith(PREFIX):
        raise ValueError(
            f"timm cannot rebuild this {type(model).__name__} from its architecture {name!r}. Create it by name, "
            f"timm.create_model('{PREFIX}{name or 'NAME'}', ...) with the same exits, and load its weights."
        )
    _check_size(model)


def _check_size(model: MultiExitModel) -> None:
    """Raise ``ValueError`` if images are not of the size that the model was built for, and would be rebuilt for."""
    built, size = model.built_for, tuple(model.pretrained_cfg["input_size"][1:])
    if built and size not in built:
        raise ValueError(
            f"The model was built for images of {'×'.join(map(str, built[0]))}, the size that it is rebuilt for, but "
            f"its pretrained_cfg says {'×'.join(map(str, size))}; build it with "
            f"img_size={size[0] if size[0] == size[1] else size} (train.py --model-kwargs)."
        )


def check_same(model: MultiExitModel, folder: Path) -> None:
    """Raise ``ValueError`` unless a folder holds this model: its weights, and a config that computes the same."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}; give a model's folder, or one that does not exist yet.")
    held = {key: value for key, value in load_file(folder / WEIGHTS_FILE).items() if not key.startswith("adapters.")}
    state = {key: value.cpu() for key, value in model.state_dict().items() if not key.startswith("adapters.")}
    if held.keys() != state.keys() or not all(
        held[key].shape == value.shape and torch.equal(held[key], value.to(held[key].dtype))
        for key, value in state.items()
    ):
        raise ValueError(
            f"The weights in {folder} are not those the presets were fitted to; give their own folder, or a new one."
        )
    config = json.loads((folder / CONFIG_FILE).read_text())
    theirs = _computation(config.get("model_args", {}), config.get("pretrained_cfg", {}))
    ours = _computation(model._model_args, model.pretrained_cfg)
    differing = [key for key in ours if ours[key] != theirs.get(key)]
    if differing:
        changes = ", ".join(f"{key} {ours[key]} instead of {theirs.get(key, 'the default')}" for key in differing)
        raise ValueError(
            f"The presets were not fitted to the model in {folder}, but to one with {changes}; give a new folder."
        )
    if not _gives_same_logits(model, folder):
        raise ValueError(
            f"The model in {folder} gives other logits from these weights, by its model_args "
            f"{config.get('model_args', {})}; give a new folder, or create the model from that one."
        )


def _gives_same_logits(model: MultiExitModel, folder: Path) -> bool:
    """Whether the model that timm builds from a folder's config gives a model's logits from the same weights."""
    forget(model)  # what layers keep cannot be copied with its gradients
    ours = copy.deepcopy(model).cpu().float().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # presets are dropped from this copy
        theirs = load(f"local-dir:{folder}")
        theirs.load_state_dict({key: value for key, value in ours.state_dict().items() if "adapters." not in key})
    images = golden_batch(ours)
    with torch.inference_mode():
        pairs = zip(theirs.forward_exits(images), ours.forward_exits(images), strict=True)
    return all((one - other).abs().max().item() <= 1e-3 * other.abs().max().item() for one, other in pairs)


def _computation(model_args: dict[str, Any], cfg: dict[str, Any]) -> dict[str, Any]:
    """What decides logits and costs besides the weights: arguments of the model and preparation of images, as JSON."""
    of_training = ("presets", "beta", "referencing")
    decisive = {key: value for key, value in model_args.items() if key not in of_training and "drop" not in key}
    if changes_values(model_args.get("referencing"), model_args.get("beta")):
        decisive.update({key: model_args[key] for key in ("referencing", "beta")})
    decisive.update((key, cfg[key]) for key in OF_IMAGES if cfg.get(key) is not None)
    return json.loads(json.dumps(decisive, default=str))
