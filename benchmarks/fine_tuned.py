"""Comparison of settings over runs of train.py that fine-tune a pretrained network: one recipe, the same seeds for all.

    recipe=recipes/dfs_tf_efficientnet_lite0_cifar100_64px.yaml
    python train.py -c $recipe --pretrained --seed 42 --experiment joint_42 \\
        --model-kwargs exits='["blocks.2","blocks.3","blocks.4"]' head=wide beta=joint
    ...                                                     # beta=0.5, chain=0.5; other seeds
    python benchmarks/fine_tuned.py output/train/* --recipe $recipe --output benchmarks/results/fine_tuned.jsonl

Each run becomes one line: what its last weights (their moving average, if there is one) reach on its validation split,
images that were not trained on. Runs that the output has already are skipped.
"""

import argparse
import json
import warnings
from pathlib import Path

import timm
import yaml
from outcome import outcome

import timm_dfs
from timm_dfs.data.datasets import dataset_loader
from timm_dfs.evaluation.machine import describe_machine
from timm_dfs.hub.from_checkpoint import trained_model
from timm_dfs.training.run import read_run

MAY_DIFFER = {"seed", "dataset", "pretrained_path", "initial_checkpoint"}
"""Arguments in which a run may differ from the recipe: its seed, and where the same images and weights are stored."""

OF_RUN = {"config", "experiment", "output", "resume", "workers", "log_interval", "checkpoint_hist"}
"""Arguments that have no effect on the weights."""

SETTING = {"beta", "referencing", "chain", "teacher_size", "teacher_loss"}
"""Keyword arguments of a network that are its setting."""

OF_TEACHER = ("kd_temperature", "task_loss_weight", "distill_loss_weight")
"""Arguments of train.py that belong to the setting, too, if there is a teacher."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="train.py's output folders")
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe of all runs")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines, one for each run")
    args = parser.parse_args()
    recipe = yaml.safe_load(args.recipe.read_text())
    known = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    arguments_of = {folder: yaml.safe_load((folder / "args.yaml").read_text()) for folder in args.runs}
    for folder, arguments in arguments_of.items():
        check_recipe(folder, recipe, arguments)
        check_alike(folder, arguments, args.runs[0], arguments_of[args.runs[0]])
        check_start(folder, arguments)
        what = dict(recipe=args.recipe.name, setting=setting(arguments), seed=arguments["seed"])
        if any(what.items() <= line.items() for line in known):
            continue
        line = dict(what, **measured(folder, arguments), machine=describe_machine())
        known.append(line)
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{folder}: {line['setting']}, seed {line['seed']}: {line['top1']}", flush=True)


def setting(arguments: dict) -> str:
    """Name of all that distinguishes a run from others of its recipe; two settings never have one name.

    Example:
        >>> setting({"model": "dfs_vgg7_cifar100", "model_kwargs": {"beta": 0.5, "chain": 0.5}})
        'two-sided 0.5, chained 0.5'
    """
    kwargs = arguments["model_kwargs"]
    model = timm.create_model(arguments["model"], **kwargs)  # architectures have different defaults
    parts = ["joint" if model.beta == "joint" else f"{model.referencing.replace('_', '-')} {model.beta}"]
    if kwargs.get("chain"):
        parts.append(f"chained {kwargs['chain']}")
    if teacher := arguments.get("kd_model_name"):
        parts.append(f"taught by {teacher}")
        parts += [f"{key} {kwargs[key]}" for key in ("teacher_size", "teacher_loss") if key in kwargs]
        parts += [f"{key} {arguments[key]}" for key in OF_TEACHER if arguments.get(key) is not None]
    return ", ".join(parts)


def check_recipe(folder: Path, recipe: dict, arguments: dict) -> None:
    """Raise ``ValueError`` if a run differs from its recipe in more than its setting."""
    given, made = _without_setting(recipe), _without_setting(arguments)
    differing = sorted(key for key in given.keys() - MAY_DIFFER if made[key] != given[key])
    if differing:
        raise ValueError(f"{folder} differs from the recipe in {', '.join(differing)}; it is not comparable.")


def check_alike(folder: Path, arguments: dict, first: Path, of_first: dict) -> None:
    """Raise ``ValueError`` if two runs differ in more than their setting, also in what their recipe does not name.

    So do the runs that they went on from, as far as there are records of these.
    """
    ours, theirs = (_without_setting(given) | _names_of_weights(given) for given in (arguments, of_first))
    settings = {"kd_model_name", *OF_TEACHER}
    compared = (ours.keys() | theirs.keys()) - MAY_DIFFER - OF_RUN - settings
    differing = sorted(key for key in compared if ours.get(key) != theirs.get(key))
    if differing:
        raise ValueError(f"{folder} differs from {first} in {', '.join(differing)}; they are not comparable.")
    if arguments.get("initial_checkpoint"):
        starts = [Path(given["initial_checkpoint"]).parent for given in (arguments, of_first)]
        before = [start / "args.yaml" for start in starts]
        if all(file.exists() for file in before):
            one, other = (yaml.safe_load(file.read_text()) for file in before)
            check_alike(starts[0], one, starts[1], other)


def check_start(folder: Path, arguments: dict) -> None:
    """Raise ``ValueError`` if a run went on from one of another setting or seed; warn where that is not recorded.

    A run that was resumed went on from its own checkpoint.
    """
    resumed = arguments.get("resume")
    if resumed and Path(resumed).resolve().parent.name != folder.resolve().name:
        raise ValueError(f"{folder} was resumed from {resumed}, which is another run's.")
    start = arguments.get("initial_checkpoint")
    if not start:
        return
    if not (file := Path(start).with_name("args.yaml")).exists():
        warnings.warn(
            f"{folder} went on from {start}, beside which there is no args.yaml: whether that run had the same setting "
            "and seed is not known.",
            stacklevel=2,
        )
        return
    before = yaml.safe_load(file.read_text())
    if (setting(before), before["seed"]) != (setting(arguments), arguments["seed"]):
        raise ValueError(
            f"{folder} is {setting(arguments)}, seed {arguments['seed']}, but went on from {setting(before)}, seed "
            f"{before['seed']}, in {start}."
        )


def _without_setting(arguments: dict) -> dict:
    kwargs = {key: value for key, value in arguments.get("model_kwargs", {}).items() if key not in SETTING}
    return dict(arguments, model_kwargs=kwargs)


def _names_of_weights(arguments: dict) -> dict:
    """Whether a run went on from another, and the file of pretrained weights: their folders may differ."""
    pretrained = Path(arguments.get("pretrained_path") or "").name
    return {
        "file of pretrained_path": pretrained,
        "having an initial_checkpoint": bool(arguments.get("initial_checkpoint")),
    }


def measured(folder: Path, arguments: dict) -> dict:
    """Epochs of a finished run, and what its weights reach on its validation split.

    Raises:
        ValueError: If the run has not ended.
    """
    checkpoint = folder / "last.pth.tar"
    run = read_run(checkpoint)
    if run.epoch + 1 != arguments["epochs"]:
        raise ValueError(f"{folder} stopped after {run.epoch + 1} of {arguments['epochs']} epochs; train on first.")
    model = trained_model(run, checkpoint)
    keys = arguments["input_key"], arguments["target_key"]
    data = arguments["dataset"], arguments["data_dir"], arguments["val_split"]
    loader = dataset_loader(model, *data, *keys, batch_size=250, workers=0)
    logits, targets = timm_dfs.collect_logits(model, loader)
    return dict(epochs=run.epoch + 1, **outcome(logits, targets, timm_dfs.exit_flops(model, lazy=True)))


if __name__ == "__main__":
    main()
