"""From image files and data sets to batches, prepared as a model's pretrained config says."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_dataset, create_loader, create_transform, resolve_model_data_config

from .multi_exit import MultiExitModel

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


def open_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, upright; transparency over white, 16-bit values scaled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image, is damaged, or holds values that are not 8 or 16 bit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no image {path}; check the path.")
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), path)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow can read; convert it to PNG or JPEG.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is damaged or too large ({error}); save it again.") from error


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"{path} holds values from {values.min()} to {values.max()}; give 8 or 16 bits per channel."
            )
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError(f"{path} holds floating-point values; give 8 or 16 bits per channel.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def prepare(model: MultiExitModel, images: list[Image.Image]) -> torch.Tensor:
    """A batch (B, C, H, W) from RGB images, resized, cropped and normalised for ``model``, on its device."""
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    if config["input_size"][0] == 1:
        images = [image.convert("L") for image in images]
    return torch.stack([transform(image) for image in images]).to(next(model.parameters()))


def dataset_loader(
    model: MultiExitModel,
    dataset: str,
    root: str | None,
    split: str,
    input_key: str | None,
    target_key: str | None,
    batch_size: int,
    workers: int,
) -> "DataLoader":
    """timm's evaluation loader over a data set, named as in timm's ``train.py``.

    Raises:
        ValueError: If the data set is empty or its first sample cannot be read.
    """
    try:
        data = create_dataset(
            dataset, root=root, split=split, is_training=False, input_key=input_key, target_key=target_key
        )
        data[0]
    except (KeyError, IndexError, TypeError, AssertionError) as error:
        raise ValueError(
            f"Cannot read an image and its label from {dataset}, split {split!r}, columns {input_key!r} and "
            f"{target_key!r}: give those it has."
        ) from error
    config = resolve_model_data_config(model)
    return create_loader(
        data,
        input_size=config["input_size"],
        batch_size=batch_size,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        num_workers=workers,
        persistent_workers=False,
    )
