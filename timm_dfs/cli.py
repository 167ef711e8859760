"""The command line, ``timm-dfs``."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timm.models import is_model_pretrained

from . import demo
from .evaluate import anytime_accuracy, calibration_error, collect_logits
from .flops import exit_flops, last_exit_flops
from .images import dataset_loader, open_image, prepare
from .inference import resolve_policy
from .multi_exit import MultiExitModel, evaluating
from .policy import ExitPolicy

app = typer.Typer(
    help="Networks with exits for timm: list, inspect, try and evaluate them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()

ModelName = Annotated[str, typer.Argument(help="A dfs_* name, or hf-hub:user/name.", metavar="MODEL")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights to use instead of the model's own.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DEFAULT_PRESET = "balanced"
_SOURCES = ("hf-hub:", "local-dir:")


def _one_line_errors(command: Callable) -> Callable:
    """A user's mistake ends with one clear line and exit code 2; anything else keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            print(f"timm-dfs: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(2) from None

    return wrapped


def command(name: str) -> Callable:
    """Register a command of the command line."""
    return lambda function: app.command(name)(_one_line_errors(function))


def _create(name: str, pretrained: bool, checkpoint: Path | None = None) -> MultiExitModel:
    ours = name.startswith(_SOURCES) or (name.startswith("dfs_") and timm.is_model(name.split(".")[0]))
    if not ours:
        raise ValueError(f"There is no model {name!r}; 'timm-dfs list' shows those there are.")
    overlay = dict(file=str(checkpoint)) if checkpoint else None
    try:
        model = timm.create_model(name, pretrained=pretrained or checkpoint is not None, pretrained_cfg_overlay=overlay)
    except (RuntimeError, AssertionError) as error:  # timm's words for a name, tag or folder that is not there
        raise ValueError(f"Cannot create {name}: {error}") from error
    if not isinstance(model, MultiExitModel):
        raise ValueError(f"{name} is a network without exits.")
    return model.eval()


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def _saving(share: float) -> str:
    """Compute saved against the last exit alone; who goes to the end pays for the heads on the way."""
    if share >= 0:
        return f"{share:.0%} of the compute saved"
    return f"{-share:.0%} more compute than the last exit alone"


def _table(*headers: str, title: str | None = None) -> Table:
    """A table whose columns of numbers (all but those with words) are flush right."""
    table = Table(title=title)
    words = {"model", "weights", "input", "after", "answer", "photograph", "is a"}
    for header in headers:
        table.add_column(header, justify="left" if header in words else "right")
    return table


def _labels(model: MultiExitModel) -> tuple[str, ...]:
    return tuple(model.pretrained_cfg.get("label_names") or map(str, range(model.num_classes)))


def _policy(model: MultiExitModel, preset: str | None, thresholds: str | None) -> ExitPolicy:
    if thresholds is not None:
        if preset is not None:
            raise ValueError("Both --preset and --thresholds are given; give one of them.")
        try:
            values = [float(value) for value in thresholds.split(",")]
        except ValueError:
            raise ValueError(
                f"--thresholds is {thresholds!r}; give numbers with commas between, one per exit."
            ) from None
        return resolve_policy(model, ExitPolicy(values))
    if preset is None and DEFAULT_PRESET not in model.presets:
        raise ValueError("This model has no presets; say when to answer with --thresholds 0.9,0.9,…, one per exit.")
    return resolve_policy(model, preset or DEFAULT_PRESET)


@command("list")
def list_models(as_json: AsJson = False) -> None:
    """The models there are, and which come with trained weights."""
    rows: list[dict[str, Any]] = []
    for name in timm.list_models("dfs_*"):
        cfg = timm.get_pretrained_cfg(name)
        rows.append(
            dict(name=name, weights=is_model_pretrained(name), classes=cfg.num_classes, input_size=cfg.input_size)
        )
    if as_json:
        return _print_json(rows)
    table = _table("model", "weights", "classes", "input")
    for row in rows:
        table.add_row(
            row["name"],
            "yes" if row["weights"] else "none yet",
            str(row["classes"]),
            "×".join(map(str, row["input_size"])),
        )
    console.print(table)


