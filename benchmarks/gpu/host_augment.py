"""AutoAugment and its kind on the processor's cores, ahead of the training that reads the images.

Worker processes write an epoch's images into memory that they share with the training process, in the order in which
it will read them, while it trains on the epoch before. What an image becomes depends on seed, epoch and batch alone,
not on which worker took it: a resumed run sees what an uninterrupted one would have seen, and two runs of one seed see
the same.
"""

import mmap
import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode

Transform = Callable[[Image.Image], "torch.Tensor | Image.Image"]

CIFAR10_POLICY = "cifar10"
"""Name of AutoAugment's policy for CIFAR-10 (Cubuk et al., CVPR 2019), which timm has none of."""

_work: dict = {}
"""A worker's own: the images, the memory to fill, the transform."""


def host_transform(args, mean: tuple[float, ...], size: int) -> Transform | None:
    """What the processor does to an image: whatever the device does not. ``None`` for nothing.

    With ``args.pad`` set, the device crops and flips, and AutoAugment or RandAugment alone is left for here, with what
    an image leaves free filled as the padding is. Without, everything up to normalisation is timm's, as in
    ``train.py``.
    """
    if args.pad is not None:
        if args.aa == CIFAR10_POLICY:
            return AutoAugment(AutoAugmentPolicy.CIFAR10, InterpolationMode.NEAREST, [args.pad_value] * 3)
        if args.aa:
            raise ValueError(f"aa is {args.aa!r} and pad is set; take {CIFAR10_POLICY!r}, or train_crop_mode for pad.")
        return None
    return create_transform(
        size,
        is_training=True,
        use_prefetcher=True,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        mean=mean,
    )


class HostAugmentation:
    """Epochs of transformed images, each made while the one before is read.

    Workers are forked, so make it before the first use of a GPU.

    Args:
        images: Bytes (N, C, H, W).
        transform: From an image to one of the same size, or to its bytes (C, H, W).
        batch_size: Images in a batch.
        workers: Processes.
        seed: Of all that is random, with the epoch's and batch's number.

    Raises:
        ValueError: If there is no worker, or a GPU is in use already.
    """

    def __init__(self, images: np.ndarray, transform: Transform, batch_size: int, workers: int, seed: int):
        if workers < 1:
            raise ValueError(f"workers is {workers}; give at least 1 where images are transformed on the processor.")
        if torch.cuda.is_initialized():
            raise ValueError(
                "The GPU is in use already, which a forked worker does not survive; make the images first."
            )
        self.batch_size, self.seed = batch_size, seed
        # Anonymous memory instead of files under /dev/shm, which is often limited to less than an epoch.
        memory = mmap.mmap(-1, 2 * images.nbytes)
        slots = np.frombuffer(memory, np.uint8).reshape(2, *images.shape)
        self.slots = torch.from_numpy(slots)
        shared = dict(images=np.ascontiguousarray(images.transpose(0, 2, 3, 1)), slots=slots, transform=transform)
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (shared,))
        self.pool.submit(int).result()  # the workers are forked now
        self.ahead: dict[int, list[Future]] = {}

    def pin(self) -> bool:
        """Lock the memory, for asynchronous copies to the GPU; return whether that worked."""
        torch.cuda.cudart().cudaHostRegister(self.slots.data_ptr(), self.slots.nbytes, 0)
        if self.slots.is_pinned():
            return True
        with suppress(RuntimeError):  # the next call on the GPU reports the failure, which is none of its business
            torch.zeros((), device="cuda")
        return False

    def epoch(self, number: int, order: np.ndarray, next_order: np.ndarray | None) -> Iterator[torch.Tensor]:
        """Batches (B, C, H, W), bytes, of an epoch; the next one is begun. Copy them before that one's end.

        Args:
            number: The epoch's number, from 0.
            order: Indices of its images, a multiple of the batch size.
            next_order: Those of the next epoch; ``None`` if there is none.
        """
        futures = self.ahead.pop(number, None) or self._begin_epoch(number, order)
        self.ahead.clear()
        if next_order is not None:
            self.ahead[number + 1] = self._begin_epoch(number + 1, next_order)
        for batch, future in enumerate(futures):
            future.result()
            yield self.slots[number % 2, batch * self.batch_size : (batch + 1) * self.batch_size]

    def _begin_epoch(self, number: int, order: np.ndarray) -> list[Future]:
        batches = order.reshape(-1, self.batch_size)
        return [
            self.pool.submit(_fill, number % 2, batch * self.batch_size, indices, (self.seed, number, batch))
            for batch, indices in enumerate(batches)
        ]

    def close(self) -> None:
        """End the workers."""
        self.pool.shutdown(cancel_futures=True)


def _begin(shared: dict) -> None:
    torch.set_num_threads(1)  # the parent's threads were not forked with it
    _work.update(shared)


def _fill(slot: int, first: int, indices: np.ndarray, seeds: tuple[int, int, int]) -> None:
    """Transform the images of one batch."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    random.seed(seed)  # of the three, timm's transforms take two and torchvision's one
    np.random.seed(seed)
    torch.manual_seed(seed)
    images, slots, transform = _work["images"], _work["slots"], _work["transform"]
    for row, index in enumerate(indices, first):
        image = transform(Image.fromarray(images[index]))
        slots[slot, row] = image if isinstance(image, torch.Tensor) else np.asarray(image).transpose(2, 0, 1)
