"""Which data a command reads: its options, and their defaults from a checkpoint's run."""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from timm.data import resolve_data_config, str_to_interp_mode

from ..base.model import MultiExitModel
from ..calibration.seen import as_named_split
from ..data.datasets import training_classes
from ..data.images import adapted, drop_test_preparation
from ..data.shards import WHOLE, Shard, launched_processes
from ..data.splits import overlap, read_by_train, standard
from ..training.run import TrainingRun, read_run

InputKey = Annotated[str | None, typer.Option(help="Column of the images in an hfds/ data set; else CIFAR-100's, img.")]
TargetKey = Annotated[
    str | None, typer.Option(help="Column of the labels in an hfds/ data set; else CIFAR-100's, fine_label.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a batch.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load images.")]


@dataclass
class DataOptions:
    """Options that say which images a command reads and how they are prepared, with ``train.py``'s names.

    A checkpoint of ``train.py`` has a default for each: the run's own.
    """

    dataset: Annotated[
        str | None,
        typer.Option(help="As in timm's train.py, e.g. hfds/uoft-cs/cifar100; by default the checkpoint's own."),
    ] = None
    data_dir: Annotated[Path | None, typer.Option(help="Root of the data set.")] = None
    split: Annotated[
        str | None,
        typer.Option(
            help="Split to read, perhaps a slice of it: 'train[45000:]'; by default the checkpoint's validation split, "
            "or test. '.' is a folder of class folders itself."
        ),
    ] = None
    input_key: Annotated[
        str | None, typer.Option(help="Column of the images in an hfds/ data set; else CIFAR-100's, img.")
    ] = None
    target_key: Annotated[
        str | None, typer.Option(help="Column of the labels in an hfds/ data set; else CIFAR-100's, fine_label.")
    ] = None
    class_map: Annotated[str | None, typer.Option(help="File of class names, one a line, in order.")] = None
    input_size: Annotated[
        tuple[int, int, int] | None, typer.Option(help="Channels, height and width of the images.")
    ] = None
    img_size: Annotated[int | None, typer.Option(min=1, help="Height and width of the images.")] = None
    mean: Annotated[list[float] | None, typer.Option(help="Mean of the pixels, one or one a channel.")] = None
    std: Annotated[list[float] | None, typer.Option(help="Their standard deviation.")] = None
    crop_pct: Annotated[float | None, typer.Option(help="Share of the resized image that is cropped out.")] = None
    interpolation: Annotated[str | None, typer.Option(help="Of resizing: bilinear, bicubic, nearest.")] = None

    def where(self, model_name: str, default_split: str | None = "test", processes: int = 1) -> dict[str, Any]:
        """Arguments of the loader, see :func:`data_of`."""
        given = {key: getattr(self, key) for key in _WHICH}
        where = data_of(model_name, default_split, processes, root=self.data_dir, **given)
        if default_split is None:  # of calibrate and export-hub, whose split is to be held out of training
            warn_of_training_images(model_name, where)
        return where

    @property
    def names_images(self) -> bool:
        """Whether one of the options says which images to read."""
        return any(getattr(self, key) is not None for key in ("data_dir", *_WHICH))

    def prepare(self, model: MultiExitModel) -> None:
        """Write the given preparation into the model's ``pretrained_cfg``.

        Raises:
            ValueError: If a value does not fit the model's channels, or is no interpolation of timm's; or if the model
                takes no images of the size given.
        """
        given = {name: value for name in _PREPARATION if (value := getattr(self, name)) is not None}
        if not given:
            return
        if self.interpolation is not None:
            try:
                str_to_interp_mode(self.interpolation)
            except KeyError:
                raise ValueError(
                    f"--interpolation is {self.interpolation!r}; give bilinear, bicubic, nearest or another of timm's."
                ) from None
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"--crop-pct is {self.crop_pct}; give a share above 0 and at most 1, e.g. 0.875.")
        if self.input_size is None:
            given["in_chans"] = model.in_chans
        try:
            config = resolve_data_config(given, model=model)
        except AssertionError:
            raise ValueError(
                f"--mean is {self.mean}, --std is {self.std}; give one value, or one for each of the model's "
                f"{model.in_chans} channels."
            ) from None
        if self.input_size is not None and self.input_size[0] != model.in_chans:
            raise ValueError(f"--input-size is {self.input_size}; the model takes {model.in_chans} channels.")
        model.pretrained_cfg.update(adapted(config, model.in_chans))
        if self.crop_pct is not None or self.input_size is not None or self.img_size is not None:
            drop_test_preparation(model.pretrained_cfg)
        if self.input_size is not None or self.img_size is not None:
            check_size(model)


_WHICH = ("dataset", "split", "input_key", "target_key", "class_map")
_PREPARATION = ("input_size", "img_size", "mean", "std", "crop_pct", "interpolation")


