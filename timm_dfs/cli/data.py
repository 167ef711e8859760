"""``timm-dfs eval`` and ``conflict``: a model over a data set."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..base.model import MultiExitModel
from ..data.datasets import dataset_loader
from ..data.shards import sharded
from ..evaluation.accuracy import anytime_accuracy, calibration_error, collect_logits
from ..evaluation.flops import Costs
from ..inference.ensemble import ensemble_logits
from ..training.conflict import GradientConflict, gradient_conflict
from .base import (
    AsJson,
    Checkpoint,
    ModelKwargs,
    ModelName,
    command,
    console,
    create,
    make_table,
    millions,
    print_json,
    refuse_new_classifiers,
)
from .source import BatchSize, DataOptions, Workers, tracked, with_data_options


@command("eval")
@with_data_options
def evaluate_model(
    model_name: ModelName,
    data: DataOptions,
    batch_size: BatchSize = 128,
    workers: Workers = 1,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy, calibration and cost of every exit over a data set.

    With several processes, torchrun --nproc-per-node N -m timm_dfs eval …, each evaluates a part of the data set.
    """
    with sharded() as shard:
        if shard.rank > 0:
            warnings.simplefilter("ignore")  # the first process gives them
        where = data.where(model_name, processes=shard.processes)
        model = create(model_name, pretrained=True, checkpoint=checkpoint, model_kwargs=model_kwargs)
        refuse_new_classifiers(model)
        data.prepare(model)
        loader = dataset_loader(model, **where, batch_size=batch_size, workers=workers, shard=shard)
        own = collect_logits(model, tracked(loader, f"{model_name} on {where['split']}", shard))
        logits, targets = shard.gather(*own)
    if shard.rank > 0:
        return
    costs = Costs(model)
    found: dict[str, Any] = dict(
        model=model_name,
        dataset=where["dataset"] or where["root"],
        split=where["split"],
        samples=len(targets),
        top1=anytime_accuracy(logits, targets).tolist(),
        top5=anytime_accuracy(logits, targets, topk=min(5, model.num_classes)).tolist(),
        ece=calibration_error(logits, targets).tolist(),
        top1_ensemble=anytime_accuracy(ensemble_logits(logits), targets).tolist(),
        flops=costs.of_exits(),
        flops_lazy=costs.of_exits(lazy=True),
    )
    if as_json:
        return print_json(found)
    table = make_table(
        "exit",
        "top-1, %",
        "together, %",
        "top-5, %",
        "ECE",
        "multiply-adds, M",
        "lazy, M",
        title=f"{model_name}: {len(targets)} samples",
    )
    keys = ("top1", "top1_ensemble", "top5", "ece", "flops", "flops_lazy")
    for k, row in enumerate(zip(*(found[key] for key in keys), strict=True)):
        top1, together, top5, ece, cost, lazy = row
        shares = [f"{top1:.2f}", f"{together:.2f}", f"{top5:.2f}", f"{ece:.4f}"]
        table.add_row(str(k), *shares, millions(cost), millions(lazy))
    console.print(table)
    console.print("Together: top-1 of the mean log-probability of this exit and all before it.")


@command("conflict")
@with_data_options
def show_conflict(
    model_name: ModelName,
    data: DataOptions,
    batch_size: BatchSize = 128,
    batches: Annotated[int, typer.Option(min=1, help="Batches, drawn at random.")] = 8,
    workers: Workers = 1,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
    plot: Annotated[Path | None, typer.Option(help="File for a heat map, layers by pairs of exits.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the conflict between the exits' gradients; with --model-kwargs beta=joint, that of joint training."""
    where = data.where(model_name)
    model = create(model_name, pretrained=True, checkpoint=checkpoint, model_kwargs=model_kwargs)
    data.prepare(model)
    loader = dataset_loader(model, **where, batch_size=batch_size, workers=workers, samples=batches * batch_size)
    found = gradient_conflict(model, tracked(loader, f"{model_name} on {where['split']}"))
    if plot is not None:
        _plot(found, plot, f"{model_name}, beta {model.beta}: cosine between exits' gradients")
    pairs = _pairs(model)
    rows: list[dict[str, Any]] = [
        dict(layer=name, cosine=_present(cosine, pairs)) for name, cosine in zip(found.layers, found.cosine)
    ]
    if as_json:
        return print_json(dict(model=model_name, beta=model.beta, conflicting=found.conflicting, layers=rows))
    table = make_table("layer", "pairs", "mean cosine", "lowest", "of exits", title=f"{model_name}, beta {model.beta}")
    for row in rows:
        cosines = row["cosine"]
        lowest = min(cosines, key=cosines.__getitem__)
        mean = sum(cosines.values()) / len(cosines)
        table.add_row(row["layer"], str(len(cosines)), f"{mean:.3f}", f"{cosines[lowest]:.3f}", lowest)
    console.print(table)
    console.print(f"[bold]{found.conflicting:.1%}[/] of all pairs of exits, over layers and batches, conflict.")


def _pairs(model: MultiExitModel) -> list[tuple[int, int]]:
    return [(i, j) for j in range(model.num_exits) for i in range(j)]


def _present(cosine: torch.Tensor, pairs: list[tuple[int, int]]) -> dict[str, float]:
    """A layer's cosines by pair of exits, of those that both train it."""
    values = {f"{i} and {j}": cosine[i, j].item() for i, j in pairs}
    return {pair: value for pair, value in values.items() if value == value}


def _plot(found: GradientConflict, file: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--plot needs the plots extra: pip install 'timm-dfs[plots]'.") from None
    exits = found.cosine.shape[-1]
    first, second = torch.triu_indices(exits, exits, offset=1)
    figure = Figure(figsize=(2 + 0.3 * len(first), 1.5 + 0.16 * len(found.layers)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(found.cosine[:, first, second].numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(first)), [f"{i}–{j}" for i, j in zip(first.tolist(), second.tolist())], rotation=90)
    axes.set_yticks(range(len(found.layers)), found.layers, fontsize=6)
    axes.set_xlabel("exits")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, label="cosine; below 0: conflict")
    figure.savefig(file, dpi=150)
