"""Names of splits: what ``train.py`` reads where it is given one, and whether two of them overlap."""

import math
import re

from timm.data.dataset_factory import _EVAL_SYNONYM, _TRAIN_SYNONYM

TORCHVISION = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
"""Data sets of torchvision with two splits: timm takes every name but train and training for the test split."""

FOLDERS = ("folder", "image_folder")
"""Names by which torchvision reads a folder of class folders."""

_SPLIT = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<start>-?\d*%?):(?P<stop>-?\d*%?)\])?")


def read_by_train(dataset: str, split: str) -> str:
    """The split that ``train.py`` reads where it is given ``split``.

    Of folders timm leaves a slice out. Of torchvision's data sets it reads a slice of any split, ``train[:45000]``
    too, as the whole test split.

    Args:
        dataset: As ``train.py --dataset``.
        split: As ``--train-split`` or ``--val-split``.
    """
    name = _of_torchvision(dataset)
    if name in TORCHVISION:
        return "train" if split in _TRAIN_SYNONYM else "test"
    return split.partition("[")[0] if not dataset or name in FOLDERS else split


def standard(dataset: str, split: str) -> str:
    """A split by one name for all by which timm finds it: of torchvision's data sets ``train`` or ``test``."""
    parsed = _SPLIT.fullmatch(split)
    if parsed is None or _of_torchvision(dataset) not in TORCHVISION:
        return split
    return ("train" if parsed["name"] in _TRAIN_SYNONYM else "test") + split[len(parsed["name"]) :]


def _of_torchvision(dataset: str) -> str | None:
    """Name of a data set that timm opens with torchvision; ``None`` for others."""
    kind, _, name = dataset.lower().partition("/")
    return name.rpartition("/")[2] if kind == "torch" else None


def overlap(first: str, second: str) -> bool | None:
    """Whether two splits of one data set, e.g. ``train[:45000]`` and ``train[44000:]``, share samples.

    Args:
        first: A split, or several joined by ``+``.
        second: Another.

    Returns:
        ``None`` where the names alone do not show it: ends counted in different ways (from the start, from the end, in
        percent).
    """
    if "+" in first or "+" in second:
        found = {overlap(one.strip(), other.strip()) for one in first.split("+") for other in second.split("+")}
        return True if True in found else None if None in found else False
    parsed = [_SPLIT.fullmatch(split) for split in (first, second)]
    if parsed[0] is None or parsed[1] is None:
        return None
    names = [_folder(match["name"]) for match in parsed if match]
    if names[0] != names[1]:
        return False
    ends = [(match["start"] or "", match["stop"] or "") for match in parsed if match]
    given = [text for pair in ends for text in pair if text]
    kinds = {(text.startswith("-"), text.endswith("%")) for text in given}
    if len(kinds) > 1:
        return None
    from_end = any(negative for negative, _ in kinds)
    lowest, highest = (-math.inf, 0) if from_end else (0, math.inf)
    starts = [int(start.rstrip("%")) if start else lowest for start, _ in ends]
    stops = [int(stop.rstrip("%")) if stop else highest for _, stop in ends]
    return max(starts) < min(stops)


def _folder(name: str) -> str:
    """One name for all by which timm finds the same folder."""
    return "train" if name in _TRAIN_SYNONYM else "validation" if name in _EVAL_SYNONYM else name
