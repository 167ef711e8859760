"""``timm-dfs calibrate``: operating points from held-out data, written beside the weights."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..base.model import MultiExitModel
from ..base.new_folder import is_new
from ..calibration.latency import check_limit, fit_latency
from ..calibration.logits import halves
from ..calibration.presets import NAMED, operating_points
from ..calibration.risk import bound_risk
from ..calibration.seen import is_test, recorded
from ..data.datasets import dataset_loader
from ..evaluation.accuracy import anytime_accuracy, collect_logits
from ..evaluation.flops import Costs
from ..evaluation.latency import exit_latencies
from ..evaluation.machine import processor
from ..hub.folder import check_rebuilt, check_same, write_presets
from ..inference.ensemble import MEAN
from ..pretrained.packaged import OF_IMAGES
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
from .points import Budgets, By, ConfidenceLevel, MaxAccuracyDrops, Together, check_points
from .source import BatchSize, DataOptions, Workers, described, tracked, with_data_options

_NAMED = ", ".join(f"{name} {drop:g}" for name, drop in NAMED.items())


@command("calibrate")
@with_data_options
def calibrate(
    model_name: ModelName,
    data: DataOptions,
    budget: Budgets = None,
    max_accuracy_drop: MaxAccuracyDrops = None,
    confidence_level: ConfidenceLevel = None,
    by: By = None,
    ensemble: Together = True,
    latency: Annotated[
        list[str] | None,
        typer.Option(help="A further preset: largest mean latency of single images on this machine, e.g. 20ms."),
    ] = None,
    p95: Annotated[
        list[str] | None,
        typer.Option(help="A further preset: latency that at most 5 % of single images exceed on this machine."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the model, whose config.json gets the presets, or a new folder.")
    ] = None,
    batch_size: BatchSize = 128,
    workers: Workers = 1,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Fit temperatures and the presets accurate, balanced and fast to held-out data."""
    where = data.where(model_name, default_split=None)
    if is_test(where["split"], where["dataset"], where["root"]):
        raise ValueError(
            f"--split is {described(where['split'], where)}; the test split is for final figures: give one held out of "
            "training, e.g. 'train[45000:]'."
        )
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output is {output}; there is no folder {output.parent}.")
    model = create(model_name, pretrained=True, checkpoint=checkpoint, model_kwargs=model_kwargs)
    refuse_new_classifiers(model)
    before = _preparation(model)
    data.prepare(model)
    if changed := [key for key, value in _preparation(model).items() if value != before[key]]:
        model.drop_presets(model.presets, f"they were fitted to images of another {' and '.join(changed)}")
    if output is not None:  # before the data are read
        check_rebuilt(model)
        if not is_new(output):
            check_same(model, output)
    costs = Costs(model)
    flops, whole = costs.of_exits(lazy=True), costs.of_last_exit_alone()
    budgets = check_points(costs, budget, max_accuracy_drop, confidence_level, by)
    limits = [dict(mean=_milliseconds("--latency", text)) for text in latency or ()]
    limits += [dict(p95=_milliseconds("--p95", text)) for text in p95 or ()]
    size = model.in_chans, *model.pretrained_cfg["input_size"][1:]
    times = exit_latencies(model, torch.zeros(1, *size)) if limits else []
    for limit in limits:
        check_limit(times, limit.get("mean"), limit.get("p95"))
    loader = dataset_loader(model, **where, batch_size=batch_size, workers=workers)
    logits = collect_logits(model, tracked(loader, f"{model_name} on {where['split']}"))
    val, held_out = (logits, None) if confidence_level is None else halves(logits)
    points = operating_points(
        val,
        flops,
        by,
        ensemble,
        budgets=budgets,
        max_accuracy_drops=max_accuracy_drop or (),
        held_out=held_out,
        confidence_level=confidence_level or 0.95,
        dataset=where["dataset"].removeprefix("hfds/") or recorded(str(where["root"])),
        split=where["split"],
    )
    for limit in limits:
        name = f"{limit['mean']:g}ms" if "mean" in limit else f"p95-{limit['p95']:g}ms"
        points[name] = fit_latency(
            val,
            flops,
            times,
            points["accurate"].policy,
            mean=limit.get("mean"),
            p95=limit.get("p95"),
            threads=torch.get_num_threads(),
            machine=processor(),
            dataset=points["accurate"].fitted_on.dataset,
            split=where["split"],
        )
        if held_out is not None:
            points[name] = bound_risk(points[name], held_out, confidence_level or 0.95)
    presets = {name: point.preset() for name, point in points.items()}
    last_exit = anytime_accuracy(*val)[-1].item()
    if output is not None:
        model.presets = {**model.presets, **presets}
        write_presets(model, output)
    if as_json:
        return print_json(
            dict(
                model=model_name,
                dataset=where["dataset"],
                split=where["split"],
                samples=len(val[1]),
                samples_bounded_on=0 if held_out is None else len(held_out[1]),
                last_exit=dict(accuracy=last_exit, alone=whole),
                presets=presets,
            )
        )
    headers = ["preset", "top-1, %", "multiply-adds, M", "share", "exits"]
    if held_out is not None:
        headers.append("drop at most")
    if limits:
        headers += ["mean, ms", "p95, ms"]
    table = make_table(*headers, title=f"{model_name}: fitted on {len(val[1])} samples of {where['split']}")
    for name, point in points.items():
        row: list[Any] = [name, f"{point.accuracy:.2f}", millions(point.average_flops)]
        row += [f"{point.average_flops / whole:.0%}", str(len(point.policy.answering))]
        row += [] if point.risk is None else [f"{point.risk.max_accuracy_drop:.2f}"]
        if point.latency is not None:
            row += [f"{point.latency.mean_ms:.2f}", f"{point.latency.p95_ms:.2f}"]
        table.add_row(*row)
    console.print(table)
    console.print(
        f"The last exit has {last_exit:.2f} % and alone costs {millions(whole)} M (share 100 %). Largest drops "
        f"below it, in points: {_NAMED}. Accuracy on other samples is somewhat lower: thresholds were chosen on these."
    )
    if limits:
        console.print(
            f"Latencies are of single images in PyTorch with {torch.get_num_threads()} threads of {processor()}: "
            f"{', '.join(f'{value:.2f}' for value in times)} ms up to exits 0 to {len(times) - 1}."
        )
    together = points["accurate"].policy.ensemble
    if together is not None:
        weights = "equal weights" if together == MEAN else "fitted weights"
        console.print(f"Exits predict together with those before them, with {weights}; the last exit alone does not.")
    if held_out is not None:
        console.print(
            f"Drop at most: points below the last exit on samples to come, each with probability {confidence_level:g}, "
            f"bounded on {len(held_out[1])} further samples."
        )
    if output is not None:
        console.print(f"Written to {output}")


def _preparation(model: MultiExitModel) -> dict[str, Any]:
    values = {key: model.pretrained_cfg.get(key) for key in OF_IMAGES}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _milliseconds(option: str, text: str) -> float:
    try:
        value = float(text.strip().removesuffix("ms"))
    except ValueError:
        raise ValueError(f"{option} is {text!r}; give milliseconds, e.g. 20 or 20ms.") from None
    return value
