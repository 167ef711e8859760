"""Data sets, opened by timm, with the split, the classes and the image preparation that were asked for."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from timm.data import ImageDataset, ImageNetInfo, create_dataset, create_loader, resolve_data_config
from timm.data.dataset_factory import _EVAL_SYNONYM, _TRAIN_SYNONYM, _search_split
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import IterableDataset, Subset
from torchvision.datasets import ImageFolder

from ..base.model import MultiExitModel
from ..training.run import TrainingRun
from .images import adapted, data_config, drop_test_preparation, given_labels, warn_of_other_images
from .shards import WHOLE, Shard
from .splits import FOLDERS, TORCHVISION, read_by_train

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

_STREAMS = ("hfids/", "tfds/", "wds/")
_NATIVE_SLICES = ("hfds/", "tfds/")
"""Prefixes of data sets whose own library understands ``split[a:b]``."""


def is_stream(dataset: str) -> bool:
    """Whether timm's name of a data set is that of a stream, which gives samples in its own order alone."""
    return dataset.lower().startswith(_STREAMS)


_SLICE = re.compile(r"(?P<name>[^\[]*)\[(?P<start>-?\d*%?):(?P<stop>-?\d*%?)\]")

_READ_ERRORS = (KeyError, IndexError, TypeError, AssertionError, RuntimeError)


