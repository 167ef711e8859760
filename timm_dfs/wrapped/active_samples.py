"""The active samples of a batch, for backbones whose deeper layers read more than the feature at an exit point."""

from typing import Any

import torch

from ..base.rows import take


class ActiveSamples:
    """The samples of a batch that have not exited, and their rows in tensors made before others exited.

    The batch shrinks at every exit that a sample takes, so the size of a tensor's first axis tells when it was made.
    """

    def __init__(self) -> None:
        self._samples: dict[int, torch.Tensor] = {}  # batch size: the samples' rows in the original batch, rising
        self._size: int | None = None

    def keep(self, batch: int, rows: torch.Tensor) -> None:
        """Keep only these rows, rising int64 indices, of a batch of this size."""
        if self._size is None:
            self._samples[batch] = torch.arange(batch, device=rows.device)
        self._size = len(rows)
        self._samples[self._size] = self._samples[batch][rows]

    def select(self, value: Any) -> Any:
        """Return ``value`` without the rows of samples that have exited, also inside lists, tuples and dicts."""
        if self._size is None:
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.select, value))
        if isinstance(value, dict):
            return {key: self.select(part) for key, part in value.items()}
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) == self._size:
            return value
        samples = self._samples.get(len(value))
        return value if samples is None else take(value, torch.searchsorted(samples, self._samples[self._size]))

    def restore(self, feature: torch.Tensor) -> torch.Tensor:
        """Return the feature in the original batch size, with zeros in the rows of samples that have exited."""
        if self._size is None:
            return feature
        restored = feature.new_zeros(max(self._samples), *feature.shape[1:])
        restored[self._samples[self._size]] = feature
        return restored