def check_size(model: MultiExitModel) -> None:
    """Raise ``ValueError`` if a model does not take images of the size in its ``pretrained_cfg``."""
    size = model.pretrained_cfg["input_size"]
    try:
        with torch.no_grad():
            model(next(model.parameters()).new_zeros(1, *size))
    except (AssertionError, RuntimeError) as error:  # of a network that takes images of one size only
        raise fixed_size(model.pretrained_cfg.get("architecture", type(model).__name__), size, error) from error


def fixed_size(name: str, size: Sequence[int], error: Exception) -> ValueError:
    """Error of a network that takes no images of a size."""
    return ValueError(
        f"{name} does not take images of {'×'.join(map(str, size))} ({error}); for networks of a fixed size, "
        f"build it for that size, e.g. --model-kwargs img_size={size[-1]}."
    )


def with_data_options(command: Callable) -> Callable:
    """Give a command the options of :class:`DataOptions` in place of its parameter ``data``."""
    of_data = inspect.signature(DataOptions).parameters

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return command(*args, data=DataOptions(**{name: kwargs.pop(name) for name in of_data}), **kwargs)

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        parameters += of_data.values() if parameter.name == "data" else [parameter]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def data_of(model_name: str, default_split: str | None = "test", processes: int = 1, **given: Any) -> dict[str, Any]:
    """Arguments of :func:`timm_dfs.data.datasets.dataset_loader`: the given ones, else those of the checkpoint's run.

    Args:
        model_name: The command's MODEL; a checkpoint of ``train.py`` names its data set.
        default_split: Split if none is given and there is no run; without one, a split must be given.
        processes: Processes that the command divides the data set among.
        **given: Options of the command; ``None`` where they were not used.

    Raises:
        ValueError: If no data set or split is named, or ``torchrun`` started another number of processes.
        ModuleNotFoundError: If the data set needs an extra that is not installed.
    """
    if launched_processes() != processes:
        raise ValueError(
            f"torchrun started {launched_processes()} processes, but only timm-dfs eval divides a data set among "
            "processes; run this command without torchrun."
        )
    record = read_run(Path(model_name)) if Path(model_name).is_file() else TrainingRun("")
    run = record.arguments
    data = {key: run[flag] for key, flag in _OF_RUN.items() if run.get(flag) not in (None, "")}
    data.setdefault("root", run.get("data"))
    if "split" in data:
        data["split"] = read_by_train(data.get("dataset", ""), data["split"])
    given = {key: value for key, value in given.items() if value is not None}
    moved = given.keys() & {"dataset", "root"}
    if "root" in given and "dataset" not in given and data.get("dataset", "").startswith(("hfds/", "hfids/")):
        raise ValueError(
            f"--data-dir {given['root']} would only be the cache of {data['dataset']}, which the run was trained on. "
            f"Give --dataset '' as well to read the images of that folder, or --dataset {data['dataset']} to read "
            "that data set from that cache."
        )
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
    if run and not moved and not data["dataset"] and not data.get("class_map") and not record.keeps_classes:
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


def warn_of_training_images(model_name: str, where: dict[str, Any]) -> None:
    """Warn if the split that thresholds are to be fitted on shares images with the one that the run trained on."""
    if shared := shared_with_training(model_name, where, where["split"]):
        warnings.warn(
            f"--split {where['split']} {shared}, which the model was trained on: thresholds and "
            "temperatures fitted to them are too confident. Give a split held out of training.",
            stacklevel=3,
        )


def shared_with_training(model_name: str, where: dict[str, Any], split: str) -> str | None:
    """Words for what ``split`` shares with the split that a checkpoint's run trained on; ``None`` if surely nothing."""
    run = read_run(Path(model_name)).arguments if Path(model_name).is_file() else {}
    dataset, trained = run.get("dataset") or "", run.get("train_split")
    trained = trained and standard(dataset, read_by_train(dataset, trained))
    if not trained or dataset != where["dataset"]:
        return None
    if not dataset:  # of a folder that is read as split "." the name tells what it is
        split = as_named_split(where["root"] or "", split)[1]
        trained = as_named_split(run.get("data_dir") or run.get("data") or "", trained)[1]
    shared = overlap(trained, standard(dataset, split))
    if shared is None:
        return f"may share images with {trained} (count both from the start to show that it does not)"
    return f"shares images with {trained}" if shared else None


def described(split: str, where: dict[str, Any]) -> str:
    """A split in words, for errors; ``.`` is the folder itself, which is known by its name."""
    itself = not where["dataset"] and split.partition("[")[0] == "."
    return f"{split} of {where['root']}, a folder that is taken for the split of its name" if itself else split


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


def tracked(loader: Iterable, what: str, shard: Shard = WHOLE) -> Iterable:
    """Show the progress over a loader on stderr; of several processes, only the first shows its own."""
    return track(loader, what, console=Console(stderr=True, quiet=shard.rank > 0))
