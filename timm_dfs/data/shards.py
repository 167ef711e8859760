"""Division of a data set among the processes that ``torchrun`` started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import distributed as dist


class Shard(NamedTuple):
    """Place of a process among those that share a data set.

    Attributes:
        rank: Number of the process, 0 … ``processes`` - 1.
        processes: Number of processes.
    """

    rank: int = 0
    processes: int = 1

    def indices(self, samples: int, batch_size: int) -> range:
        """Indices of this process's samples: consecutive whole batches, the same batches as in one process.

        The shards of all processes are disjoint and together hold every sample once, in order of rank.

        Raises:
            ValueError: If there are fewer batches than processes.
        """
        batches = -(-samples // batch_size)
        if batches < self.processes:
            raise ValueError(
                f"{samples} samples make {batches} batches of {batch_size}, fewer than the {self.processes} processes; "
                "start fewer processes or give a smaller --batch-size."
            )
        first, end = (batches * rank // self.processes * batch_size for rank in (self.rank, self.rank + 1))
        return range(first, min(end, samples))

    def gather(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the logits (E, n, C) and targets (n,) of all shards, both on the CPU, in the data set's order.

        Returns:
            Logits (E, N, C) and targets (N,) of all samples on process 0; on the others their own.
        """
        if self.processes == 1:
            return logits, targets
        parts: list = [None] * self.processes
        dist.gather_object((logits, targets), parts if self.rank == 0 else None)
        if self.rank > 0:
            return logits, targets
        return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts])


WHOLE = Shard()
"""The only shard of one process."""


def launched_processes() -> int:
    """Number of processes that ``torchrun`` started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextmanager
def sharded() -> Iterator[Shard]:
    """Join the processes that ``torchrun`` started, while the context lasts, and yield this process's shard.

    Only results on the CPU are exchanged, so the backend is gloo. Variables of SLURM are not read, unlike by timm's
    ``init_distributed_device``: under ``torchrun`` in a SLURM job they count tasks, not these processes.
    """
    if launched_processes() == 1:
        yield WHOLE
        return
    dist.init_process_group("gloo")
    try:
        yield Shard(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
