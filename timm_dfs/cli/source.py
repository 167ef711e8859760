"""Which data a command reads: its options, and their defaults from a checkpoint's run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from ..data.datasets import training_classes
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
    """Arguments of :func:`timm_dfs.data.datasets.dataset_loader`: the given ones, else those of the checkpoint's run.

    Args:
        model_name: The command's MODEL; a checkpoint of ``train.py`` names its data set.
        default_split: Split if none is given and there is no run; without one, a split must be given.
        **given: Options of the command; ``None`` where they were not used.

    Raises:
        ValueError: If no data set or split is named.
        ModuleNotFoundError: If the data set needs an extra that is not installed.
    """
    run = read_run(Path(model_name)).arguments if Path(model_name).is_file() else {}
    data = {key: run[flag] for key, flag in _OF_RUN.items() if run.get(flag) not in (None, "")}
    data.setdefault("root", run.get("data"))
    given = {key: value for key, value in given.items() if value is not None}
    moved = given.keys() & {"dataset", "root"}
    if moved:  # the run's images elsewhere, or other images of the same kind
        data.pop("num_samples", None)
    if "dataset" in moved:
        data.pop("root", None)
    data.update(given)
    data["dataset"] = data.get("dataset") or ""
    data["root"] = str(data["root"]) if data.get("root") else None
    if not data["dataset"] and not data["root"]:
        raise ValueError("Which data set? Give --dataset, as in timm's train.py, e.g. hfds/uoft-cs/cifar100.")
    data["split"] = data.get("split") or default_split
    if data["split"] is None:
        raise ValueError("Which split? Give --split, held out of training, e.g. 'train[45000:]'.")
    if run and not moved and not data["dataset"] and not data.get("class_map"):
        data["class_map"] = training_classes(run)
    if data["dataset"].startswith("hfds/"):
        try:
            import datasets  # noqa: F401
        except ModuleNotFoundError:
            raise ModuleNotFoundError("Hub data sets need the data extra: pip install 'timm-dfs[data]'.") from None
        if not run:
            data["input_key"] = data.get("input_key") or "img"
            data["target_key"] = data.get("target_key") or "fine_label"
    return data


_OF_RUN = dict(
    dataset="dataset",
    root="data_dir",
    split="val_split",
    input_key="input_key",
    target_key="target_key",
    class_map="class_map",
    image_mode="input_img_mode",
    num_samples="val_num_samples",
    trust_remote_code="dataset_trust_remote_code",
)
"""Arguments of the loader and the flags of ``train.py`` that set them."""


def tracked(loader: Iterable, what: str) -> Iterable:
    return track(loader, what, console=Console(stderr=True))
