"""Export of a checkpoint of ``train.py`` to a folder that can be published: weights, config, measured results, card.

Thresholds are fitted on a held-out split; the test split is only measured. The weights that are measured are those of
the exported file, in half precision.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from ..base.model import MultiExitModel
from ..base.objective import SETTINGS
from ..calibration.budgeted_batch import budgeted_batch
from ..calibration.logits import halves
from ..calibration.operating_point import OF_POLICY, OperatingPoint, measure_policy, outcomes
from ..calibration.presets import NAMED, operating_points
from ..data.datasets import follow_run
from ..data.splits import read_by_train
from ..evaluation.accuracy import anytime_accuracy, calibration_error
from ..evaluation.flops import Costs
from ..evaluation.machine import processor, threads
from ..inference.ensemble import ensemble_logits
from ..models.dfs_twins import BASES, PREFIX
from ..pretrained.packaged import CONFIG_FILE
from ..pretrained.runs import complete_args, first_images
from ..training.run import TrainingRun
from ..version import __version__
from . import folder as hub
from .card import write_card
from .publish import FILES

_SETTINGS = (
    "opt",
    "lr",
    "weight_decay",
    "layer_decay",
    "momentum",
    "sched",
    "warmup_epochs",
    "drop",
    "smoothing",
    "mixup",
    "cutmix",
    "mixup_prob",
    "mixup_off_epoch",
    "scale",
    "pad",
    "aa",
    "cutout",
    "reprob",
    "model_ema",
    "model_ema_decay",
    "kd_model_name",
    "kd_temperature",
    "task_loss_weight",
    "distill_loss_weight",
)

_ONLY_WITH = dict(
    mixup_prob=("mixup", "cutmix"),
    mixup_off_epoch=("mixup", "cutmix"),
    model_ema_decay=("model_ema",),
    kd_temperature=("kd_model_name",),
)
"""Settings that train.py records all the same where none of those named here is in use."""

Split = tuple[torch.Tensor, torch.Tensor]
"""Logits (E, N, C) and targets (N,)."""


def trained_model(run: TrainingRun, checkpoint: Path) -> MultiExitModel:
    """Model of a checkpoint, with its weights, image preparation and class names."""
    overlay = dict(first_images(run), file=str(checkpoint))
    model = hub.load(run.model, pretrained_cfg_overlay=overlay, **complete_args(run))
    follow_run(model, run)
    return model


def export(
    model: MultiExitModel,
    folder: Path,
    collect: Callable[[MultiExitModel, str], Split],
    held_out: str,
    test: str,
    facts: dict[str, Any],
    tag: str | None = None,
    by: str | None = None,
    ensemble: bool = True,
    budgets: Sequence[float] = (),
    max_accuracy_drops: Sequence[float] = (),
    confidence_level: float | None = None,
) -> None:
    """Write the complete folder of a trained network. An existing folder is kept until the new one is complete.

    Args:
        model: The network.
        folder: The folder to write; one that exists must be empty or hold an exported model, which is replaced.
        collect: Function from the exported network and a split's name to logits (E, N, C) and targets (N,).
        held_out: The split that thresholds are fitted on.
        test: The split that is measured on.
        facts: Further entries for the results: ``dataset``, ``training``, ``base_model``.
        tag: Pretrained tag, where an architecture has several trained weights.
        by: Confidence of the operating points, see :func:`~timm_dfs.calibration.presets.operating_points`.
        ensemble: Let exits predict together where that is better on held-out samples.
        budgets: Mean multiply-adds of further presets.
        max_accuracy_drops: Drops in accuracy, percentage points, of further presets.
        confidence_level: Probability of a bound on each preset's drop, from half of the held-out samples; ``None`` for
            presets without bounds, fitted on all of them.

    Raises:
        ValueError: If the folder holds anything else than an exported model.
    """
    _check_replaceable(folder)
    model.pretrained_cfg["tag"] = tag
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        new = Path(beside) / "new"
        hub.write_weights(model, new)
        shipped = hub.load(f"local-dir:{new}")
        costs = Costs(model)
        lazy = costs.of_exits(lazy=True)
        val, tested = collect(shipped, held_out), collect(shipped, test)
        fitted_on, bounded_on = (val, None) if confidence_level is None else halves(val)
        halved = {} if bounded_on is None else dict(fitted_on=len(fitted_on[1]), bounded_on=len(bounded_on[1]))
        points = operating_points(
            fitted_on,
            lazy,
            by,
            ensemble,
            budgets=budgets,
            max_accuracy_drops=max_accuracy_drops,
            held_out=bounded_on,
            confidence_level=confidence_level or 0.95,
            dataset=facts["dataset"],
            split=held_out,
        )
        model.presets = {name: point.preset() for name, point in points.items()}
        hub.write_weights(model, new)
        curve = budgeted_batch(val, tested, lazy)
        results = dict(
            model=hub.full_name(model),
            flops=costs.of_exits(),
            flops_lazy=lazy,
            last_exit_flops=costs.of_last_exit_alone(),
            golden_logits=hub.golden_logits(shipped),
            largest_losses=NAMED,
            held_out=dict(split=held_out, **accuracy(val), **halved),
            test=dict(
                split=test,
                **accuracy(tested),
                presets={name: measured(point, tested, lazy) for name, point in points.items()},
                budgeted_batch=[dict(average_flops=p.average_flops, top1=p.accuracy) for p in curve],
            ),
            **facts,
        )
        hub.write_results(new, results)
        if folder.exists():
            folder.rename(Path(beside) / "old")
        new.rename(folder)
    write_card(folder)


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything besides an exported model."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder that does not exist yet.")
    there = {entry.name for entry in folder.iterdir()}
    others = sorted(there - {*FILES, hub.BASE_LICENSE_FILE})
    if others or (there and not {CONFIG_FILE, hub.RESULTS_FILE} <= there):
        raise ValueError(
            f"{folder} is not a folder that 'timm-dfs export-hub' made, and would be replaced: it holds "
            f"{', '.join(others[:5] or sorted(there))}{', …' if len(others) > 5 else ''}. Give a folder that does not "
            "exist yet."
        )


def accuracy(split: Split) -> dict[str, Any]:
    """Accuracy and calibration of each exit; also accuracy together with the exits before, and disagreement.

    Together is the mean log-probability; disagreement is the percentage of samples for which an exit on its own
    predicts another class than the last exit. Against the last exit are the difference in accuracy, in percentage
    points, and its standard error.
    """
    logits, targets = split
    predicted = logits.argmax(-1)
    correct = predicted == targets
    return dict(
        samples=len(targets),
        top1=anytime_accuracy(logits, targets).tolist(),
        top5=anytime_accuracy(logits, targets, topk=min(5, logits.shape[-1])).tolist(),
        ece=calibration_error(logits, targets).tolist(),
        top1_ensemble=anytime_accuracy(ensemble_logits(logits), targets).tolist(),
        disagreement=[100 * (row != predicted[-1]).double().mean().item() for row in predicted],
        against_last=[_difference(row, correct[-1]) for row in correct],
    )


def _difference(correct: torch.Tensor, of_last: torch.Tensor) -> list[float]:
    """Difference in accuracy between two predictors of the same samples, and its standard error, percentage points."""
    each = correct.double() - of_last.double()
    return [100 * each.mean().item(), 100 * (each.std(correction=0) / len(each) ** 0.5).item()]


def measured(point: OperatingPoint, test: Split, flops: list[int]) -> dict[str, Any]:
    """Accuracy, cost and exit shares of an operating point on the test split."""
    found = measure_policy(point, test, flops)
    logits, targets = test
    preset = point.preset()
    return dict(
        top1=found.accuracy,
        against_last=_difference(outcomes(point.policy, test)[1], logits[-1].argmax(-1) == targets),
        average_flops=found.average_flops,
        exit_shares=list(found.exit_shares),
        **{key: preset.get(key) for key in OF_POLICY},
    )


def training_facts(run: TrainingRun, checkpoint: Path) -> dict[str, Any]:
    """Facts about a run, from its checkpoint and from ``train.py``'s ``args.yaml`` beside it, if that exists."""
    facts: dict[str, Any] = dict(epochs=run.epoch + 1)
    arguments, recorded = checkpoint.with_name("args.yaml"), _recorded(run, checkpoint)
    settings = recorded.get("model_kwargs") or {}
    facts["objective"] = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
    if start := _start(run.model, recorded):
        facts["started_from"] = start
    dataset, root = recorded.get("dataset") or "", recorded.get("data_dir") or recorded.get("data")
    splits = dict(training=recorded.get("train_split"), validation=recorded.get("val_split"))
    facts["splits"] = {use: read_by_train(dataset, split) for use, split in splits.items() if split}
    if dataset or root:
        facts["dataset"] = data_name(dataset, root)
    if arguments.is_file():
        if not recorded.get("resume"):  # a resumed run has rewritten the file, whose time is not that of its start
            facts["hours"] = (checkpoint.stat().st_mtime - arguments.stat().st_mtime) / 3600
        facts.update((key, recorded[key]) for key in ("seed", "batch_size") if recorded.get(key) is not None)
        facts["settings"] = {
            key: recorded[key]
            for key in _SETTINGS
            if recorded.get(key) is not None and (key not in _ONLY_WITH or any(map(recorded.get, _ONLY_WITH[key])))
        }
        if recorded.get("config"):
            facts["recipe"] = Path(recorded["config"]).name
    facts["measured_on"] = f"{threads()} of {processor()}"
    facts["versions"] = dict(torch=str(torch.__version__), timm=timm.__version__, timm_dfs=__version__)
    return facts


