"""Which data a command reads: its options, and their defaults from a checkpoint's run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from ..training.run import read_run

Dataset = Annotated[
    str | None,
    typer.Option(help="As in timm's train.py, e.g. hfds/uoft-cs/cifar100; by default the checkpoint's own."),
]
DataDir = Annotated[Path | None, typer.Option(help="Root of the data set.")]
InputKey = Annotated[str | None, typer.Option(help="Column of the images in an hfds/ data set; else CIFAR-100's, img.")]
TargetKey = Annotated[
    str | None, typer.Option(help="Column of the labels in an hfds/ data set; else CIFAR-100's, fine_label.")
]
Split = Annotated[
    str | None, typer.Option(help="Split to measure on; by default the checkpoint's validation split, or test.")
]
BatchSize = Annotated[int, typer.Option(min=1)]
Workers = Annotated[int, typer.Option(min=0)]


def data_of(model_name: str, default_split: str | None = "test", **given: Any) -> dict[str, Any]:
    """Which data: as given, else as the checkpoint's run was validated on. Without a default, a split must be named."""
    run = read_run(Path(model_name)).dataset if Path(model_name).is_file() else {}
    data = {key: given[key] or run.get(of) for key, of in _SAME.items()}
    if not data["dataset"] and not data["root"]:
        raise ValueError("Which data set? Give --dataset, as in timm's train.py, e.g. hfds/uoft-cs/cifar100.")
    data["dataset"] = data["dataset"] or ""
    data["split"] = data["split"] or default_split
    if data["split"] is None:
        raise ValueError("Which split? Give --split, held out of training, e.g. 'train[45000:]'.")
    data["root"] = str(data["root"]) if data["root"] else None
    if data["dataset"].startswith("hfds/"):
        try:
            import datasets  # noqa: F401
        except ModuleNotFoundError:
            raise ModuleNotFoundError("Hub data sets need the data extra: pip install 'timm-dfs[data]'.") from None
        data["input_key"] = data["input_key"] or "img"
        data["target_key"] = data["target_key"] or "fine_label"
    return data


_SAME = dict(dataset="dataset", root="data_dir", split="val_split", input_key="input_key", target_key="target_key")


def tracked(loader: Iterable, what: str) -> Iterable:
    return track(loader, what, console=Console(stderr=True))