@command("info")
def show_info(model_name: ModelName, as_json: AsJson = False) -> None:
    """A model's exits, settings, size and presets."""
    has_weights = model_name.startswith(_SOURCES) or is_model_pretrained(model_name)
    model = _create(model_name, pretrained=has_weights)
    costs = exit_flops(model)
    data: dict[str, Any] = dict(
        model=model_name,
        weights=has_weights,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=model.num_classes,
        input_size=model.pretrained_cfg["input_size"],
        beta=model.beta,
        referencing=model.referencing,
        exits=[
            dict(exit=k, point=info["module"], channels=info["num_chs"], reduction=info["reduction"], flops=cost)
            for k, (info, cost) in enumerate(zip(model.feature_info, costs, strict=True))
        ],
        presets=model.presets,
    )
    if as_json:
        return _print_json(data)
    console.print(
        f"[bold]{model_name}[/]: {data['parameters'] / 1e6:.2f} M parameters, {model.num_classes} classes, ", end=""
    )
    console.print(
        f"beta {model.beta}, referencing {model.referencing}, weights: {'yes' if data['weights'] else 'none yet'}"
    )
    table = _table("exit", "after", "channels", "stride", "multiply-adds, M")
    for row in data["exits"]:
        table.add_row(
            *map(str, (row["exit"], row["point"], row["channels"], row["reduction"])), _millions(row["flops"])
        )
    console.print(table)
    for name, preset in model.presets.items():
        console.print(f"preset [bold]{name}[/]: {', '.join(f'{key} {value}' for key, value in preset.items())}")


@command("flops")
def show_flops(
    model_name: ModelName,
    input_size: Annotated[tuple[int, int, int] | None, typer.Option(help="Channels, height, width.")] = None,
    as_json: AsJson = False,
) -> None:
    """Multiply-adds up to each exit, in both conventions."""
    model = _create(model_name, pretrained=False)
    size = tuple(input_size or model.pretrained_cfg["input_size"])
    data: dict[str, Any] = dict(
        model=model_name,
        input_size=size,
        published=exit_flops(model, size),
        lazy=exit_flops(model, size, lazy=True),
        last_exit_alone=last_exit_flops(model, size),
    )
    if as_json:
        return _print_json(data)
    table = _table("exit", "published", "lazy", title=f"{model_name} at {'×'.join(map(str, size))}: multiply-adds, M")
    for k, (published, lazy) in enumerate(zip(data["published"], data["lazy"], strict=True)):
        table.add_row(str(k), _millions(published), _millions(lazy))
    console.print(table)
    console.print(
        "published: all that the training forward computes up to the exit; lazy: what early exit computes; "
        f"the last exit alone, no other head: {_millions(data['last_exit_alone'])} M. "
        "BatchNorm counts, as fvcore has it."
    )


