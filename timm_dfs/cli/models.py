"""``timm-dfs list``, ``info`` and ``flops``: models, their exits and costs."""

from typing import Annotated, Any

import timm
import typer
from timm.models import get_arch_name, is_model_pretrained

from ..evaluation.flops import exit_flops, last_exit_flops
from ..models.dfs_twins import BASES, PREFIX
from .base import (
    AsJson,
    ModelKwargs,
    ModelName,
    command,
    console,
    create,
    has_weights,
    make_table,
    millions,
    print_json,
)


@command("list")
def list_models(
    pattern: Annotated[str | None, typer.Argument(help="Names to list, e.g. 'dfs_resnet*'; includes twins.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the models and say which have trained weights.

    Without a pattern, twins of timm's architectures are listed only if they have trained exits.
    """
    twins = {f"{PREFIX}{base}" for base in BASES}
    wanted = pattern or f"{PREFIX}*"
    names = [name for name in timm.list_models(wanted) if name.startswith(PREFIX)]
    if pattern is None:
        names = [name for name in names if name not in twins or is_model_pretrained(name)]
    if not names:
        raise ValueError(f"No model matches {pattern}; 'timm-dfs list' lists some models, '{PREFIX}*' matches all.")
    tagged = [name for name in timm.list_pretrained(wanted) if "." in name]  # further weights of one model
    names = [row for name in names for row in (name, *(tag for tag in tagged if get_arch_name(tag) == name))]
    rows: list[dict[str, Any]] = []
    for name in names:
        cfg = timm.get_pretrained_cfg(name)
        rows.append(
            dict(name=name, weights=is_model_pretrained(name), classes=cfg.num_classes, input_size=cfg.input_size)
        )
    if as_json:
        return print_json(rows)
    table = make_table("model", "weights", "classes", "input")
    for row in rows:
        table.add_row(
            row["name"],
            "yes" if row["weights"] else "none yet",
            str(row["classes"]),
            "×".join(map(str, row["input_size"])),
        )
    console.print(table)
    if pattern is None:
        console.print(f"and a {PREFIX} twin of each of timm's {len(twins)} architectures: timm-dfs list '{PREFIX}*'")


@command("info")
def show_info(model_name: ModelName, model_kwargs: ModelKwargs = None, as_json: AsJson = False) -> None:
    """Show a model's exits, settings, size and presets."""
    weights = has_weights(model_name)
    model = create(model_name, pretrained=weights, model_kwargs=model_kwargs)
    costs = exit_flops(model)
    data: dict[str, Any] = dict(
        model=model_name,
        weights=weights,
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
        return print_json(data)
    console.print(
        f"[bold]{model_name}[/]: {data['parameters'] / 1e6:.2f} M parameters, {model.num_classes} classes, ", end=""
    )
    console.print(
        f"beta {model.beta}, referencing {model.referencing}, weights: {'yes' if data['weights'] else 'none yet'}"
    )
    table = make_table("exit", "after", "channels", "stride", "multiply-adds, M")
    for row in data["exits"]:
        table.add_row(*map(str, (row["exit"], row["point"], row["channels"], row["reduction"])), millions(row["flops"]))
    console.print(table)
    for name, preset in model.presets.items():
        console.print(f"preset [bold]{name}[/]: {', '.join(f'{key} {value}' for key, value in preset.items())}")


@command("flops")
def show_flops(
    model_name: ModelName,
    input_size: Annotated[tuple[int, int, int] | None, typer.Option(help="Channels, height, width.")] = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Count the multiply-adds (MACs) up to each exit, in the published and the lazy convention."""
    model = create(model_name, pretrained=False, model_kwargs=model_kwargs)
    size = tuple(input_size or model.pretrained_cfg["input_size"])
    data: dict[str, Any] = dict(
        model=model_name,
        input_size=size,
        published=exit_flops(model, size),
        lazy=exit_flops(model, size, lazy=True),
        last_exit_alone=last_exit_flops(model, size),
    )
    if as_json:
        return print_json(data)
    table = make_table(
        "exit", "published", "lazy", title=f"{model_name} at {'×'.join(map(str, size))}: multiply-adds, M"
    )
    for k, (published, lazy) in enumerate(zip(data["published"], data["lazy"], strict=True)):
        table.add_row(str(k), millions(published), millions(lazy))
    console.print(table)
    console.print(
        "published: everything that the training forward pass computes up to the exit; lazy: what early exit computes; "
        f"the last exit alone, with no other head: {millions(data['last_exit_alone'])} M. "
        "Batch norm is counted, as in fvcore."
    )
