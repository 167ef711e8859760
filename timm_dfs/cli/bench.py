"""``timm-dfs bench``: speed of early exit on this machine."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..data.datasets import dataset_loader
from ..evaluation.bench import Timing, Way, exits_logits, halving_policy, measure
from ..evaluation.machine import describe_machine
from ..export.timing import onnx_ways
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
from .source import DataOptions, tracked, with_data_options

HALF = "half the cost"


RUNTIMES = ("torch", "onnx")


@command("bench")
@with_data_options
def bench(
    model_name: ModelName,
    data: DataOptions,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="Images per batch; may be repeated.")] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(help="A further operating point: 0.9,0.9,…, one threshold per exit on its largest probability."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time to measure each batch size for.")] = 10,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Do not fold norms into convolutions; channels first.")
    ] = False,
    runtime: Annotated[
        str, typer.Option(help="torch, or onnx: export the network and time it in ONNX Runtime, too.")
    ] = "torch",
    as_json: AsJson = False,
) -> None:
    """Measure speed and latency of early exit, compared with the last exit alone and each earlier exit alone.

    Operating points are the model's presets and two that halve the average cost: one with all exits, one with two
    early exits, whose heads are then the only ones computed. Unless an option names images, which of a checkpoint may
    be --split alone, they are noise: presets then say little, and the points of half the cost show how much faster half
    the arithmetic is. Faster and cheaper are factors in images per second and in multiply-adds, on the same images;
    achieved is the first over the second. Percentiles are of n batches: p95 needs 20, p99 needs 100. With ONNX Runtime,
    everything is compared with the last exit alone in the runtime where it is faster, at each batch size.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"--runtime is {runtime}; choose one of {', '.join(RUNTIMES)}.")
    sizes = sorted(set(batch_size or (1, 8, 64, 256)))
    model = create(model_name, has_weights(model_name), checkpoint, model_kwargs)
    data.prepare(model)
    count = max(2 * max(sizes), 128)
    if not data.names_images:
        shape = (model.in_chans, *model.pretrained_cfg["input_size"][1:])
        images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
    else:
        where = data.where(model_name)
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
    logits = exits_logits(model, images)
    policies[HALF] = halving_policy(model, logits, images.shape[1:])
    if model.num_exits > 3:
        few = (0, (model.num_exits - 1) // 2)
        policies[f"{HALF}, exits {few[0]} and {few[1]}"] = halving_policy(model, logits, images.shape[1:], few)
    with tempfile.TemporaryDirectory() as folder:
        network = model if as_is else fuse(model)
        further: dict[str, Way] = {}
        if runtime == "onnx":
            with Console(stderr=True).status("Exporting to ONNX …"):
                further = onnx_ways(model, images, policies, folder, network)
        if not as_is:
            images = images.contiguous(memory_format=torch.channels_last)
        timings = measure(network, images, policies, sizes, seconds, further=further)
    found: dict[str, Any] = dict(
        model=model_name,
        machine=describe_machine(*(["onnxruntime"] if runtime == "onnx" else [])),
        images=(where["dataset"] or where["root"]) if data.names_images else "noise",
        input_size=list(images.shape[1:]),
        fused=not as_is,
        timings=[asdict(timing) for timing in timings],
    )
    if as_json:
        return print_json(found)
    for batch in sizes:
        console.print(_table(batch, [timing for timing in timings if timing.batch_size == batch]))
    console.print(f"{found['machine']}; {'×'.join(map(str, found['input_size']))} images: {found['images']}")
    for fault, faulty in (("Slower", _slower), ("A longer p95", _longer_tail)):
        alone = {t.baseline for t in timings}
        early = {*policies, *(name for name, way in further.items() if not way.is_whole)}
        affected = [f"{t.way} at batch {t.batch_size}" for t in faulty(timings) if t.way in early]
        if affected:
            console.print(f"[bold]{fault} than the {' or the '.join(sorted(alone))}[/]: {', '.join(affected)}.")


def _slower(timings: Sequence[Timing]) -> list[Timing]:
    return [t for t in timings if t.speedup < 1]


def _longer_tail(timings: Sequence[Timing]) -> list[Timing]:
    baseline = {t.batch_size: t.p95 for t in timings if t.way == t.baseline}
    return [t for t in timings if t.p95 is not None and t.p95 > baseline[t.batch_size]]  # type: ignore[operator]


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _table(batch_size: int, timings: Sequence[Timing]) -> Table:
    title = f"batch {batch_size}, n = {timings[0].rounds} batches"
    table = make_table("way", "img/s", "p50 ms", "p95", "p99", "faster", "cheaper", "achieved", title=title)
    table.columns[0].justify = "left"
    table.box = SIMPLE  # so that eight columns fit into 80 characters
    for t in timings:
        gains = (
            ("", "", "") if t.way == t.baseline else (f"{t.speedup:.2f}", f"{t.cost_ratio:.2f}", f"{t.achieved:.2f}")
        )
        table.add_row(t.way, f"{t.images_per_second:.1f}", *map(_milliseconds, (t.p50, t.p95, t.p99)), *gains)
    return table
