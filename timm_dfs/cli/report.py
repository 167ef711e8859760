"""``timm-dfs report``: a model's measurements as an HTML page."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..base.model import MultiExitModel
from ..calibration.seen import is_test, refuse_fitted_split
from ..data.datasets import dataset_loader, is_stream
from ..data.images import labels_of
from ..data.splits import overlap, standard
from ..evaluation.accuracy import collect_logits
from ..evaluation.bench import Timing, measure
from ..inference.fusion import fuse
from ..inference.prediction import resolve_policy
from ..report import About, check_new, find, require_plots, strip, training_of, write_report
from .base import (
    DEFAULT_PRESET,
    AsJson,
    Checkpoint,
    ModelKwargs,
    ModelName,
    as_source,
    command,
    console,
    create,
    print_json,
    refuse_new_classifiers,
)
from .source import BatchSize, DataOptions, Workers, tracked, with_data_options

TIMED = (1, 64)
"""Batch sizes: a single image, and enough images to use all of a processor."""


@command("report")
@with_data_options
def report(
    model_name: ModelName,
    data: DataOptions,
    val_split: Annotated[
        str | None,
        typer.Option(help="Split held out of training, e.g. 'train[45000:]'; fixes the curve of early exit."),
    ] = None,
    output: Annotated[Path, typer.Option(help="New folder for the page and its figures.")] = Path("report"),
    seconds: Annotated[
        float, typer.Option(min=0, help="Duration of the timing of each batch size; 0: no timing.")
    ] = 10,
    batch_size: BatchSize = 128,
    workers: Workers = 1,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on test data and write the results as one self-contained HTML page, with its figures as files.

    The page shows accuracy against cost, the share of images at each exit, reliability, risk against coverage, time,
    images by exit, and where early exit loses. Operating points are the model's presets; see timm-dfs calibrate.
    """
    require_plots()
    check_new(output)
    where = data.where(model_name)
    if is_stream(where["dataset"]):
        raise ValueError(
            f"{where['dataset']} is a stream, of which no single images can be shown or timed; give hfds/ or a folder, "
            "or measure it with 'timm-dfs eval'."
        )
    _check_val_split(val_split, where["split"], where["dataset"], where["root"])
    training, epochs = training_of(as_source(model_name), checkpoint)
    model = create(model_name, pretrained=True, checkpoint=checkpoint, model_kwargs=model_kwargs)
    refuse_new_classifiers(model)
    data.prepare(model)
    name = where["dataset"].removeprefix("hfds/") or where["root"]
    refuse_fitted_split(model.presets, name, where["split"])
    loading: dict[str, Any] = dict(batch_size=batch_size, workers=workers)
    val_loader = dataset_loader(model, **{**where, "split": val_split}, **loading) if val_split else None
    loader = dataset_loader(model, **where, **loading)
    test = collect_logits(model, tracked(loader, f"{model_name} on {where['split']}"))
    val = collect_logits(model, tracked(val_loader, f"{model_name} on {val_split}")) if val_loader else None
    findings = find(model, test, val, name)
    chosen = DEFAULT_PRESET if DEFAULT_PRESET in findings.points else next(iter(findings.points), None)
    timings, notes = _time(model, loader, findings.samples, seconds) if seconds else ([], [])
    files = write_report(
        output,
        findings,
        About(model_name, name, where["split"], val_split, training, epochs),
        timings,
        chosen,
        strip(model, loader.dataset, test[0], findings.points[chosen].policy, labels_of(model)) if chosen else [],
        notes,
    )
    if as_json:
        return print_json(
            dict(
                model=model_name,
                dataset=name,
                split=where["split"],
                samples=findings.samples,
                files=list(map(str, files)),
                points={name: asdict(point.measured) for name, point in findings.points.items()},
                curve=[dict(average_flops=p.average_flops, accuracy=p.accuracy) for p in findings.curve],
                timings=list(map(asdict, timings)),
            )
        )
    console.print(f"Wrote {files[0]} and its figures: {', '.join(file.name for file in files[1:])}.")
    if not findings.points:
        console.print(f"{model_name} has no operating points; timm-dfs calibrate fits them.")
    if not findings.curve:
        console.print("There is no curve of early exit: its thresholds need --val-split, a split held out of training.")


def _check_val_split(val_split: str | None, split: str, dataset: str, root: str | None) -> None:
    if val_split is None:
        return
    ours, measured = standard(dataset, val_split), standard(dataset, split)
    parts = ours.partition("[")[0] == measured.partition("[")[0]  # of one split, which may be the test split
    shared = overlap(ours, measured)
    if shared is not False if parts else shared or is_test(val_split, dataset, root):
        raise ValueError(
            f"--val-split is {val_split}, the split measured on is {split}; thresholds need one that shares no images "
            "with it, held out of training, e.g. 'train[45000:]', and not test, unless another part of it is measured."
        )


def _time(model: MultiExitModel, loader: Any, samples: int, seconds: float) -> tuple[list[Timing], list[str]]:
    """Times of the model on images drawn at random, and notes on them for the reader."""
    sizes = [size for size in TIMED if size <= samples]
    count = min(samples, max(128, max(sizes)))
    drawn = torch.randperm(samples, generator=torch.Generator().manual_seed(0))[:count].tolist()
    images = torch.stack([loader.dataset[i][0] for i in drawn])
    notes = []
    try:
        network = fuse(model)
        images = images.contiguous(memory_format=torch.channels_last)
    except ValueError as error:
        network = model
        notes.append(f"Times are those of the network without fusion: {error}")
    policies = {name: resolve_policy(model, name) for name in model.presets}
    return measure(network, images, policies, sizes, seconds), notes
