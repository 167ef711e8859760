"""Reading and replacing a module's output in the middle of somebody else's forward pass."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..base.partition import Onward
from ..base.rows import take
from .remaining import Remaining

Arrival = Callable[[int, torch.Tensor], tuple[Onward, "torch.Tensor | None"]]
"""Called as ``arrive(exit_index, feature)`` at an exit point; returns what goes on to the deeper layers in its place,
and which rows of the batch that is (``None``: all)."""


class Stop(Exception):
    """Ends a forward pass that nobody needs the rest of."""


class _PerThread(threading.local):
    arrive: Arrival | None = None
    remaining: Remaining | None = None


class Visit:
    """Who is on a forward pass now. Each thread has its own, so that several may use one model.

    Copies and pickles of a model have nobody on the way.
    """

    def __init__(self, replay: Arrival):
        self._replay = replay
        self._eager = _PerThread()
        self._traced: Arrival | None = None  # torch.compile and torch.export know no threads

    def __getstate__(self) -> dict[str, Any]:
        return dict(_replay=self._replay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_replay"])  # type: ignore[misc]

    @contextmanager
    def by(self, arrive: Arrival, remaining: Remaining | None = None) -> Iterator[None]:
        """For the duration, every exit point calls ``arrive``; ``remaining`` says who has left."""
        if torch.compiler.is_compiling():
            self._traced = arrive
            try:
                yield
            finally:
                self._traced = None
        else:
            before = self._eager.arrive, self._eager.remaining
            self._eager.arrive, self._eager.remaining = arrive, remaining
            try:
                yield
            finally:
                self._eager.arrive, self._eager.remaining = before

    @property
    def current(self) -> Arrival | None:
        if torch.compiler.is_compiling():
            return self._traced
        if self._eager.arrive is None and torch._C._current_graph_task_id() != -1:
            return self._replay  # gradient checkpointing runs a piece of the forward pass again, in the backward pass
        return self._eager.arrive

    @property
    def remaining(self) -> Remaining | None:
        """Who has not left; nobody leaves what is compiled."""
        return None if torch.compiler.is_compiling() else self._eager.remaining


class CatchUp:
    """Forward pre-hook, with keyword arguments, of a module that is given what was made before samples left."""

    def __init__(self, visit: Visit):
        self.visit = visit

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        remaining = self.visit.remaining
        return None if remaining is None else (remaining.catch_up(args), remaining.catch_up(kwargs))


class MakeWhole:
    """Forward hook of a module after which the network counts on the batch that it began with."""

    def __init__(self, visit: Visit):
        self.visit = visit

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        remaining = self.visit.remaining
        return None if remaining is None else remaining.whole(output)


class Tap:
    """Forward hook of the module at an exit point; an object, not a closure, so that copies of a model have their own.

    Args:
        exit_index: Which exit.
        visit: Who is on the way.
        element: Where a module puts out several things, which of them is the feature. Of the others, tensors are
            batches, too, perhaps with several rows for each sample.
    """

    def __init__(self, exit_index: int, visit: Visit, element: int = 0):
        self.exit_index = exit_index
        self.visit = visit
        self.element = element

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        arrive = self.visit.current
        if arrive is None:
            return None
        if not isinstance(output, (list, tuple)):  # a tensor, or FX's stand-in for one
            return arrive(self.exit_index, output)[0]
        feature = output[self.element]
        onward, rows = arrive(self.exit_index, feature)
        parts = [
            _rows_of(part, rows, len(feature)) if rows is not None and isinstance(part, torch.Tensor) else part
            for part in output
        ]
        parts[self.element] = onward
        return type(output)(parts)


def _rows_of(part: torch.Tensor, rows: torch.Tensor, batch: int) -> torch.Tensor:
    return take(part, rows) if len(part) == batch else part.unflatten(0, (batch, -1))[rows].flatten(0, 1)


def last_called(module: nn.Module) -> nn.Module:
    """The module that puts out what ``module`` does and is called wherever its layers are: of a sequence, the last.

    Gradient checkpointing in timm calls the layers of a sequence, not the sequence.
    """
    while type(module).forward is nn.Sequential.forward and len(module) > 0:  # type: ignore[arg-type]
        module = module[-1]
    return module


def is_tapped(module: nn.Module) -> bool:
    """Whether any module in it has a :class:`Tap`."""
    return any(isinstance(hook, Tap) for part in module.modules() for hook in part._forward_hooks.values())
