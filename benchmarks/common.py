"""Shared parts of the benchmarks: the methods, CIFAR-100 in memory, a training step, peak memory."""

import multiprocessing
import random
import resource
import time
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.task import ClassificationTask, LogitDistillationTask
from torch import nn

import timm_dfs

METHODS = {
    "joint": dict(beta="joint"),
    "DFS 0.1": dict(beta=0.1),
    "DFS 0.5": dict(beta=0.5),
    "DFS 0.9": dict(beta=0.9),
    "BYOT": dict(beta="joint", distill_weight=0.3, distill_feature_weight=0.03),
    "GE": dict(beta="joint", gradient_equilibrium=True),
    "PCGrad": dict(beta="joint", aggregator="PCGrad"),
    "CAGrad": dict(beta="joint", aggregator="CAGrad"),
    "Nash-MTL": dict(beta="joint", aggregator="NashMTL"),
    "MGDA": dict(beta="joint", aggregator="MGDA"),
    "AlignedMTL": dict(beta="joint", aggregator="AlignedMTL"),
    "UPGrad": dict(beta="joint", aggregator="UPGrad"),
}
"""Model arguments of each method. BYOT's weights are those of the official DFS code's ResNet recipe."""

HELD_OUT = 5000
"""Number of the last training images that are held out."""


def load(name: str) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """CIFAR-100's training images (N, 3, 32, 32), uint8, with their labels (N,); then the held-out ones.

    Args:
        name: Data set on the Hub, or a folder with its parquet files.
    """
    data = datasets.load_dataset(name, split="train")
    images = torch.from_numpy(np.stack([np.asarray(image) for image in data["img"]])).permute(0, 3, 1, 2)
    labels = torch.tensor(data["fine_label"])
    return (images[:-HELD_OUT], labels[:-HELD_OUT]), (images[-HELD_OUT:], labels[-HELD_OUT:])


def normaliser(model: timm_dfs.MultiExitModel):
    """Function that normalises uint8 images as the model's ``pretrained_cfg`` says."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return lambda images: ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The published augmentation: a random crop after padding by 4 pixels, and a horizontal flip of half the images."""
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), value=128)
    corners = torch.randint(9, (len(images), 2), generator=generator).tolist()
    crops = torch.stack([image[:, top : top + 32, left : left + 32] for image, (top, left) in zip(padded, corners)])
    flipped = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flipped[:, None, None, None], crops.flip(-1), crops)


class Augmentation:
    """What training does to a batch of images: the published augmentation, and more of timm's where a recipe asks.

    Args:
        normalise: Function of uint8 images, as :func:`normaliser` makes it.
        aa: RandAugment's configuration, as ``train.py`` takes it; ``None`` for none.
        reprob: Probability of erasing a rectangle of an image, set to the data set's mean.
    """

    def __init__(self, normalise, aa: str | None = None, reprob: float = 0.0):
        self.normalise = normalise
        as_timm = dict(translate_const=int(0.45 * 32), img_mean=(128, 128, 128))  # the latter is the published padding
        self.rand_augment = rand_augment_transform(aa, as_timm) if aa else None
        self.erase = RandomErasing(reprob, mode="const", device="cpu")

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        images = augment(images, generator)
        seed = int(torch.randint(2**31, (), generator=generator))  # timm draws from Python's and NumPy's generators
        random.seed(seed)
        np.random.seed(seed)
        if self.rand_augment:
            of_pil = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]
            augmented = np.stack([np.asarray(self.rand_augment(image)) for image in of_pil])
            images = torch.from_numpy(augmented).permute(0, 3, 1, 2)
        return self.erase(self.normalise(images))


class Trainer:
    """Training of a network batch by batch, with timm's task, SGD and one cycle of the learning rate.

    Momentum is Nesterov's, and goes from 0.95 to 0.85 and back as the rate rises and falls (torch's ``OneCycleLR``).

    Args:
        model: Name of a model, or a network whose outputs are the exits' logits.
        model_kwargs: Arguments of the model.
        lr: Largest learning rate.
        steps: Number of steps of the cycle.
        dtype: Data type of the computation (autocast).
        teacher: A trained network that teaches every exit; ``None`` for none.
        **teaching: Temperature and weights of its loss, as timm's task takes them.
    """

    PARTS = ("model", "optimizer", "schedule")

    def __init__(
        self,
        model: str | nn.Module,
        model_kwargs: dict,
        lr: float,
        steps: int,
        dtype: torch.dtype = torch.float32,
        teacher: nn.Module | None = None,
        **teaching: float,
    ):
        if isinstance(model, nn.Module):  # a network of the official code
            self.model, criterion = model, timm_dfs.ExitsLoss(nn.CrossEntropyLoss())
        else:
            self.model, criterion = timm.create_model(model, **model_kwargs), nn.CrossEntropyLoss()
        self.model.train().to(memory_format=torch.channels_last)
        if teacher is None:
            self.task = ClassificationTask(self.model, criterion, verbose=False)
        else:
            teacher.to(memory_format=torch.channels_last)
            self.task = LogitDistillationTask(self.model, teacher, criterion, verbose=False, **teaching)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=steps)
        self.dtype = dtype
        self.seconds: list[float] = []

    def step(self, x: torch.Tensor, target: torch.Tensor) -> None:
        start = time.perf_counter()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = self.task(x, target)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)

    def state_dict(self) -> dict:
        """State of network, optimizer and schedule, with which training goes on."""
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state: dict) -> None:
        """Take over what :meth:`state_dict` gave."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])


def peak_memory(
    model: str,
    model_kwargs: dict,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> int:
    """Peak memory in bytes of three training steps above that of the model, measured in a separate process."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(
        target=_measure_memory, args=(queue, model, model_kwargs, batch_size, dtype, memory_format)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"Measuring the memory of {model} with {model_kwargs} failed; see above.")
    return queue.get()


def _measure_memory(
    queue, model: str, model_kwargs: dict, batch_size: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    trainer = Trainer(model, model_kwargs, 0.1, 10, dtype)
    trainer.model.to(memory_format=memory_format)
    size = trainer.model.pretrained_cfg["input_size"]
    x = torch.randn(batch_size, *size).contiguous(memory_format=memory_format)
    target = torch.randint(trainer.model.num_classes, (batch_size,))
    before = _resident("VmRSS")
    for _ in range(3):
        trainer.step(x, target)
    queue.put(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    """A field of Linux's memory statistics of this process, in bytes; on other systems the peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])
