"""Early exit on photographs: exit taken, cost, and speed of a batch."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from .base.model import MultiExitModel
from .data.images import prepare
from .inference.policy import ExitPolicy
from .inference.prediction import predict, resolve_policy

MODEL = "dfs_msdnet_cifar100.joint"

PHOTOGRAPHS: dict[str, tuple[str, ...]] = {
    "chelsea": ("tabby", "tiger cat", "Egyptian cat"),
    "coffee": ("cup", "espresso"),
    "rocket": ("rocket", "missile"),
    "stereo_motorcycle": ("motorcycle", "moped"),
    "astronaut": ("woman",),
    "hubble_deep_field": (),
}
"""Photographs in scikit-image, and the classes of CIFAR-100 and ImageNet-1k that their subject belongs to."""


def subject(name: str, labels: Sequence[str]) -> list[str]:
    """The classes among ``labels`` that are right for one of :data:`PHOTOGRAPHS`; none if it shows no such class."""
    return [each for each in PHOTOGRAPHS[name] if each in labels]


def photographs() -> dict[str, Image.Image]:
    """Photographs of the demo by name, RGB.

    Raises:
        ModuleNotFoundError: If scikit-image is not installed.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The demo's photographs come from scikit-image: pip install 'timm-dfs[demo]'."
        ) from error
    images = {}
    for name in PHOTOGRAPHS:
        loaded = getattr(data, name)()
        images[name] = Image.fromarray(loaded[0] if isinstance(loaded, tuple) else loaded).convert("RGB")
    return images


def strip(images: Mapping[str, Image.Image], captions: Mapping[str, Sequence[str]], height: int = 240) -> Image.Image:
    """Pictures beside each other, of the same height, each with its lines of text below.

    Args:
        images: RGB pictures by name.
        captions: Lines of text by the same names.
        height: Height of the pictures, pixels.
    """
    font, gap, line = ImageFont.load_default(15), 8, 20
    text_width = max(font.getlength(text) for lines in captions.values() for text in lines)
    shown = {name: image.resize((round(image.width * height / image.height), height)) for name, image in images.items()}
    widths = {name: max(image.width, round(text_width)) + gap for name, image in shown.items()}
    lines = max(map(len, captions.values()))
    canvas = Image.new("RGB", (sum(widths.values()) + gap, height + 3 * gap + lines * line), "white")
    draw, left = ImageDraw.Draw(canvas), gap
    for name, image in shown.items():
        canvas.paste(image, (left, gap))
        for i, text in enumerate(captions[name]):
            draw.text((left, height + 2 * gap + i * line), text, "black", font)
        left += widths[name]
    return canvas


@dataclass(frozen=True)
class Throughput:
    """Images per second of the last exit alone and of early exit, on the same batch.

    Attributes:
        batch_size: Images in the batch.
        full: Images per second, last exit alone.
        early: Images per second, early exit.
        exit_counts: Number of images that took each exit.
    """

    batch_size: int
    full: float
    early: float
    exit_counts: tuple[int, ...]


def crops(images: list[Image.Image], batch_size: int, seed: int = 0) -> list[Image.Image]:
    """``batch_size`` random square crops of the images, half of them mirrored."""
    generator = torch.Generator().manual_seed(seed)
    views = []
    for i in range(batch_size):
        image = images[i % len(images)]
        share, left, top, mirror = torch.rand(4, generator=generator).tolist()
        side = round(min(image.size) * (0.6 + 0.4 * share))
        x, y = round(left * (image.width - side)), round(top * (image.height - side))
        view = image.crop((x, y, x + side, y + side))
        views.append(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror < 0.5 else view)
    return views


def measure(
    model: MultiExitModel, images: list[Image.Image], policy: ExitPolicy | str, batch_size: int = 64, repeats: int = 7
) -> Throughput:
    """Time early exit and the last exit alone on crops of ``images``: medians of alternating runs, in eval mode."""
    policy = resolve_policy(model, policy)
    x = prepare(model, crops(images, batch_size))
    model.eval()
    exit_index = predict(model, x, policy).exit_index
    seconds: dict[str, list[float]] = {"full": [], "early": []}
    for repeat in range(repeats + 1):  # the first run warms up
        for name, run in (("full", lambda: model(x)), ("early", lambda: predict(model, x, policy))):
            start = time.perf_counter()
            with torch.inference_mode():
                run()
            if repeat > 0:
                seconds[name].append(time.perf_counter() - start)
    return Throughput(
        batch_size=batch_size,
        full=batch_size / statistics.median(seconds["full"]),
        early=batch_size / statistics.median(seconds["early"]),
        exit_counts=tuple(torch.bincount(exit_index.cpu(), minlength=model.num_exits).tolist()),
    )
