"""Images: from files to batches, prepared as a model's pretrained config says, and back to pictures."""

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers.img_extensions import get_img_extensions

from ..base.model import MultiExitModel


def open_image(path: str | Path) -> Image.Image:
    """Open an image file as 8-bit RGB, upright; transparency over white, 16-bit values scaled.

    Args:
        path: File in a format that Pillow reads.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no image, is damaged, or holds values that are not 8 or 16 bit.

    Example:
        >>> import tempfile, timm_dfs
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("LA", (8, 6)).save(f"{folder}/grey.png")
        ...     timm_dfs.open_image(f"{folder}/grey.png").getpixel((0, 0))
        (255, 255, 255)
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
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ValueError(f"{path} holds {kind} values, whose range nothing tells; give 8 or 16 bits per channel.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def adapted(config: dict, channels: int) -> dict:
    """timm's preparation of images for a number of channels; other numbers of means and deviations are averaged.

    So do timm's loaders, hence ``train.py`` with ``--in-chans 1``.
    """
    values = {
        key: config[key] if len(config[key]) == channels else (sum(config[key]) / len(config[key]),) * channels
        for key in ("mean", "std")
    }
    return dict(config, input_size=(channels, *config["input_size"][1:]), **values)


TEST_PREPARATION = ("test_input_size", "test_crop_pct")
"""Fields of a ``pretrained_cfg`` by which timm's ``validate.py`` prepares images, instead of ``input_size`` and
``crop_pct``."""


def drop_test_preparation(config: dict) -> None:
    """Remove the size and crop that timm's ``validate.py`` would take instead of ``config``'s own.

    They are those of the weights that training started from.
    """
    for key in TEST_PREPARATION:
        config.pop(key, None)


def warn_of_other_images(folder: str | Path, remedy: str) -> None:
    """Warn of images in a folder, or in folders in it, that timm does not take for images, by their names."""
    readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = Counter(
        ending
        for _, _, names in os.walk(folder, followlinks=True)
        for name in names
        if (ending := os.path.splitext(name)[1].lower()) in readable and ending not in get_img_extensions(as_set=True)
    )
    if found:
        counts = ", ".join(f"{count} {ending}" for ending, count in sorted(found.items()))
        taken = ", ".join(get_img_extensions())
        warnings.warn(f"{folder} has files that are left out ({counts}): {taken} are read. {remedy}", stacklevel=3)


def data_config(model: MultiExitModel) -> dict:
    """timm's preparation of images for ``model``, whose number of channels may have been changed."""
    return adapted(resolve_model_data_config(model), model.in_chans)


def given_labels(model: MultiExitModel) -> tuple[str, ...]:
    """Names of the classes; none unless the ``pretrained_cfg`` has as many as the model has classes.

    timm takes a list of them, or a dict from the classes' numbers, as numbers or text, to their names.
    """
    names = model.pretrained_cfg.get("label_names") or ()
    if isinstance(names, Mapping):
        by_number = {str(number): name for number, name in names.items()}
        names = [by_number[str(k)] for k in range(len(names)) if str(k) in by_number]
    return tuple(names) if len(names) == model.num_classes else ()


def labels_of(model: MultiExitModel) -> tuple[str, ...]:
    """Names of the classes; their numbers unless the ``pretrained_cfg`` has as many names as the model has classes."""
    return given_labels(model) or tuple(map(str, range(model.num_classes)))


def prepare(model: MultiExitModel, images: list[Image.Image]) -> torch.Tensor:
    """Make a batch (B, C, H, W) of RGB images, resized, cropped and normalised for ``model``, on its device.

    Raises:
        ValueError: If the model takes another number of channels than 1 or 3.
    """
    if model.in_chans not in (1, 3):
        raise ValueError(f"The model takes {model.in_chans} channels; only RGB and grey images can be prepared for it.")
    config = data_config(model)
    transform = create_transform(**config, is_training=False)
    if model.in_chans == 1:
        images = [image.convert("L") for image in images]
    return torch.stack([transform(image) for image in images]).to(next(model.parameters()))


def as_pictures(model: MultiExitModel, images: torch.Tensor) -> list[Image.Image]:
    """Undo the normalisation of a batch (B, C, H, W) that was prepared for ``model``: RGB or grey pictures."""
    config = data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    pixels = ((images.float().cpu() * std + mean).clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()
    return [Image.fromarray(each[..., 0] if model.in_chans == 1 else each) for each in pixels]
