"""Refusing to measure a choice on the data that it was made on.

Samples are recognised by their last exit's logits. Data sets share a few images, so 1 % of known samples is accepted.
Logits computed anew on another machine or in other batches differ in their last bits and are not recognised. Presets
hold no samples; the names of their data set and split are compared.
"""

import warnings
from collections.abc import Mapping, Set
from pathlib import Path

import torch

from ..data.splits import overlap, standard

ACCEPTED = 0.01
"""Share of known samples that is accepted."""


def fingerprints(logits: torch.Tensor) -> frozenset[bytes]:
    """Fingerprints of the samples whose logits (E, N, C) are given."""
    return frozenset(_rows(logits))


def refuse_seen(seen: Set[bytes], logits: torch.Tensor, name: str, chosen: str) -> None:
    """Refuse to measure a choice on samples that it was made on.

    Args:
        seen: Fingerprints of the samples that the choice was made on.
        logits: Logits (E, N, C) of the samples to measure on.
        name: What these samples are called in the error, e.g. ``"test"``.
        chosen: What was chosen, e.g. ``"the operating point"``.

    Raises:
        ValueError: If more than 1 % of the samples are among those seen.
    """
    rows = _rows(logits)
    known = sum(row in seen for row in rows)
    if known > ACCEPTED * len(rows):
        raise ValueError(
            f"{known} of the {len(rows)} {name} samples are among those that {chosen} was fitted or chosen on, which "
            "would flatter it; give other samples."
        )


def _rows(logits: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in logits[-1].detach().cpu().float().numpy()]


def refuse_fitted_split(presets: Mapping[str, dict], dataset: str, split: str) -> None:
    """Raise ``ValueError`` if one of the presets says that it was fitted on images of this split of this data set.

    Where it names a split that may share images with this one, but no data set, this is warned of.

    A folder ``/data/cifar100``, ``cifar100`` or ``torch/cifar100`` is taken for a copy of the Hub's
    ``uoft-cs/cifar100``, because it is called like it. A folder that exists is the same by each of its paths, and the
    split ``.`` of a folder ``data/val`` is the split ``val`` of the folder ``data``.
    """
    for name, preset in presets.items():
        source = preset.get("fitted_on", {})
        fitted = source.get("dataset") or "", source.get("split")
        if fitted[1] and (
            _overlap(fitted, (dataset, split)) or _overlap(as_named_split(*fitted), as_named_split(dataset, split))
        ):
            raise ValueError(
                f"The preset {name!r} was fitted on {fitted[1]} of {fitted[0] or dataset}, and its images in {split} "
                f"of {dataset} would flatter it; give a split without them."
            )
        if fitted[1] and not fitted[0] and overlap(standard(*fitted), standard(dataset, split)) is not False:
            warnings.warn(
                f"The preset {name!r} was fitted on a split {fitted[1]!r} of a data set that it does not name; if that "
                f"is {dataset}, images in {split} flatter it.",
                stacklevel=2,
            )


def _overlap(fitted: tuple[str, str], read: tuple[str, str]) -> bool:
    """Whether two splits, each with its data set, may share images."""
    return _same_data(fitted[0], read[0]) and overlap(standard(*fitted), standard(*read)) is not False


def as_named_split(dataset: str, split: str) -> tuple[str, str]:
    """A folder of class folders, which is read as split ``.``, as the split of its name in the folder around it."""
    name, bracket, ends = split.partition("[")
    if name != ".":
        return dataset, split
    folder = Path(located(dataset))
    return str(folder.parent), f"{folder.name}{bracket}{ends}"


def recorded(dataset: str) -> str:
    """A data set as presets record it: its name; of a folder the path given, or its name where that has none."""
    return dataset if Path(dataset).name not in ("", "..") else Path(dataset).resolve().name


def located(dataset: str) -> str:
    """A data set's name; of a folder that exists its absolute path, which is the same from every directory."""
    return str(Path(dataset).resolve()) if dataset and Path(dataset).is_dir() else dataset


def _same_data(fitted: str, read: str) -> bool:
    """Whether two names mean one data set: the same name, or its last part, if the places differ."""
    fitted, read = _without_kind(fitted), _without_kind(read)
    if _place(fitted) != "not told":  # a folder of that name here may be another one
        fitted = located(fitted)
    read = located(read)
    if _place(fitted) == _place(read):
        return fitted == read
    return Path(fitted).name.casefold() == Path(read).name.casefold()


def _without_kind(name: str) -> str:
    """A data set's name without timm's word for how it is read."""
    kind, slash, own = name.partition("/")
    return own if slash and kind.lower() in _KINDS else name


_KINDS = ("hfds", "hfids", "tfds", "wds", "torch")


def _place(name: str) -> str:
    """Where a data set is; results that were made on a folder hold only the last part of its path."""
    return "here" if Path(name).is_absolute() else "on the Hub" if "/" in name else "not told"


def is_test(split: str, dataset: str = "", root: str | None = None) -> bool:
    """Whether a split, e.g. ``"test"`` or ``"train+test[:500]"``, has test data, on which nothing may be chosen.

    Args:
        split: Name of the split, perhaps with a slice, or several joined by ``+``.
        dataset: timm's name of the data set. Of torchvision's with two splits, timm reads the test images for every
            split but train.
        root: Root of a folder; the split ``.`` of a folder called ``test`` is taken for test data.
    """
    if not dataset and root:
        split = as_named_split(root, split)[1]
    return "test" in {standard(dataset, part.strip()).partition("[")[0].strip() for part in split.split("+")}
