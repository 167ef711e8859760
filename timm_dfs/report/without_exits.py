"""Published results of networks without early exits, the alternatives at the same cost."""

import json
from dataclasses import dataclass
from pathlib import Path

from .published import plain_name

_FILE = Path(__file__).with_name("without_exits.json")


@dataclass(frozen=True)
class WithoutExits:
    """Published accuracy and cost of a network without early exits, trained on this data set from scratch.

    Attributes:
        dataset: Name of the data set, lower case, letters and digits only.
        classes: Number of classes.
        network: Name, with what is special in its training.
        flops_M: Millions of multiply-adds, as its source counts them.
        top1: Top-1 on the test samples, percent.
        source: GitHub repository that the figures are taken from.
    """

    dataset: str
    classes: int
    network: str
    flops_M: float
    top1: float
    source: str


def networks_without_exits(dataset: str, classes: int) -> tuple[WithoutExits, ...]:
    """Published results on a data set, recognised by its name and number of classes, from cheap to expensive.

    Args:
        dataset: Name or path of the data set, as in ``--dataset``.
        classes: Number of classes of the network.
    """
    name = plain_name(dataset)
    known = (WithoutExits(**entry) for entry in json.loads(_FILE.read_text()))
    return tuple(sorted((x for x in known if x.dataset == name and x.classes == classes), key=lambda x: x.flops_M))
