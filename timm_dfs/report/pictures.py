"""Images by the exit that they took."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..base.model import MultiExitModel
from ..data.images import as_pictures
from ..inference.policy import ExitPolicy

LARGEST = 96
"""Largest height and width of a displayed image, in pixels."""


@dataclass(frozen=True)
class Picture:
    """An image of the data set and its prediction.

    Attributes:
        source: Data URI of the image.
        predicted: Predicted class.
        truth: Class of the image.
        right: Whether the two are the same.
    """

    source: str
    predicted: str
    truth: str
    right: bool


@dataclass(frozen=True)
class ExitPictures:
    """Images that took one exit.

    Attributes:
        exit_index: Index of the exit.
        samples: Number of samples that took it.
        pictures: Some of them, drawn at random.
    """

    exit_index: int
    samples: int
    pictures: tuple[Picture, ...]


def strip(
    model: MultiExitModel,
    dataset: Any,
    logits: torch.Tensor,
    policy: ExitPolicy,
    labels: Sequence[str],
    each: int = 12,
) -> list[ExitPictures]:
    """For each exit some of the images that took it, drawn at random with a fixed seed.

    Args:
        model: Network that the images were prepared for.
        dataset: Function from an index to an image, normalised (C, H, W), and its target, in the order of ``logits``.
        logits: The exits' own logits (E, N, C).
        policy: Policy that chooses the exits and predicts.
        labels: Names of the classes.
        each: Largest number of images per exit.
    """
    exit_index, predictions = policy.exit_index(logits), policy.predicted(logits).argmax(-1)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for k in range(len(logits)):
        taken = (exit_index == k).nonzero()[:, 0]
        chosen = taken[torch.randperm(len(taken), generator=generator)[:each]].tolist()
        pictures = []
        for i in chosen:
            image, target = dataset[i]
            (picture,) = as_pictures(model, image[None])
            predicted, truth = int(predictions[k, i]), int(target)
            pictures.append(Picture(data_uri(picture), labels[predicted], labels[truth], predicted == truth))
        rows.append(ExitPictures(k, len(taken), tuple(pictures)))
    return rows


def data_uri(picture: Image.Image) -> str:
    """Data URI of a picture as PNG, at most :data:`LARGEST` pixels high and wide."""
    small = picture.copy()
    small.thumbnail((LARGEST, LARGEST))
    file = io.BytesIO()
    small.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
