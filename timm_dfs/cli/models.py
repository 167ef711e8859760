"""``timm-dfs list``, ``info`` and ``flops``: models, their exits and costs."""

from typing import Annotated, Any

import timm
import typer
from timm.models import get_arch_name, is_model_pretrained

from ..base.model import MultiExitModel
from ..evaluation.flops import Costs, exit_flops
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
from .source import fixed_size


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
    untagged = [name for name in timm.list_models(wanted) if name.startswith(PREFIX)]
    tagged = [name for name in timm.list_pretrained(wanted) if name.startswith(PREFIX) and "." in name]
    names: list[str] = []
    for name in dict.fromkeys([*untagged, *map(get_arch_name, tagged)]):
        names += [name] if name in untagged else []
        names += [tag for tag in tagged if get_arch_name(tag) == name]  # further weights of one model
    if not names:
        raise ValueError(f"No model matches {pattern}; 'timm-dfs list' lists some models, '{PREFIX}*' matches all.")
    if pattern is None:
        names = [name for name in names if name not in twins or is_model_pretrained(name)]
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
        chain=model.chain,
        exits=[dict(exit=k, **_point(model, k), flops=cost) for k, cost in enumerate(costs)],
        presets=model.presets,
    )
    if as_json:
        return print_json(data)
    console.print(
        f"[bold]{model_name}[/]: {data['parameters'] / 1e6:.2f} M parameters, {model.num_classes} classes, ", end=""
    )
    chain = f", chain {model.chain:g}" if model.chain else ""
    has = "yes" if data["weights"] else "none yet"
    console.print(f"beta {model.beta}, referencing {model.referencing}{chain}, weights: {has}")
    table = make_table("exit", "after", "channels", "stride", "multiply-adds, M")
    for row in data["exits"]:
        point, stride = row["point"] or "the whole network", row["reduction"] or ""
        table.add_row(str(row["exit"]), point, str(row["channels"]), str(stride), millions(row["flops"]))
    console.print(table)
    for name, preset in model.presets.items():
        console.print(f"preset [bold]{name}[/]: {_in_words(preset)}")


def _point(model: MultiExitModel, exit_index: int) -> dict[str, Any]:
    """Exit point of an exit; the last exit of a twin is the backbone's own classifier, after no module."""
    if exit_index == len(model.feature_info):
        return dict(point=None, channels=model.num_features, reduction=None)
    info = model.feature_info[exit_index]
    return dict(point=info["module"], channels=info["num_chs"], reduction=info["reduction"])


def _in_words(preset: dict[str, Any]) -> str:
    """A preset in one line, numbers rounded."""
    thresholds = " ".join("never" if value is None else f"{value:.3f}" for value in preset["thresholds"])
    parts = [f"{preset.get('confidence', 'max_prob')} at least {thresholds}"]
    if preset.get("temperatures"):
        parts.append(f"logits divided by {' '.join(f'{value:.2f}' for value in preset['temperatures'])}")
    if preset.get("ensemble"):
        parts.append("exits predict together with those before them")
    if "average_flops" in preset:
        parts.append(f"{millions(preset['average_flops'])} M multiply-adds on average")
    if "accuracy" in preset:
        parts.append(f"{preset['accuracy']:.2f} % on the samples it was fitted on")
    return "; ".join(parts)


@command("flops")
def show_flops(
    model_name: ModelName,
    input_size: Annotated[tuple[int, int, int] | None, typer.Option(help="Channels, height, width.")] = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Count the multiply-adds (MACs) up to each exit, in the published and the lazy convention."""
    # Weights have exits of their own, other than the architecture's default.
    model = create(model_name, pretrained=has_weights(model_name), model_kwargs=model_kwargs)
    size = tuple(input_size or model.pretrained_cfg["input_size"])
    try:
        costs = Costs(model, size)
    except (AssertionError, RuntimeError) as error:  # of a network that takes images of one size only
        raise fixed_size(model_name, size, error) from error
    data: dict[str, Any] = dict(
        model=model_name,
        input_size=size,
        published=costs.of_exits(),
        lazy=costs.of_exits(lazy=True),
        last_exit_alone=costs.of_last_exit_alone(),
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
