"""Export of a finished run of one of these recipes to the model's folder under hub/, as by ``timm-dfs export-hub``.

    python recipes/ship.py output/train/RUN --recipe recipes/dfs_msdnet_cifar100_gpu.yaml

It refuses a run that differs from the recipe or has not ended, and records facts that the checkpoint does not hold: the
hardware, the number of training images and the commit. The hardware is this machine, or the one line of the run's
``hardware.txt``. A run whose ``--model-kwargs`` are not the recipe's becomes a pretrained tag of its own, here
``dfs_msdnet_cifar100.joint``:

    python recipes/ship.py output/train/JOINT_RUN --recipe recipes/dfs_msdnet_cifar100_gpu.yaml --tag joint

``--base`` names the file of ``recipes/base_weights.py`` that training started from: its source, checksum and licence
come onto the card, the licence's text into the folder. ``--earlier-recipes`` names the recipes of the runs that this
one went on from, each through its ``initial_checkpoint``, in the order of training; the runs must have followed them.
Where the first started from the weights in a folder of hub/, what that says of their training and base comes first.

A run of ``benchmarks/gpu/run.py`` is shipped likewise, with a recipe of ``benchmarks/gpu/recipes``. Where all training
images were trained on, half of the test split fits the thresholds and the other half is measured; a split that shares
images with training is refused for either:

    python recipes/ship.py runs/joint --recipe benchmarks/gpu/recipes/autoaugment.yaml --tag joint \\
        --held-out 'test[:5000]' --test 'test[5000:]' --budgets 60e6 100e6 140e6
"""

import argparse
import json
import subprocess
from pathlib import Path

import datasets
import yaml
from safetensors import safe_open

import timm_dfs
from timm_dfs.data.cifar100 import LABEL_NAMES
from timm_dfs.data.datasets import dataset_loader
from timm_dfs.data.splits import overlap, read_by_train
from timm_dfs.evaluation.machine import processor, threads
from timm_dfs.hub import from_checkpoint as export
from timm_dfs.hub.folder import BASE_LICENSE_FILE, load
from timm_dfs.training.run import read_run