@command("predict")
def predict_images(
    model_name: ModelName,
    images: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...")],
    preset: Annotated[str | None, typer.Option(help=f"Operating point; by default {DEFAULT_PRESET!r}.")] = None,
    thresholds: Annotated[str | None, typer.Option(help="One per exit, commas between, instead of a preset.")] = None,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Classify images: every exit's answer and cost, and which exit early exit would take."""
    opened = [(str(path), open_image(path)) for path in images]
    model = _create(model_name, pretrained=True, checkpoint=checkpoint)
    policy = _policy(model, preset, thresholds)
    costs, whole = exit_flops(model, lazy=True), last_exit_flops(model)
    answers = _answers(model, opened, policy, costs, whole)
    if as_json:
        return _print_json(dict(model=model_name, last_exit_alone=whole, images=answers))
    for answer in answers:
        table = _table("exit", "answer", "confidence", "multiply-adds, M", title=answer["image"])
        for row in answer["exits"]:
            table.add_row(
                str(row["exit"]),
                row["label"],
                f"{row['confidence']:.3f}",
                _millions(row["flops"]),
                style="bold green" if row["exit"] == answer["exit"] else None,
            )
        console.print(table)
        console.print(f"exit {answer['exit']} answers [bold]{answer['label']}[/], {_saving(answer['saved'])}")


def _answers(
    model: MultiExitModel, images: list[tuple[str, Image.Image]], policy: ExitPolicy, costs: list[int], whole: int
) -> list[dict[str, Any]]:
    """What every exit says of each image, and which one answers."""
    with evaluating(model), torch.inference_mode():
        logits = torch.stack(model.forward_exits(prepare(model, [image for _, image in images])))
    confidence, label = logits.softmax(-1).max(-1)
    labels = _labels(model)
    broken = logits.isnan().any(-1).any(0)
    if broken.any():
        names = ", ".join(name for (name, _), is_broken in zip(images, broken.tolist()) if is_broken)
        raise ValueError(f"The network's logits for {names} hold NaN; check its weights.")
    answers = []
    for i, ((name, _), k) in enumerate(zip(images, policy.exit_index(logits).tolist(), strict=True)):
        exits = [
            dict(exit=j, label=labels[label[j, i]], confidence=confidence[j, i].item(), flops=costs[j])
            for j in range(model.num_exits)
        ]
        answers.append(
            dict(image=name, exit=k, label=exits[k]["label"], flops=costs[k], saved=1 - costs[k] / whole, exits=exits)
        )
    return answers


@command("eval")
def evaluate_model(
    model_name: ModelName,
    dataset: Annotated[str, typer.Option(help="As in timm's train.py, e.g. hfds/uoft-cs/cifar100.")],
    data_dir: Annotated[Path | None, typer.Option(help="Root of the data set.")] = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "test",
    input_key: Annotated[
        str | None, typer.Option(help="Column of the images in an hfds/ data set; else CIFAR-100's, img.")
    ] = None,
    target_key: Annotated[
        str | None, typer.Option(help="Column of the labels in an hfds/ data set; else CIFAR-100's, fine_label.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    workers: Annotated[int, typer.Option(min=0)] = 1,
    checkpoint: Checkpoint = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy, calibration and cost of every exit over a data set."""
    model = _create(model_name, pretrained=True, checkpoint=checkpoint)
    if dataset.startswith("hfds/"):
        _require_datasets()
        input_key, target_key = input_key or "img", target_key or "fine_label"
    root = str(data_dir) if data_dir else None
    loader = dataset_loader(model, dataset, root, split, input_key, target_key, batch_size, workers)
    progress = Console(stderr=True)
    logits, targets = collect_logits(model, track(loader, f"{model_name} on {split}", console=progress))
    data: dict[str, Any] = dict(
        model=model_name,
        dataset=dataset,
        split=split,
        samples=len(targets),
        top1=anytime_accuracy(logits, targets).tolist(),
        top5=anytime_accuracy(logits, targets, topk=min(5, model.num_classes)).tolist(),
        ece=calibration_error(logits, targets).tolist(),
        flops=exit_flops(model),
        flops_lazy=exit_flops(model, lazy=True),
    )
    if as_json:
        return _print_json(data)
    table = _table(
        "exit",
        "top-1, %",
        "top-5, %",
        "ECE",
        "multiply-adds, M",
        "lazy, M",
        title=f"{model_name}: {len(targets)} samples",
    )
    columns = zip(data["top1"], data["top5"], data["ece"], data["flops"], data["flops_lazy"], strict=True)
    for k, (top1, top5, ece, cost, lazy) in enumerate(columns):
        table.add_row(str(k), f"{top1:.2f}", f"{top5:.2f}", f"{ece:.4f}", _millions(cost), _millions(lazy))
    console.print(table)


def _require_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Hub data sets need the data extra: pip install 'timm-dfs[data]'.") from None


@command("demo")
def run_demo(
    preset: Annotated[str, typer.Option(help="Operating point.")] = DEFAULT_PRESET,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the timed batch.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Early exit on real photographs: which exit answers, at what cost, and the measured speed-up."""
    images = demo.photographs()
    model_name = demo.MODEL
    model = _create(model_name, pretrained=True)
    policy = resolve_policy(model, preset)
    costs, whole = exit_flops(model, lazy=True), last_exit_flops(model)
    answers = _answers(model, [*images.items()], policy, costs, whole)
    speed = demo.measure(model, [*images.values()], policy, batch_size)
    mean_cost = sum(count * cost for count, cost in zip(speed.exit_counts, costs, strict=True)) / batch_size
    data: dict[str, Any] = dict(
        model=model_name,
        preset=preset,
        last_exit_alone=whole,
        photographs=[dict(answer, subject=demo.PHOTOGRAPHS[answer["image"]]) for answer in answers],
        batch_size=batch_size,
        exit_counts=speed.exit_counts,
        mean_flops=mean_cost,
        images_per_second=dict(last_exit_alone=speed.full, early_exit=speed.early),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    if as_json:
        return _print_json(data)
    table = _table("photograph", "is a", "answer", "exit", "confidence", "cost, M", "saved")
    for row in data["photographs"]:
        table.add_row(
            row["image"],
            row["subject"] or "[dim]none[/]",
            row["label"],
            str(row["exit"]),
            f"{row['exits'][row['exit']]['confidence']:.3f}",
            _millions(row["flops"]),
            f"{row['saved']:.0%}",
        )
    console.print(table)
    absent = [row["image"] for row in data["photographs"] if row["subject"] is None]
    console.print(
        f"CIFAR-100 has no class for {', '.join(absent)}: whatever is answered there is wrong. "
        "Cost in multiply-adds, saved against the last exit alone."
    )
    console.print(
        f"\n{batch_size} crops of them in one batch ({data['threads']} threads, torch {data['torch']}): "
        f"early exit {speed.early:,.0f} images/s, the last exit alone {speed.full:,.0f} images/s: "
        f"[bold]{speed.early / speed.full:.2f}×[/] as fast, with {whole / mean_cost:.2f}× fewer multiply-adds. "
        f"Exits 0 to {model.num_exits - 1} answered {', '.join(map(str, speed.exit_counts))} of them."
    )


def main() -> None:
    """Entry point of ``timm-dfs``."""
    app()


if __name__ == "__main__":
    main()