def base_model(run: TrainingRun, checkpoint: Path) -> dict[str, str]:
    """The entry ``base_model``: the Hub's name of the weights that a twin's training started from, if it is known."""
    base, recorded = run.model.removeprefix(PREFIX), _recorded(run, checkpoint)
    own_weights = recorded.get("initial_checkpoint") or recorded.get("pretrained_path")
    if base.partition(".")[0] not in BASES or not recorded.get("pretrained") or own_weights:
        return {}
    if "." in base and not timm.models.is_model_pretrained(base):  # a tag of our own weights
        return {}
    cfg = timm.get_pretrained_cfg(base)
    return dict(base_model=cfg.hf_hub_id) if cfg is not None and cfg.hf_hub_id else {}


def data_name(dataset: str, root: str | None) -> str:
    """A data set's name for a card: its id on the Hub, or the last part of a path on this machine."""
    name = (dataset or str(root)).removeprefix("hfds/")
    return Path(name).name if not dataset or Path(name).is_absolute() else name


def _recorded(run: TrainingRun, checkpoint: Path) -> dict[str, Any]:
    """Arguments of a run: those in the checkpoint, and from the ``args.yaml`` beside it those that it lacks."""
    file = checkpoint.with_name("args.yaml")
    return {**(yaml.safe_load(file.read_text()) if file.is_file() else {}), **run.arguments}


def _start(model: str, recorded: dict[str, Any]) -> str | None:
    """Weights that training started from, in words; ``None`` for random ones."""
    if recorded.get("initial_checkpoint"):  # train.py loads it last
        return f"the file `{Path(recorded['initial_checkpoint']).name}`"
    if recorded.get("pretrained") and recorded.get("pretrained_path"):
        return f"the file `{Path(recorded['pretrained_path']).name}`"
    return f"the pretrained weights of `{model}`" if recorded.get("pretrained") else None
