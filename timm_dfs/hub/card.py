"""Model cards: Markdown with the Hub's metadata, generated from measured results and the files in templates/ only."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCardData

from ..calibration.operating_point import OF_POLICY
from ..pretrained.packaged import CONFIG_FILE
from . import curve
from .both_parts import both_parts
from .folder import CARD_FILE, CURVE_FILE, RESULTS_FILE

FAMILY_CARD_FILE = "MODEL_CARD.md"

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # Markdown
)

_TEMPLATES.globals["millions"] = lambda count: f"{count / 1e6:.1f}"


@dataclass(frozen=True)
class DataSet:
    """Facts about a data set for a model card.

    Attributes:
        title: Its name in a sentence.
        limits: Limits of a model that was trained on it.
        paper_epochs: Number of epochs for which the paper trains on it.
    """

    title: str
    limits: str
    paper_epochs: int | None = None


DATA_SETS = {
    "uoft-cs/cifar100": DataSet(
        "CIFAR-100",
        "The images of CIFAR-100 have 32×32 pixels, and its 100 classes are an arbitrary selection.",
        paper_epochs=300,
    ),
}
"""Data sets by their id on the Hub."""


def _data_set(name: str) -> DataSet:
    return DATA_SETS.get(name, DataSet(name, f"The network distinguishes only the classes of {name}."))


def _read(folder: Path) -> tuple[dict, dict]:
    """A folder's results and config; the results without presets whose policy was fitted anew since."""
    results, config = (json.loads((folder / file).read_text()) for file in (RESULTS_FILE, CONFIG_FILE))
    stored, measured = config["model_args"].get("presets", {}), results["test"].get("presets", {})
    for name in [*measured]:
        now = stored.get(name, {})
        if any(measured[name].get(key, now.get(key)) != now.get(key) for key in OF_POLICY):
            del measured[name]
    return results, config


def _is_on_hub(dataset: str) -> bool:
    """Whether a data set's name can be an id on the Hub, ``user/name``, and is not that of another library."""
    return "/" in dataset and not dataset.startswith(("torch/", "tfds/", "wds/", "hfids/"))


def _is_packages_own(results: dict) -> bool:
    """Whether the weights are this package's, which alone record the commit they were shipped from."""
    return "shipped_from_commit" in results


def _exits(results: dict) -> list[dict]:
    test, of_whole = results["test"], both_parts(results) or results["test"]
    columns = dict(top1=test["top1"], top5=test["top5"], ece=test["ece"])
    columns |= dict(whole_top1=of_whole["top1"], whole_top5=of_whole["top5"])
    columns |= dict(published=results["flops"], lazy=results["flops_lazy"])
    return [dict(zip(columns, row), index=k) for k, row in enumerate(zip(*columns.values(), strict=True))]


def metadata(folder: Path) -> dict[str, Any]:
    """Metadata of a card for the Hub, with one result in the model index for each exit."""
    results, _ = _read(folder)
    data = _data_set(results["dataset"])
    split = (both_parts(results) or results["test"])["split"]
    task = "image-classification"
    card_data = ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        license="apache-2.0" if _is_packages_own(results) else None,
        datasets=[results["dataset"]] if _is_on_hub(results["dataset"]) else None,
        base_model=results.get("base_model"),
        tags=[task, "timm", "timm-dfs", "early-exit", "multi-exit"],
    ).to_dict()
    # ModelCardData merges results that differ only in the name of their task, so the index is written here.
    card_data["model-index"] = [
        dict(
            name=results["model"],
            results=[
                dict(
                    task=dict(type=task, name=f"exit {exit['index']}, {exit['lazy'] / 1e6:.1f} M multiply-adds"),
                    dataset=dict(type=results["dataset"], name=data.title, split=split),
                    metrics=[
                        dict(type="accuracy", name="top-1", value=round(exit["whole_top1"], 2)),
                        dict(type="accuracy", name="top-5", value=round(exit["whole_top5"], 2)),
                    ],
                )
                for exit in _exits(results)
            ],
        )
    ]
    return card_data


def card(folder: Path) -> str:
    """The card of a folder, from its results and config only."""
    results, config = _read(folder)
    arguments, training, data = config["model_args"], results.get("training", {}), _data_set(results["dataset"])
    measured = results["test"].get("presets", {})
    exits = _exits(results)
    presets: list[dict[str, Any]] = [
        dict(
            name=name,
            recorded=_described({key: value for key, value in preset.items() if key != "ensemble"}),
            measured=measured.get(name),
        )
        for name, preset in arguments.get("presets", {}).items()
    ]
    return _TEMPLATES.get_template("model_card.md").render(
        metadata=yaml.safe_dump(metadata(folder), sort_keys=False, allow_unicode=True),
        name=results["model"],
        exits=exits,
        regime=_regime(arguments, training),
        learnt_from_last=_froze_last_exit(training) and training["objective"].get("distill_weight") == 1,
        standard_error=math.sqrt(exits[-1]["top1"] * (100 - exits[-1]["top1"]) / results["test"]["samples"]),
        packages_own=_is_packages_own(results),
        by_name=_is_packages_own(results) and all(preset["measured"] for preset in presets),
        folder=folder.name,
        training=training,
        how=_how_trained(training),
        splits=_splits(training),
        objective=_described(training.get("objective", {})),
        other_than_recipe=_described(training.get("other_than_recipe", {})),
        paper_epochs=data.paper_epochs,
        epochs=_epochs(results.get("training", {})),
        curve_file=CURVE_FILE,
        curve_alt="Top-1 accuracy against multiply-adds per image",
        presets=presets,
        ensemble=any(preset.get("ensemble") for preset in arguments.get("presets", {}).values()),
        example_thresholds=[0.9] * (len(exits) - 1) + [0.0],
        test=results["test"],
        both=both_parts(results),
        held_out=results.get("held_out"),
        largest_losses=results.get("largest_losses"),
        data=data,
        whole=results["last_exit_flops"],
        chained=bool(arguments.get("chain")),
        base_model=results.get("base_model"),
        base_weights=results.get("base_weights"),
        versions=", ".join(f"{package} {version}" for package, version in training.get("versions", {}).items()),
        settings=_settings(training),
    )


