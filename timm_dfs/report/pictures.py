"""Images by the exit that answered them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..base.model import MultiExitModel
from ..data.images import as_pictures

LARGEST = 96
"""Pixels: images are shown no larger."""


@dataclass(frozen=True)
class Picture:
    """An image of the data set and what was answered.

    Attributes:
        source: The image as a data URI.
        answer: The class answered.
        truth: The class it has.
        right: Whether they are one.
    """

    source: str
    answer: str
    truth: str
    right: bool


@dataclass(frozen=True)
class Answered:
    """What one exit answered.

    Attributes:
        exit_index: The exit.
        samples: How many samples it answered.
        pictures: Some of them, drawn at random.
    """

    exit_index: int
    samples: int
    pictures: tuple[Picture, ...]


def strip(
    model: MultiExitModel,
    dataset: Any,
    logits: torch.Tensor,
    exit_index: torch.Tensor,
    labels: Sequence[str],
    each: int = 12,
) -> list[Answered]:
    """For each exit some of the images that it answered, drawn at random and always the same: nobody chose them.

    Args:
        model: The network that the images were prepared for.
        dataset: From an index to an image, normalised (C, H, W), and its target; in the order of ``logits``.
        logits: Logits (E, N, C).
        exit_index: The exit that answers each sample (N,).
        labels: Names of the classes.
        each: Most images of an exit.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for k in range(len(logits)):
        answered = (exit_index == k).nonzero()[:, 0]
        chosen = answered[torch.randperm(len(answered), generator=generator)[:each]].tolist()
        pictures = []
        for i in chosen:
            image, target = dataset[i]
            (picture,) = as_pictures(model, image[None])
            answer, truth = int(logits[k, i].argmax()), int(target)
            pictures.append(Picture(data_uri(picture), labels[answer], labels[truth], answer == truth))
        rows.append(Answered(k, len(answered), tuple(pictures)))
    return rows


def data_uri(picture: Image.Image) -> str:
    """A picture as PNG inside an address, at most :data:`LARGEST` pixels high and wide."""
    small = picture.copy()
    small.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    small.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
