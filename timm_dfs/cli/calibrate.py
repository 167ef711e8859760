"""``timm-dfs calibrate``: operating points from held-out data, written beside the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration.fit import check_budget, check_loss
from ..calibration.presets import NAMED, fit_presets, halves
from ..calibration.risk import check_confidence
from ..calibration.temperature import fit_temperatures
from ..data.datasets import dataset_loader
from ..evaluation.accuracy import anytime_accuracy, collect_logits
from ..evaluation.flops import exit_flops, last_exit_flops
from ..hub.folder import write_presets
from ..inference.confidence import CONFIDENCES, PATIENCE
from ..inference.policy import ExitPolicy
from .base import AsJson, Checkpoint, ModelKwargs, ModelName, command, console, create, make_table, millions, print_json
from .source import BatchSize, DataDir, Dataset, InputKey, TargetKey, Workers, data_of, tracked

_NAMED = ", ".join(f"{name} {loss:g}" for name, loss in NAMED.items())


@command("calibrate")
def calibrate(
    model_name: ModelName,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split held out of training, e.g. 'train[45000:]'; by default the checkpoint's validation split."
        ),
    ] = None,
    input_key: InputKey = None,
    target_key: TargetKey = None,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="A further preset: most multiply-adds on average; up to 1, a share of the last exit alone."),
    ] = None,
    loss: Annotated[
        list[float] | None,
        typer.Option(help="A further preset: most percentage points of accuracy below the last exit."),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            help="E.g. 0.95: fit on half of the split, and bound the loss with this probability on the other."
        ),
    ] = None,
    by: Annotated[
        str, typer.Option(help=f"What thresholds are on: {', '.join([*CONFIDENCES, PATIENCE])}.")
    ] = "max_prob",
    output: Annotated[
        Path | None, typer.Option(help="The model's folder, whose config.json gets the presets, or a new one.")
    ] = None,
    batch_size: BatchSize = 128,
    workers: Workers = 1,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Fit temperatures and the presets accurate, balanced and fast to held-out data."""
    where = data_of(
        model_name, None, dataset=dataset, root=data_dir, split=split, input_key=input_key, target_key=target_key
    )
    if where["split"].partition("[")[0] == "test":
        raise ValueError(
            f"--split is {where['split']}; the test split is for final figures: give one held out of training, e.g. "
            "'train[45000:]'."
        )
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output is {output}; there is no folder {output.parent}.")
    model = create(model_name, pretrained=True, checkpoint=checkpoint, model_kwargs=model_kwargs)
    flops, whole = exit_flops(model, lazy=True), last_exit_flops(model)
    budgets = [value * whole if value <= 1 else value for value in budget or ()]
    _check(flops, budgets, loss or (), confidence, by)
    loader = dataset_loader(model, **where, batch_size=batch_size, workers=workers)
    data = collect_logits(model, tracked(loader, f"{model_name} on {where['split']}"))
    val, held_out = (data, None) if confidence is None else halves(data)
    temperatures = None if by == PATIENCE else fit_temperatures(*val)
    points = fit_presets(
        val,
        flops,
        budgets=budgets,
        losses=loss or (),
        held_out=held_out,
        probability=confidence or 0.95,
        confidence=by,
        temperatures=temperatures,
        dataset=where["dataset"].removeprefix("hfds/") or str(where["root"]),
        split=where["split"],
    )
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
        headers.append("loss at most")
    table = make_table(*headers, title=f"{model_name}: fitted on {len(val[1])} samples of {where['split']}")
    for name, point in points.items():
        row: list[Any] = [name, f"{point.accuracy:.2f}", millions(point.average_flops)]
        row += [f"{point.average_flops / whole:.0%}", str(len(point.policy.answering))]
        table.add_row(*row, *([] if point.risk is None else [f"{point.risk.at_most:.2f}"]))
    console.print(table)
    console.print(
        f"The last exit has {last_exit:.2f} % and alone takes {millions(whole)} M, of which shares are. Most points "
        f"below it: {_NAMED}. On other samples expect somewhat less: thresholds were chosen on these."
    )
    if held_out is not None:
        console.print(
            f"Loss at most: points below the last exit on samples to come, each with probability {confidence:g}, from "
            f"{len(held_out[1])} further samples."
        )
    if output is not None:
        console.print(f"Written to {output}")


def _check(
    flops: Sequence[float], budgets: Sequence[float], losses: Sequence[float], confidence: float | None, by: str
) -> None:
    """What is wrong with the options is said before minutes are spent on logits."""
    ExitPolicy([0.0], by)
    for budget in budgets:
        check_budget(budget, flops)
    for loss in losses:
        check_loss(loss)
    if confidence is not None:
        check_confidence(confidence)
