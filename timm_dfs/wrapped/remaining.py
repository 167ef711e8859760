"""Rows of a batch: taking those that go on, and which they are, for networks that remember more than a feature."""

from typing import Any

import torch

from ..base.rows import take


class Remaining:
    """The images of a batch that have not left, and where they are in tensors made before others did.

    Batches get smaller with every exit that answers anyone, so a tensor's first axis tells when it was made.
    """

    def __init__(self) -> None:
        self._images: dict[int, torch.Tensor] = {}  # by batch size: which of the first batch, in order
        self._size: int | None = None

    def leave(self, batch: int, rows: torch.Tensor) -> None:
        """Of a batch of this size, only these rows go on, int64 indices in rising order."""
        if self._size is None:
            self._images[batch] = torch.arange(batch, device=rows.device)
        self._size = len(rows)
        self._images[self._size] = self._images[batch][rows]

    def catch_up(self, value: Any) -> Any:
        """``value`` without the rows of images that have left; in lists, tuples and dicts, too."""
        if self._size is None:
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.catch_up, value))
        if isinstance(value, dict):
            return {key: self.catch_up(part) for key, part in value.items()}
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) == self._size:
            return value
        images = self._images.get(len(value))
        return value if images is None else take(value, torch.searchsorted(images, self._images[self._size]))

    def whole(self, feature: torch.Tensor) -> torch.Tensor:
        """The feature with as many rows as the batch had at first; those of images that have left are zero."""
        if self._size is None:
            return feature
        every = feature.new_zeros(max(self._images), *feature.shape[1:])
        every[self._images[self._size]] = feature
        return every