def _regime(arguments: dict[str, Any], training: dict[str, Any]) -> str:
    """The way a network was trained, as a participle after "a network"."""
    chain = arguments.get("chain")
    return _partition(arguments, training) + (f", with chained exits (chain {_described(chain)})" if chain else "")


def _partition(arguments: dict[str, Any], training: dict[str, Any]) -> str:
    if training.get("objective", {}).get("train_backbone") is False:
        trained = "early exits" if _froze_last_exit(training) else "heads"
        return f"whose {trained} alone were trained, on a frozen backbone"
    if arguments["beta"] == "joint":
        return "trained jointly (no partition)"
    beta, referencing = _described(arguments["beta"]), arguments["referencing"]
    return f"trained with Deep Feature Surgery (beta {beta}, referencing {referencing})"


def _froze_last_exit(training: dict[str, Any]) -> bool:
    objective = training.get("objective", {})
    return objective.get("train_backbone") is False and (objective.get("loss_weights") or [1])[-1] == 0


def _how_trained(training: dict[str, Any]) -> str:
    parts = dict(samples="{:,} images of the training split", recipe="recipe `{}`", seed="seed {}")
    return ", ".join(text.format(training[key]) for key, text in parts.items() if key in training)


def _splits(training: dict[str, Any]) -> str:
    splits = ", ".join(f"{use} split `{split}`" for use, split in training.get("splits", {}).items())
    return ": ".join(filter(None, (f"data set `{training['dataset']}`" if "dataset" in training else "", splits)))


def _settings(training: dict[str, Any]) -> list[tuple[str, str]]:
    settings = dict(training.get("settings", {}))
    if "batch_size" in training:  # without it a learning rate says little
        settings = dict(batch_size=training["batch_size"], **settings)
    return [(key, _described(value)) for key, value in settings.items()]


def _described(value: Any) -> str:
    """Any value of a preset or setting as one line of text."""
    if isinstance(value, dict):
        parts = []
        for key, item in value.items():
            in_millions = key.endswith("flops") and isinstance(item, (int, float))
            text = f"{item / 1e6:.1f} M" if in_millions else _described(item)
            parts.append(f"{key.replace('_', ' ')} {text}")
        return "; ".join(parts)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_described, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "never" if value is None else str(value)


def family_card(hub: Path) -> str:
    """The card of all models in a folder of model folders."""
    models, points = [], []
    for folder in model_folders(hub):
        results, _ = _read(folder)
        whole = results["last_exit_flops"]
        models.append(
            dict(
                name=folder.name,
                data=_data_set(results["dataset"]).title,
                epochs=" + ".join(map(str, _epochs(results.get("training", {})))),
                started=results.get("base_weights", {}).get("trained_on"),
                exits=len(results["flops"]),
                top1=(both_parts(results) or results["test"])["top1"],
                lazy=results["flops_lazy"],
                whole=whole,
            )
        )
        measured = results["test"]
        same = dict(model=folder.name, samples=measured["samples"], last=measured["top1"][-1])
        for name, point in measured.get("presets", {}).items():
            points.append(dict(point, **same, preset=name, share=point["average_flops"] / whole))
    return _TEMPLATES.get_template("family_card.md").render(models=models, points=points)


def _epochs(training: dict[str, Any]) -> list[int]:
    """Epochs of each phase of a model's training; none where they are not recorded."""
    return [phase["epochs"] for phase in (*training.get("earlier_phases", ()), training) if "epochs" in phase]


def model_folders(hub: Path) -> list[Path]:
    """The folders of models in ``hub``, by name."""
    return sorted(folder for folder in hub.iterdir() if (folder / RESULTS_FILE).is_file())


def generated(folder: Path) -> dict[str, str]:
    """The files that are generated from a folder's results and config: names and contents."""
    return {CARD_FILE: card(folder), CURVE_FILE: curve.draw(_read(folder)[0])}


def write_card(folder: Path) -> list[Path]:
    """Write the files generated from a folder's results, and the family card if the folder is in a checkout's ``hub/``.

    Returns:
        The files written.
    """
    files = {folder / name: text for name, text in generated(folder).items()}
    family = folder.parent.parent / FAMILY_CARD_FILE
    if folder.parent.name == "hub" and family.is_file():
        files[family] = family_card(folder.parent)
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    return list(files)


def stale(folder: Path) -> list[str]:
    """Names of the generated files of a folder that are missing or do not match its results."""
    return [
        name
        for name, text in generated(folder).items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]
