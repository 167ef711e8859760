"""``timm-dfs bench``: how fast early exit is on this machine."""

from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.table import Table

from ..data.datasets import dataset_loader
from ..evaluation.bench import LAST_EXIT, Timing, exits_logits, halving_policy, measure
from ..evaluation.machine import describe_machine
from ..inference.fusion import fuse
from ..inference.prediction import resolve_policy
from .base import (
    AsJson,
    Checkpoint,
    ModelKwargs,
    ModelName,
    choose_policy,
    command,
    console,
    create,
    has_weights,
    make_table,
    print_json,
)
from .source import DataDir, Dataset, InputKey, TargetKey, data_of, tracked

HALF = "half the cost"


@command("bench")
def bench(
    model_name: ModelName,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Images a batch; may be repeated.")] = None,
    thresholds: Annotated[str | None, typer.Option(help="An operating point besides the presets: 0.9,0.9,…")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long to measure each batch size.")] = 10,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of the images, if not the model's.")] = None,
    dataset: Dataset = None,
    data_dir: DataDir = None,
    split: Annotated[str | None, typer.Option(help="Split of the data set to take images from.")] = None,
    input_key: InputKey = None,
    target_key: TargetKey = None,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
    as_is: Annotated[bool, typer.Option("--as-is", help="Do not fold norms into convolutions, channels last.")] = False,
    as_json: AsJson = False,
) -> None:
    """Speed and latency of early exit, against the last exit alone and against each exit alone.

    Operating points are the model's presets and two that halve the average cost: one with every exit, one with two
    early exits, whose heads are then the only ones computed. Without a data set, images are noise, which leaves where
    it will: those points then say how fast half the arithmetic is, the presets little. Achieved: how much faster, over
    how much cheaper.
    """
    sizes = sorted(set(batch_size or (1, 8, 64, 256)))
    model = create(model_name, has_weights(model_name), checkpoint, model_kwargs)
    count = max(2 * max(sizes), 128)
    if dataset is None and data_dir is None:
        shape = (model.in_chans, *((size, size) if size else model.pretrained_cfg["input_size"][1:]))
        images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    else:
        if size is not None:
            model.pretrained_cfg["input_size"] = (model.in_chans, size, size)
        where = data_of(
            model_name, dataset=dataset, root=data_dir, split=split, input_key=input_key, target_key=target_key
        )
        loader = dataset_loader(model, **where, batch_size=64, workers=1, samples=count)
        if len(loader.dataset) < max(sizes):  # type: ignore[arg-type]
            raise ValueError(
                f"There are {len(loader.dataset)} images for a batch of {max(sizes)}; "  # type: ignore[arg-type]
                "give a smaller --batch-size."
            )
        images = torch.cat([x for x, _ in tracked(loader, "images")])
    policies = {name: resolve_policy(model, name) for name in model.presets}
    if thresholds is not None:
        policies["as given"] = choose_policy(model, None, thresholds)
    if not as_is:
        model = fuse(model)
        images = images.contiguous(memory_format=torch.channels_last)
    logits = exits_logits(model, images)
    policies[HALF] = halving_policy(model, logits, images.shape[1:])
    if model.num_exits > 3:
        few = (0, (model.num_exits - 1) // 2)
        policies[f"{HALF}, exits {few[0]} and {few[1]}"] = halving_policy(model, logits, images.shape[1:], few)
    timings = measure(model, images, policies, sizes, seconds)
    data: dict[str, Any] = dict(
        model=model_name,
        machine=describe_machine(),
        images=dataset or str(data_dir or "noise"),
        input_size=list(images.shape[1:]),
        fused=not as_is,
        timings=[asdict(timing) for timing in timings],
    )
    if as_json:
        return print_json(data)
    for batch in sizes:
        console.print(_table(batch, [timing for timing in timings if timing.batch_size == batch]))
    console.print(f"{data['machine']}; {'×'.join(map(str, data['input_size']))} images: {data['images']}")
    slower = [f"{t.way} at batch {t.batch_size}" for t in timings if t.speedup < 1 and t.way in policies]
    if slower:
        console.print(f"[bold]Slower than the last exit alone[/]: {', '.join(slower)}.")


def _table(batch_size: int, timings: list[Timing]) -> Table:
    table = make_table(
        "answer", "img/s", "p50 ms", "p95", "p99", "faster", "cheaper", "achieved", title=f"batch {batch_size}"
    )
    table.box = SIMPLE  # eight columns fit into 80 characters
    for t in timings:
        gains = ("", "", "") if t.way == LAST_EXIT else (f"{t.speedup:.2f}", f"{t.cost_ratio:.2f}", f"{t.achieved:.2f}")
        table.add_row(t.way, f"{t.images_per_second:.1f}", *(f"{ms:.1f}" for ms in (t.p50, t.p95, t.p99)), *gains)
    return table
