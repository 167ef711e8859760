"""Batches of an epoch: which images, in which order, from where."""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from host_augment import HostAugmentation, Transform

_logger = logging.getLogger("gpu")


class Batches:
    """Shuffled batches of bytes and labels, the last incomplete one of an epoch dropped as in ``train.py``.

    Without a transform the images stay on the device; with one they come from worker processes.

    Args:
        images: Bytes (N, C, H, W).
        labels: Labels (N,).
        transform: What the processor does to each image; ``None``: nothing.
        batch_size: Images in a batch.
        workers: Processes for the transform.
        seed: Of the order and the transforms; epochs differ.
        epochs: How many epochs there will be.
        device: Where batches are wanted.

    Raises:
        ValueError: If there are fewer images than a batch takes.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        transform: Transform | None,
        batch_size: int,
        workers: int,
        seed: int,
        epochs: int,
        device: torch.device,
    ):
        if len(images) < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, but there are {len(images)} images only; take fewer a batch."
            )
        self.batch_size, self.seed, self.epochs, self.samples = batch_size, seed, epochs, len(images)
        self.host = None
        if transform is not None:
            self.host = HostAugmentation(images, transform, batch_size, workers, seed)
            if device.type == "cuda" and not self.host.pin():
                _logger.warning("The images' memory cannot be locked: each step waits for its copy of a batch.")
        else:
            self.images = torch.from_numpy(images).to(device)
        self.labels = torch.from_numpy(labels).to(device)

    def __len__(self) -> int:
        return self.samples // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Indices of an epoch's images."""
        shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.samples)
        return shuffled[: len(self) * self.batch_size]

    def epoch(self, number: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Images (B, C, H, W), bytes, and labels (B,) of each batch; the images may still be the processor's."""
        order = self.order(number)
        chosen = torch.from_numpy(order).to(self.labels.device).split(self.batch_size)
        if self.host is None:
            yield from ((self.images[indices], self.labels[indices]) for indices in chosen)
        else:
            following = self.order(number + 1) if number + 1 < self.epochs else None
            images = self.host.epoch(number, order, following)
            yield from ((batch, self.labels[indices]) for batch, indices in zip(images, chosen, strict=True))

    def close(self) -> None:
        """End the workers, if there are any."""
        if self.host is not None:
            self.host.close()