HUB = Path(__file__).resolve().parent.parent / "hub"
DATA = {"dataset", "train_split", "val_split", "pretrained_path", "initial_checkpoint"}
"""Arguments in which a run may differ: they say where the same images and weights are stored."""
WITHOUT_EFFECT = {"device", "workers", "val_interval", "checkpoint_hist"}
"""Arguments in which a run may differ because they do not change what is trained."""
OF_GPU_KIT = {"pad", "pad_value", "cutout"}
"""Settings of recipes for ``benchmarks/gpu/run.py``, which records itself; train.py passes over them without a word."""
PRECISION = {"amp", "amp_dtype"}
"""Arguments in which a run may differ, which the results then state: a processor without bfloat16 trains in float32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="train.py's output folder: args.yaml, last.pth.tar")
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe the run was made with")
    parser.add_argument("--tag", help="pretrained tag of a run with other --model-kwargs than the recipe's")
    parser.add_argument(
        "--earlier-recipes", type=Path, nargs="*", default=[], help="recipes of the runs that this one went on from"
    )
    parser.add_argument("--base", type=Path, help="weights that training started from, by recipes/base_weights.py")
    parser.add_argument(
        "--img-size", type=int, help="height and width to measure at and ship, if not those of training"
    )
    parser.add_argument("--held-out", help="split that fits thresholds, if not the run's validation split")
    parser.add_argument("--test", default="test", help="split that everything is measured on")
    parser.add_argument("--budgets", type=float, nargs="*", default=[], help="mean multiply-adds of further presets")
    parser.add_argument("--dataset", help="the data set now, if it is stored elsewhere than when the run trained")
    args = parser.parse_args()

    record, checkpoint = args.run / "args.yaml", args.run / "last.pth.tar"
    for file in (record, checkpoint):
        if not file.exists():
            parser.error(f"there is no {file}")
    recipe, run = (yaml.safe_load(file.read_text()) for file in (args.recipe, record))
    of_checkpoint = read_run(checkpoint)
    own = {key: of_checkpoint.arguments[key] for key in recipe if key in of_checkpoint.arguments}
    own = yaml.safe_load(yaml.safe_dump(own))  # tuples are lists there
    if other := differences({key: run[key] for key in own if key in run}, own):
        parser.error(f"{checkpoint} is of a run that differs from {record} in {', '.join(sorted(other))}")
    if (ignored := OF_GPU_KIT & recipe.keys()) and not run.get("script"):
        parser.error(f"the run was made by train.py, which ignores the recipe's {', '.join(sorted(ignored))}")
    changed = differences(recipe, run)
    settings = changed.pop("model_kwargs", None)  # the objective and the tag stand for them
    if refused := changed.keys() - PRECISION:
        parser.error(f"the run differs from the recipe in {', '.join(sorted(refused))}")
    if args.base is not None:
        with safe_open(args.base, "pt") as file:
            base = dict(file.metadata() or {})
        if "license_text" not in base:
            parser.error(f"{args.base} does not say where it is from; make it by recipes/base_weights.py")
    if args.tag is None and (settings is not None or run["model_kwargs"] != recipe.get("model_kwargs", {})):
        parser.error(f"the run has model_kwargs {run['model_kwargs']}, which are not the recipe's; give it a --tag")
    if of_checkpoint.epoch + 1 != run["epochs"]:
        parser.error(f"the run stopped after {of_checkpoint.epoch + 1} of {run['epochs']} epochs")

    elsewhere = args.run / "hardware.txt"
    if elsewhere.exists():
        hardware = elsewhere.read_text().strip()
    elif run.get("device", "cpu") != "cpu":
        parser.error(f"the run trained on {run['device']}; say on what in {elsewhere}, in one line")
    else:
        hardware = f"{threads()} of {processor()}"
    dataset = args.dataset or run["dataset"]
    held_out, trained = args.held_out or run["val_split"], read_by_train(run["dataset"], run["train_split"])
    for split in (held_out, args.test):
        if overlap(trained, split) is not False:
            parser.error(f"{split} shares images with {trained}, which was trained on, or may; give another split")

    def collect(model: timm_dfs.MultiExitModel, split: str) -> export.Split:
        keys = run["input_key"], run["target_key"]
        loader = dataset_loader(model, dataset, run["data_dir"], split, *keys, batch_size=128, workers=1)
        return timm_dfs.collect_logits(model, loader)

    training = dict(
        export.training_facts(of_checkpoint, checkpoint),
        recipe=args.recipe.name,
        samples=len(datasets.load_dataset(dataset.removeprefix("hfds/"), split=run["train_split"])),
        hardware=hardware,
    )
    if run.get("input_size"):
        training["input_size"] = run["input_size"]
    if run.get("script"):
        training["script"] = run["script"]
        training.pop("hours", None)  # by the times of files, which those that were carried do not keep
        lines = (args.run / "exits.jsonl").read_text().splitlines() if (args.run / "exits.jsonl").exists() else ["{}"]
        if (hours := json.loads(lines[-1]).get("hours")) is not None:
            training["hours"] = hours
    if changed:
        training["other_than_recipe"] = changed
    phases, first = earlier_phases(parser, args.earlier_recipes, run)
    model = export.trained_model(of_checkpoint, checkpoint)
    folder = HUB / (f"{run['model']}.{args.tag}" if args.tag else run["model"])
    shipped = None
    if start := first.get("initial_checkpoint"):
        shipped = shipped_results(parser, Path(start), training["objective"], model)
        if Path(start).resolve().parent == folder.resolve():
            parser.error(f"training started from the weights in {folder}, which these would replace; give a --tag")
        if args.base is not None:
            parser.error(f"the base weights are those of {start}, not {args.base}; leave out --base")
        phases = [*phases_of(Path(start), shipped), *phases]
    from_file = first.get("pretrained") and first.get("pretrained_path")
    if args.base is not None and not from_file:
        parser.error(f"training did not start from {args.base}: the first run has no pretrained_path")
    # One run from timm's own weights says so itself; the last of several does not know of the first.
    if args.base is None and (from_file or (phases and shipped is None and first.get("pretrained"))):
        parser.error("training started from pretrained weights; give their file as --base")
    if phases:
        training["earlier_phases"] = phases
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    facts = dict(dataset=recipe["dataset"].removeprefix("hfds/"), training=training, shipped_from_commit=commit)
    licence = None
    if args.base is not None:
        licence = base.pop("license_text")
        facts["base_weights"] = base
    elif shipped is not None and "base_weights" in shipped:
        licence = Path(start).with_name(BASE_LICENSE_FILE).read_text()
        facts["base_weights"] = shipped["base_weights"]
    if not model.pretrained_cfg.get("label_names") and facts["dataset"] == "uoft-cs/cifar100":
        model.pretrained_cfg["label_names"] = LABEL_NAMES  # a copy of its files without the Hub's card has no names
    if args.img_size is not None:
        model.pretrained_cfg["input_size"] = (model.in_chans, args.img_size, args.img_size)
    export.export(model, folder, collect, held_out, args.test, facts, args.tag, budgets=args.budgets)
    if licence is not None:
        (folder / BASE_LICENSE_FILE).write_text(licence)


def differences(recipe: dict, run: dict) -> dict:
    """Arguments in which a run is not its recipe, apart from where files are and what does not change training."""
    return {key: run[key] for key, value in recipe.items() if run[key] != value and key not in DATA | WITHOUT_EFFECT}


def earlier_phases(parser: argparse.ArgumentParser, recipes: list[Path], run: dict) -> tuple[list[dict], dict]:
    """Recipe and epochs of the runs that led to this one, in order, and the arguments of the first of all.

    An error unless they followed the recipes.
    """
    phases, settings = [], run["model_kwargs"]
    for file in reversed(recipes):
        if not run["initial_checkpoint"]:
            parser.error(f"the run of {file.name} is not there: the one after it has no initial_checkpoint")
        start = Path(run["initial_checkpoint"])
        run = yaml.safe_load(start.with_name("args.yaml").read_text())
        differing = differences(yaml.safe_load(file.read_text()), run).keys() - {"model_kwargs"} - PRECISION
        if differing or run["model_kwargs"] != settings:
            parser.error(
                f"the earlier run differs from {file.name} or this run in {', '.join(sorted(differing)) or 'kwargs'}"
            )
        epochs = read_run(start).epoch + 1
        if epochs != run["epochs"]:
            parser.error(f"{start} is of epoch {epochs}, and the run of {file.name} has {run['epochs']}")
        phases.insert(0, dict(recipe=file.name, epochs=run["epochs"], input_size=run["input_size"]))
    return phases, run


def shipped_results(
    parser: argparse.ArgumentParser, start: Path, objective: dict, model: timm_dfs.MultiExitModel
) -> dict:
    """Results in the shipped folder that a run started from; an error if it is none, or trained for something else."""
    if not (file := start.with_name("results.json")).exists():
        parser.error(f"training started from {start}; name the recipe of that run in --earlier-recipes")
    results = json.loads(file.read_text())
    if results["training"]["objective"] != objective:
        parser.error(f"the weights {start} were trained for {results['training']['objective']}, this run {objective}")
    before = load(f"local-dir:{start.parent}")
    for what in ("beta", "referencing", "chain"):
        if getattr(before, what) != getattr(model, what):
            parser.error(f"the weights {start} have {what}={getattr(before, what)}, this run {getattr(model, what)}")
    return results


def phases_of(start: Path, results: dict) -> list[dict]:
    """The phases of training that shipped weights went through."""
    training = results["training"]
    shipped_size = json.loads(start.with_name("config.json").read_text())["pretrained_cfg"]["input_size"]
    size = training.get("input_size", shipped_size)
    own = dict(recipe=training["recipe"], epochs=training["epochs"], input_size=size)
    return [*training.get("earlier_phases", []), own]


if __name__ == "__main__":
    main()
