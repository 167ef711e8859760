"""From a checkpoint of ``train.py``'s to a folder that can be published: weights, config, measured results, card.

Thresholds are fixed on a split held out of training; the test split is only measured. What is measured is the file that
is shipped, in half precision.
"""

import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from . import hub
from .budget import BudgetPoint, budgeted_batch
from .card import write_card
from .checkpoints import TrainingRun
from .evaluate import anytime_accuracy, calibration_error
from .flops import exit_flops, last_exit_flops
from .models.dfs_twins import BASES, PREFIX
from .multi_exit import MultiExitModel
from .policy import ExitPolicy
from .version import __version__

BALANCED = (
    "the cheapest of 40 points with geometric exit fractions that is at least as accurate as the last exit on those "
    "images, or the most accurate where none is"
)

_SETTINGS = (
    "opt",
    "lr",
    "weight_decay",
    "momentum",
    "sched",
    "warmup_epochs",
    "drop",
    "smoothing",
    "mixup",
    "model_ema",
)

Split = tuple[torch.Tensor, torch.Tensor]
"""Logits (E, N, C) and targets (N,)."""


def trained_model(run: TrainingRun, checkpoint: Path) -> MultiExitModel:
    """The network of a checkpoint, with its weights."""
    return hub.load(run.model, pretrained_cfg_overlay=dict(file=str(checkpoint)), **run.model_args)


def export(
    model: MultiExitModel,
    folder: Path,
    collect: Callable[[MultiExitModel, str], Split],
    held_out: str,
    test: str,
    facts: dict[str, Any],
) -> None:
    """Write the whole folder of a trained network; a folder that was there stays until the new one is whole.

    Args:
        model: The network.
        folder: Where to.
        collect: Called with the shipped network and a split's name.
        held_out: The split that thresholds are fixed on.
        test: The split that is measured.
        facts: More entries for the results: ``dataset``, ``training``, ``base_model``.
    """
    new = folder.with_name(folder.name + ".new")
    if new.exists():
        shutil.rmtree(new)  # of a run that was interrupted
    hub.write_weights(model, new)
    shipped = hub.load(f"local-dir:{new}")
    lazy = exit_flops(model, lazy=True)
    val, tested = collect(shipped, held_out), collect(shipped, test)
    point = balanced(val, lazy)
    thresholds = [None if value == float("inf") else value for value in point.thresholds[:-1]] + [0.0]
    model.presets = {"balanced": dict(thresholds=thresholds, confidence="max_prob")}
    hub.write_weights(model, new)
    curve = budgeted_batch(val, tested, lazy)
    results = dict(
        model=model.pretrained_cfg["architecture"],
        flops=exit_flops(model),
        flops_lazy=lazy,
        last_exit_flops=last_exit_flops(model),
        golden_logits=hub.golden_logits(shipped),
        balanced=BALANCED,
        held_out=dict(split=held_out, **accuracy(val)),
        test=dict(
            split=test,
            **accuracy(tested),
            presets={name: measure(ExitPolicy(**preset), tested, lazy) for name, preset in model.presets.items()},
            budgeted_batch=[dict(average_flops=p.average_flops, top1=p.accuracy) for p in curve],
        ),
        **facts,
    )
    hub.write_results(new, results)
    if folder.exists():
        shutil.rmtree(folder)
    new.rename(folder)
    write_card(folder)


def accuracy(split: Split) -> dict[str, Any]:
    """Each exit's accuracy and calibration."""
    logits, targets = split
    return dict(
        samples=len(targets),
        top1=anytime_accuracy(logits, targets).tolist(),
        top5=anytime_accuracy(logits, targets, topk=min(5, logits.shape[-1])).tolist(),
        ece=calibration_error(logits, targets).tolist(),
    )


def balanced(val: Split, flops: list[int]) -> BudgetPoint:
    """What :data:`BALANCED` says, on the held-out split."""
    last = anytime_accuracy(*val)[-1].item()
    curve = budgeted_batch(val, val, flops)
    return min(
        (point for point in curve if point.accuracy >= last),
        key=lambda point: point.average_flops,
        default=max(curve, key=lambda point: point.accuracy),
    )


def measure(policy: ExitPolicy, test: Split, flops: list[int]) -> dict[str, Any]:
    """A policy's accuracy, cost and use of the exits."""
    logits, targets = test
    exits = policy.exit_index(logits)
    answers = logits.argmax(-1).gather(0, exits[None])[0]
    return dict(
        top1=100 * (answers == targets).double().mean().item(),
        average_flops=torch.tensor(flops, dtype=torch.float64)[exits].mean().item(),
        exit_shares=(torch.bincount(exits, minlength=len(flops)) / len(exits)).tolist(),
    )


def training_facts(run: TrainingRun, checkpoint: Path) -> dict[str, Any]:
    """What is known of a run from its checkpoint and, beside it, ``train.py``'s ``args.yaml``, if that is there."""
    facts: dict[str, Any] = dict(epochs=run.epoch + 1)
    arguments = checkpoint.with_name("args.yaml")
    if arguments.is_file():
        recorded = yaml.safe_load(arguments.read_text())
        facts["hours"] = (checkpoint.stat().st_mtime - arguments.stat().st_mtime) / 3600
        facts.update((key, recorded[key]) for key in ("seed", "batch_size") if recorded.get(key) is not None)
        facts["settings"] = {key: recorded[key] for key in _SETTINGS if recorded.get(key) is not None}
        if recorded.get("config"):
            facts["recipe"] = Path(recorded["config"]).name
    facts["measured_on"] = f"{torch.get_num_threads()} threads of {processor()}"
    facts["versions"] = dict(torch=str(torch.__version__), timm=timm.__version__, timm_dfs=__version__)
    return facts


def base_model(run: TrainingRun, checkpoint: Path) -> dict[str, str]:
    """``base_model`` for the results: the Hub's name of the weights that a twin's training started from, if known."""
    base, arguments = run.model.removeprefix(PREFIX), checkpoint.with_name("args.yaml")
    if (
        base.partition(".")[0] not in BASES
        or not arguments.is_file()
        or not yaml.safe_load(arguments.read_text()).get("pretrained")
    ):
        return {}
    cfg = timm.get_pretrained_cfg(base)
    return dict(base_model=cfg.hf_hub_id) if cfg is not None and cfg.hf_hub_id else {}


def processor() -> str:
    """This machine's processor, by name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
