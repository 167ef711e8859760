"""Published results of the same network on the same data set, drawn beside the measured ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """Published accuracy and cost of one network on one data set's test samples.

    Attributes:
        title: Network and data set.
        dataset: Name of the data set, lower case, letters and digits only.
        classes: Number of classes.
        epochs: Number of training epochs.
        source: Publication that the figures are taken from.
        cost: Description of the operations that the costs count.
        flops_M: Millions of multiply-adds up to and including each exit (E,).
        exits: Top-1 of each exit, percent, by method (E,).
        budgeted_batch_M: Mean cost in millions and top-1 in percent, by method.
    """

    title: str
    dataset: str
    classes: int
    epochs: int
    source: str
    cost: str
    flops_M: list[float]
    exits: dict[str, list[float]]
    budgeted_batch_M: dict[str, list[list[float]]]


def published_results(dataset: str, classes: int, flops: Sequence[float]) -> Published | None:
    """Published results of a network, recognised by its costs, on a data set, recognised by its name; else ``None``.

    Args:
        dataset: Name or path of the data set, as in ``--dataset``.
        classes: Number of classes of the network.
        flops: ``exit_flops(model)``. It counts batch norm where published figures count ReLU and pooling, so costs
            match if they differ by less than 1 %.
    """
    name = plain_name(dataset)
    for entry in json.loads(_FILE.read_text()):
        found = Published(**entry)
        if found.dataset == name and found.classes == classes and len(found.flops_M) == len(flops):
            if all(abs(ours / (1e6 * theirs) - 1) < 0.01 for ours, theirs in zip(flops, found.flops_M)):
                return found
    return None


def plain_name(dataset: str) -> str:
    """The last part of a data set's name or path, in small letters and digits: ``cifar100`` of ``data/CIFAR-100``."""
    return "".join(filter(str.isalnum, Path(dataset).name.lower()))
