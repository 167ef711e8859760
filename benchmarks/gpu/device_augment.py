"""Augmentation of a whole batch at once, where the batch lies: no loop over images, no wait for the device.

Every function draws for each image of its own from torch's default generator of the images' device, has outputs of a
fixed shape and never asks the device for a value, so that a CUDA graph can hold it.
"""

import math

import torch
import torch.nn.functional as F

ERASE_ATTEMPTS = 10
"""Rectangles that timm's ``RandomErasing`` tries before it leaves an image as it is."""


def crop(images: torch.Tensor, pad: int, value: int) -> torch.Tensor:
    """Random crops of the images' own size from images padded on all sides.

    Args:
        images: Bytes (B, C, H, W).
        pad: Width of the padding in pixels; 0 gives the images back.
        value: The padding's value, 0 to 255.

    Raises:
        ValueError: If ``pad`` is negative or ``value`` is no byte.
    """
    if pad < 0 or not 0 <= value <= 255:
        raise ValueError(f"pad is {pad} and its value {value}; give at least 0 pixels and a value from 0 to 255.")
    if pad == 0:
        return images
    batch, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (pad, pad, pad, pad), value=value)
    top, left = torch.randint(2 * pad + 1, (2, batch, 1), device=device)
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    image = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def flip(images: torch.Tensor, probability: float) -> torch.Tensor:
    """Images (B, C, H, W), each mirrored left to right with a probability."""
    if probability == 0:
        return images
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(chosen, images.flip(-1), images)


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Bytes (B, C, H, W) as float32, in the order of operations of timm's prefetcher.

    Args:
        images: The bytes.
        mean: Mean of each channel, between 0 and 1: (C, 1, 1).
        std: Standard deviation of each channel, likewise.
    """
    return images.float().sub_(mean * 255).div_(std * 255)


def cutout(x: torch.Tensor, size: int) -> torch.Tensor:
    """Set a square of each image to 0, the mean of normalised images (DeVries and Taylor, arXiv 1708.04552).

    The centre is any pixel, so that a square at the edge is cut by it.

    Args:
        x: Normalised images (B, C, H, W).
        size: Side of the square in pixels, even; 0 gives the images back.

    Raises:
        ValueError: If ``size`` is odd or negative.
    """
    if size < 0 or size % 2:
        raise ValueError(f"The side of a cutout is {size}; give an even number of pixels, or 0 for none.")
    if size == 0:
        return x
    batch, _, height, width = x.shape
    middle = torch.stack([torch.randint(side, (batch,), device=x.device) for side in (height, width)])
    first = middle - size // 2
    return _without(x, first, torch.full_like(first, size))


def erase(
    x: torch.Tensor, probability: float, area: tuple[float, float] = (0.02, 1 / 3), aspect: float = 0.3
) -> torch.Tensor:
    """Set a rectangle of some images to 0: timm's ``RandomErasing`` of mode ``const``, one rectangle an image.

    Args:
        x: Normalised images (B, C, H, W).
        probability: Of an image to lose a rectangle.
        area: Least and largest area of it as a share of the image's.
        aspect: Least ratio of its height to its width; the largest is the inverse.
    """
    if probability == 0:
        return x
    batch, _, height, width = x.shape
    share, shape, place_y, place_x = torch.rand(4, ERASE_ATTEMPTS, batch, device=x.device)
    surface = (area[0] + (area[1] - area[0]) * share) * (height * width)
    ratio = torch.exp((2 * shape - 1) * math.log(1 / aspect))
    sizes = torch.stack([(surface * ratio).sqrt(), (surface / ratio).sqrt()]).round().long()  # (2, attempts, B)
    fits = (sizes[0] < height) & (sizes[1] < width)
    attempt = fits.int().argmax(0, keepdim=True)  # the first that fits, or 0 where none does
    sizes = sizes.gather(1, attempt.expand(2, 1, batch))[:, 0]
    place = torch.stack([place_y[0], place_x[0]])
    # Filled on the device: a copy from the host would not go into a graph.
    room = torch.cat([torch.full((1, 1), side + 1, device=x.device) for side in (height, width)])
    first = (place * (room - sizes)).long()
    chosen = fits.any(0) & (torch.rand(batch, device=x.device) < probability)
    return _without(x, first, sizes * chosen)


def _without(x: torch.Tensor, first: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Images with 0 in the rectangles that begin at ``first`` (2, B) and have ``sizes`` (2, B), rows before columns."""
    inside = []
    for axis, side in enumerate(x.shape[2:]):
        places = torch.arange(side, device=x.device) - first[axis][:, None]
        inside.append((places >= 0) & (places < sizes[axis][:, None]))
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)