def open_dataset(
    dataset: str,
    root: str | None,
    split: str,
    input_key: str | None = None,
    target_key: str | None = None,
    class_map: str | Mapping[str, int] | None = None,
    image_mode: str = "RGB",
    batch_size: int = 1,
    num_samples: int | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Open a data set by timm's name of it.

    Args:
        dataset: As ``train.py --dataset``: ``""`` for a folder of class folders, else ``hfds/``, ``hfids/``, ``wds/``,
            ``tfds/`` or ``torch/`` and a name.
        root: As ``train.py --data-dir``.
        split: Name of the split, perhaps with a slice: ``train[45000:]``, ``test[:10%]``. For a folder, the name of a
            folder in ``root`` (or timm's synonym of it), or ``"."`` for ``root`` itself.
        input_key: Column of the images, where the data set has columns.
        target_key: Column of the targets.
        class_map: As ``train.py --class-map``, or a mapping from class names to indices.
        image_mode: Pillow's mode that images are converted to; those of ``torch/`` stay as they are.
        batch_size: For streams.
        num_samples: Samples of a stream that does not tell.
        trust_remote_code: As ``train.py --dataset-trust-remote-code``.

    Returns:
        A data set of (PIL image, target).

    Raises:
        ValueError: If there is no such split; the message lists those that exist.
    """
    matched, native = _SLICE.fullmatch(split), dataset.lower().startswith(_NATIVE_SLICES)
    if "[" in split and matched is None and not native:
        raise ValueError(
            f"split is {split!r}; give a slice in whole numbers or percent, as 'train[45000:]', 'train[:10%]'."
        )
    ours = matched is not None and not native
    name = matched["name"] if ours and matched else split
    if ours and is_stream(dataset):
        raise ValueError(f"split is {split!r}; a stream cannot be sliced, give a whole split of {dataset!r}.")
    kind, _, own_name = dataset.partition("/")
    extra: dict[str, Any] = dict(input_key=input_key, target_key=target_key)
    if not dataset:
        root, search = _folder(root, name), False
    else:
        search = True
        if kind.lower() == "torch":
            _check_torchvision_split(own_name, root, name)
    data = create_dataset(
        dataset,
        root=root,
        split=name,
        search_split=search,
        is_training=False,
        class_map=class_map or "",  # type: ignore[arg-type]
        batch_size=batch_size,
        num_samples=num_samples,
        input_img_mode=image_mode,
        trust_remote_code=trust_remote_code,
        **{key: value for key, value in extra.items() if value},
    )
    if type(data) is ImageDataset:
        data.__class__ = _EveryImage  # timm's factory takes no other class
    if not ours or matched is None:
        return data
    start, stop = (_position(matched[end], len(data)) for end in ("start", "stop"))
    chosen = range(len(data))[slice(start, stop)]
    if not chosen:
        raise ValueError(f"split is {split!r}, but {name!r} has {len(data)} samples; the slice is empty.")
    return Subset(data, chosen)


class _EveryImage(ImageDataset):
    """timm's data set, but an image that cannot be read is an error: timm would count the next one in its place."""

    def __getitem__(self, index: int) -> Any:
        self._max_retries = 1
        try:
            return super().__getitem__(index)
        except RuntimeError as error:
            if not str(error).startswith("Failed to load"):  # timm's words
                raise
            try:
                name = self.filename(index, absolute=True)
            except (NotImplementedError, AttributeError):  # not every reader names its samples
                name = None
            raise ValueError(
                f"{name or f'Sample {index}'} cannot be read as an image, for the reason that timm logged; repair or "
                "remove it."
            ) from error


def _position(text: str, samples: int) -> int | None:
    """Index that one end of a slice names; percentages are rounded, as by the ``datasets`` library."""
    if not text:
        return None
    return round(samples * int(text[:-1]) / 100) if text.endswith("%") else int(text)


def _folder(root: str | None, split: str) -> str:
    """Folder of a split, found as timm finds it, but never another one than asked for."""
    if root is None or not Path(root).exists():
        raise ValueError(f"The root of the data set is {root}, which does not exist; give --data-dir.")
    if split == ".":
        if splits := _splits_inside(root):
            raise ValueError(
                f"{root} holds splits ({', '.join(splits)}), which the split '.' would mix; give one of their names."
            )
        return root
    folder = _search_split(root, split) if os.path.isdir(root) else root
    if not split or folder == root:
        there = sorted(entry.name for entry in Path(root).iterdir() if entry.is_dir()) if os.path.isdir(root) else []
        raise ValueError(
            f"{root} has no split {split!r}; it has the folders {', '.join(there[:20]) or 'none'}"
            f"{', …' if len(there) > 20 else ''}. If it holds the class folders itself, give the split '.'."
        )
    return folder


def _splits_inside(root: str) -> list[str]:
    """Folders in a folder that have a split's name and hold folders themselves; a class may have such a name, too."""
    names = {*_TRAIN_SYNONYM, *_EVAL_SYNONYM, "test"}
    inside = [entry for entry in Path(root).iterdir() if entry.name in names] if os.path.isdir(root) else []
    return sorted(entry.name for entry in inside if entry.is_dir() and any(part.is_dir() for part in entry.iterdir()))


def _check_torchvision_split(name: str, root: str | None, split: str) -> None:
    """Refuse a name that timm would take for torchvision's test split, or for the whole of a folder."""
    name = name.rpartition("/")[2].lower()
    if name in FOLDERS:
        _folder(root, split)
    elif name in TORCHVISION:
        known = [*_TRAIN_SYNONYM, *_EVAL_SYNONYM, "test"]
        if split not in known:
            raise ValueError(f"torch/{name} has no split {split!r}; it has train and test (as {', '.join(known)}).")


def class_indices(data: Any) -> dict[str, int] | None:
    """Index of each class by its name, in a data set that :func:`open_dataset` opened; ``None`` if it has no names."""
    while isinstance(data, Subset):
        data = data.dataset
    reader = getattr(data, "reader", None)
    if reader is not None:
        indices = getattr(reader, "class_to_idx", None) or None
        return {str(name): index for name, index in indices.items()} if indices else None
    names = getattr(data, "classes", None)  # torchvision's
    return {str(name): index for index, name in enumerate(names)} if names else None


def class_names(indices: Mapping[str, int] | None) -> tuple[str, ...] | None:
    """Names of classes 0, 1, …; ``None`` unless every index has exactly one name."""
    if not indices or sorted(indices.values()) != list(range(len(indices))):
        return None
    return tuple(sorted(indices, key=indices.__getitem__))


def follow_run(model: MultiExitModel, run: TrainingRun) -> None:
    """Prepare images and name classes as a run of ``train.py`` did, by the model's ``pretrained_cfg``.

    Input size, mean, standard deviation, crop and interpolation are what ``train.py`` validated with. Names of the
    classes are those of its training split, if that is at hand, else numbers; a frozen last exit keeps its own. A run
    that was given slices which ``train.py`` does not read causes a warning, and so does one whose moving average it did
    not validate.

    Args:
        model: The trained model; its ``pretrained_cfg`` is changed.
        run: The run.

    Raises:
        ValueError: If ``train.py`` validated the run in a way that is not reproduced here.
    """
    run.check_reproducible()
    _warn_of_slices(run.arguments)
    if run.arguments.get("model_ema") and run.arguments.get("model_ema_force_cpu"):
        warnings.warn(
            "train.py validated this run's trained weights, by which it chose model_best, not their moving average "
            "(--model-ema-force-cpu); what is read here is the moving average.",
            stacklevel=2,
        )
    config = adapted(resolve_data_config(run.arguments, model=model), model.in_chans)
    config["crop_mode"] = "center"  # train.py passes no other to its validation
    model.pretrained_cfg.update(config)
    drop_test_preparation(model.pretrained_cfg)
    if run.keeps_classes:
        return
    names = class_names(training_classes(run.arguments))
    model.pretrained_cfg["label_names"] = names if names and len(names) == model.num_classes else None


def _warn_of_slices(arguments: Mapping[str, Any]) -> None:
    """Warn of slices in a run's splits where ``train.py`` read other images than these name."""
    dataset = arguments.get("dataset") or ""
    for use, flag in (("trained", "train_split"), ("validated", "val_split")):
        given = arguments.get(flag) or ""
        if "[" in given and (read := read_by_train(dataset, given)) != given:
            warnings.warn(
                f"This run was given --{flag.replace('_', '-')} {given}, but train.py reads no slices of "
                f"{dataset or 'folders'}: it {use} on all of {read}. To divide a data set, give hfds/, or make a "
                "folder of each part.",
                stacklevel=3,
            )


def training_classes(arguments: Mapping[str, Any]) -> dict[str, int] | None:
    """Index of each class by its name in a run's training split; ``None`` if it is not at hand or has no names.

    Data that are there but cannot be read cause a warning.
    """
    dataset, root = arguments.get("dataset") or "", arguments.get("data_dir") or arguments.get("data")
    if is_stream(dataset):  # opening a stream downloads
        return None
    if not dataset.lower().startswith("hfds/") and not (root and Path(root).exists()):  # of hfds/ it is the cache
        return None
    split = arguments.get("train_split") or "train"
    if not dataset:
        try:
            _folder(root, split)
        except ValueError:  # e.g. the validation images alone were copied here
            return None
    try:
        return class_indices(
            open_dataset(
                dataset,
                root,
                split,
                arguments.get("input_key"),
                arguments.get("target_key"),
                arguments.get("class_map"),
            )
        )
    except (*_READ_ERRORS, OSError, ValueError, ImportError) as error:
        if isinstance(error, (FileNotFoundError, ConnectionError)) and dataset.lower().startswith("hfds/"):
            return None  # neither on this machine nor to be had
        warnings.warn(
            f"Cannot read the names of the classes from split {split!r} of {dataset or root} "
            f"({type(error).__name__}: {error}); classes are named by their numbers.",
            stacklevel=2,
        )
        return None


def dataset_loader(
    model: MultiExitModel,
    dataset: str,
    root: str | None,
    split: str,
    input_key: str | None = None,
    target_key: str | None = None,
    batch_size: int = 128,
    workers: int = 1,
    samples: int | None = None,
    class_map: str | Mapping[str, int] | None = None,
    image_mode: str | None = None,
    num_samples: int | None = None,
    trust_remote_code: bool = False,
    shard: Shard = WHOLE,
) -> "DataLoader":
    """timm's evaluation loader over a data set, prepared as the model's ``pretrained_cfg`` says.

    A folder of class folders is numbered by ``class_map``; else by the model's class names, where all folders have
    such a name; for a model of 1,000 classes by ImageNet-1k's synsets, where all folders are named so; and then by the
    training split beside it. So a split that lacks a class keeps the others' numbers. Any other data set whose classes
    all have a name among the model's is numbered by these, too; without ``class_map``, other names cause a warning.

    Args:
        model: The model that is to be evaluated.
        samples: Samples to draw at random, always the same; by default all, in order.
        image_mode: Pillow's mode; by default RGB, or L for a model of one channel.
        shard: Part of the samples that this process loads; by default all.

    Other arguments as for :func:`open_dataset`.

    Raises:
        ValueError: If the data set is empty, its first sample cannot be read, the images have another number of
            channels than the model takes, or it is a stream and samples are to be drawn or divided among processes.
    """
    config = data_config(model)
    image_mode = image_mode or ("L" if model.in_chans == 1 else "RGB")
    if Image.getmodebands(image_mode) != model.in_chans:
        raise ValueError(
            f"image_mode is {image_mode!r}, but the model takes {model.in_chans} channels; give a mode of as many."
        )
    options: dict[str, Any] = dict(
        input_key=input_key,
        target_key=target_key,
        image_mode=image_mode,
        batch_size=batch_size,
        num_samples=num_samples,
        trust_remote_code=trust_remote_code,
    )
    stream = is_stream(dataset)
    if stream and shard.processes > 1:
        raise ValueError(
            f"{dataset!r} is a stream, which cannot be divided among {shard.processes} processes to the last sample; "
            "start one process, or give hfds/ or a folder."
        )
    given, by_name = class_map is not None, False
    try:
        if not dataset and not given:
            class_map, by_name = _known_classes(model, root, split)
        data = open_dataset(dataset, root, split, class_map=class_map, **options)
        subset = data if isinstance(data, Subset) else None
        whole: Any = data if subset is None else subset.dataset
        if dataset and not given:
            by_name = _number_by_name(model, whole)
        if stream:  # another one is tried: a reader that was iterated here would give each worker all of its shards
            next(iter(open_dataset(dataset, root, split, class_map=class_map, **options)))
        else:
            _check_channels(model, data[0][0], dataset)
    except (*_READ_ERRORS, StopIteration) as error:
        columns = f", columns {input_key!r} and {target_key!r}" if dataset else ""
        raise ValueError(
            f"Cannot read an image and its label from data set {dataset!r}, root {root!r}, split {split!r}{columns} "
            f"({type(error).__name__}: {error}): give those it has."
        ) from error
    where = f"{dataset or root}, split {split}"
    if not dataset:
        folder = _folder(root, split.partition("[")[0])
        warn_of_other_images(folder, "Convert them to PNG or JPEG; timm, with train.py, leaves them out, too.")
    if not by_name:
        _warn_of_other_classes(model, class_indices(data), where, by_names=not given)
    if given:
        _warn_of_other_numbers(model, class_indices(data), where)
    if not dataset and given:
        _warn_of_images_left_out(class_indices(open_dataset("", root, split, input_key)), class_indices(data), where)
    if subset is not None:
        _warn_of_a_slice_without_classes(subset, where)
    loader = create_loader(
        whole,  # its transform is set
        input_size=config["input_size"],
        batch_size=batch_size,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=workers,
        persistent_workers=False,
    )
    if samples is not None:
        if isinstance(loader.dataset, IterableDataset):
            raise ValueError(f"{dataset!r} is a stream, of which samples cannot be drawn; give hfds/ or a folder.")
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:samples].tolist()
        subset = Subset(data, chosen)
    if shard.processes > 1:
        samples_of_all: Any = data if subset is None else subset
        subset = Subset(samples_of_all, shard.indices(len(samples_of_all), batch_size))
    if stream:
        return _Counted(loader, f"{dataset}, split {split}")  # type: ignore[return-value]
    if subset is None:
        return loader
    return torch.utils.data.DataLoader(subset, batch_size, num_workers=workers)


def _check_channels(model: MultiExitModel, image: Any, dataset: str) -> None:
    """Raise ``ValueError`` if a data set's first image, which torchvision does not convert, does not fit the model."""
    bands = len(image.getbands()) if isinstance(image, Image.Image) else model.in_chans
    if bands != model.in_chans:
        raise ValueError(
            f"The images of {dataset} have {bands} channels, but the model takes {model.in_chans}, and timm does not "
            f"convert those of torch/; create the model with in_chans={bands}."
        )


class _Counted:
    """Loader of a stream that warns if it gave another number of samples than the data set says it has.

    timm's reader of ``wds/`` leaves out samples that it cannot read, and only logs it.
    """

    def __init__(self, loader: "DataLoader", where: str) -> None:
        self.loader, self.where, self.dataset = loader, where, loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        read = 0
        for batch in self.loader:
            read += len(batch[1])
            yield batch
        stated = getattr(getattr(self.dataset, "reader", None), "num_samples", None)
        if stated and stated != read:
            warnings.warn(
                f"{self.where} gave {read} samples but states {stated}: some could not be read, or the stated number "
                "is wrong. Figures are those of the samples read.",
                stacklevel=2,
            )


def _known_classes(model: MultiExitModel, root: str | None, split: str) -> tuple[dict[str, int] | None, bool]:
    """Numbers of a folder's classes, and whether the model's names or ImageNet's synsets gave them.

    Otherwise they are those of the training split beside it, where that has all of them.
    """
    own = class_indices(open_dataset("", root, split))
    synsets = ImageNetInfo().label_names() if model.num_classes == 1000 else []
    for known in (given_labels(model), synsets):
        names = _unique(known)
        if own and own.keys() <= names.keys():
            return names, True
    try:
        training = class_indices(open_dataset("", root, "train"))
    except (ValueError, RuntimeError):
        return own, False
    return (training if own and training and own.keys() <= training.keys() else own), False


def _number_by_name(model: MultiExitModel, data: Any) -> bool:
    """Number a data set's classes as the model does, if it has a name for each; return whether it has."""
    own, names = class_indices(data), _unique(given_labels(model))
    if not own or not own.keys() <= names.keys():
        return False
    numbers = {index: names[name] for name, index in own.items()}
    if any(index != number for index, number in numbers.items()):
        data.target_transform = numbers.__getitem__  # timm's and torchvision's data sets call it
    return True


def _unique(names: Sequence[str]) -> dict[str, int]:
    """Index of each name that one class alone has."""
    times = Counter(names)
    return {name: index for index, name in enumerate(names) if times[name] == 1}


def _warn_of_other_classes(
    model: MultiExitModel, indices: Mapping[str, int] | None, where: str, by_names: bool
) -> None:
    if not indices:
        return
    labels, count = given_labels(model), len(set(indices.values()))
    if count != model.num_classes:
        warnings.warn(
            f"The model predicts {model.num_classes} classes, but {where} has {count}: accuracy means nothing unless "
            "the first of them are the same.",
            stacklevel=3,
        )
    elif by_names and labels and indices != {str(i): i for i in range(count)}:  # numbers name nothing
        other = [(index, name) for name, index in indices.items() if labels[index] != name]
        if other:
            index, name = min(other)
            warnings.warn(
                f"{where} has other names of classes than the model, e.g. {name!r} for {labels[index]!r}, its class "
                f"{index}: accuracy means nothing unless they mean the same.",
                stacklevel=3,
            )


def _warn_of_other_numbers(model: MultiExitModel, indices: Mapping[str, int] | None, where: str) -> None:
    names = _unique(given_labels(model))
    if not indices or not indices.keys() <= names.keys():
        return
    if other := sorted(name for name, index in indices.items() if names[name] != index):
        warnings.warn(
            f"{where}: the class map makes {other[0]!r} class {indices[other[0]]}, of the model it is class "
            f"{names[other[0]]}: accuracy means nothing. Leave the class map out.",
            stacklevel=3,
        )


def _warn_of_images_left_out(own: Mapping[str, int] | None, indices: Mapping[str, int] | None, where: str) -> None:
    if own and indices and (unknown := sorted(own.keys() - indices.keys())):
        warnings.warn(
            f"{where}: images of {', '.join(map(repr, unknown[:5]))}{', …' if len(unknown) > 5 else ''} are left out, "
            "because the class map, or the training split that numbers the classes, has no such class.",
            stacklevel=3,
        )


def _warn_of_a_slice_without_classes(subset: Subset, where: str) -> None:
    """Warn of classes that a folder has and a slice of it lacks: its images are in the order of their classes."""
    reader = getattr(subset.dataset, "reader", subset.dataset)
    if not isinstance(reader, ReaderImageFolder | ImageFolder):
        return
    classes, there = {target for _, target in reader.samples}, {reader.samples[i][1] for i in subset.indices}
    if there != classes:
        warnings.warn(
            f"{where} has images of only {len(there)} of the folder's {len(classes)} classes, because a folder is "
            "sorted by class; to divide a folder, make a folder of each part.",
            stacklevel=3,
        )
