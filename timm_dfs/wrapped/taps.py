"""Hooks that read and replace module outputs during a backbone's own forward pass."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..base.partition import Onward
from ..base.rows import take
from .active_samples import ActiveSamples

ExitHandler = Callable[[int, torch.Tensor], tuple[Onward, "torch.Tensor | None"]]
"""Called as ``at_exit(exit_index, feature)`` at an exit point. Returns the feature for the deeper layers, and the rows
of the batch that it keeps (``None``: all)."""


class Stop(Exception):
    """Ends a forward pass at an exit point, because no deeper layer is needed."""


class _PerThread(threading.local):
    at_exit: ExitHandler | None = None
    active: ActiveSamples | None = None


class ForwardState:
    """State of the current forward pass, one for each thread, so that threads can share a model.

    Copies and pickles of a model start without a forward pass.

    Args:
        replay: Handles the exit points of layers that gradient checkpointing runs again in the backward pass.
    """

    def __init__(self, replay: ExitHandler):
        self._replay = replay
        self._eager = _PerThread()
        self._traced: ExitHandler | None = None  # torch.compile and torch.export do not support thread-local state

    def __getstate__(self) -> dict[str, Any]:
        return dict(_replay=self._replay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_replay"])  # type: ignore[misc]

    @contextmanager
    def running(self, at_exit: ExitHandler, active: ActiveSamples | None = None) -> Iterator[None]:
        """Let every exit point call ``at_exit``; ``active`` holds the samples that have not exited."""
        if torch.compiler.is_compiling():
            self._traced = at_exit
            try:
                yield
            finally:
                self._traced = None
        else:
            before = self._eager.at_exit, self._eager.active
            self._eager.at_exit, self._eager.active = at_exit, active
            try:
                yield
            finally:
                self._eager.at_exit, self._eager.active = before

    @property
    def at_exit(self) -> ExitHandler | None:
        """The handler to call at exit points; ``None`` outside :meth:`running`."""
        if torch.compiler.is_compiling():
            return self._traced
        if self._eager.at_exit is None and torch._C._current_graph_task_id() != -1:
            return self._replay  # in a backward pass: gradient checkpointing runs a part of the forward pass again
        return self._eager.at_exit

    @property
    def active(self) -> ActiveSamples | None:
        """The active samples; ``None`` in compiled code, where no sample exits early."""
        return None if torch.compiler.is_compiling() else self._eager.active


class SelectActive:
    """Forward pre-hook, with keyword arguments, that removes exited samples from a module's inputs."""

    def __init__(self, state: ForwardState):
        self.state = state

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        active = self.state.active
        return None if active is None else (active.select(args), active.select(kwargs))


class RestoreBatch:
    """Forward hook that restores the original batch size after a module, for code that relies on it."""

    def __init__(self, state: ForwardState):
        self.state = state

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        active = self.state.active
        return None if active is None else active.restore(output)


class Tap:
    """Forward hook of the module at an exit point. An object, not a closure, so that a copied model gets its own.

    Args:
        exit_index: Index of the exit.
        state: State of the forward pass.
        element: Index of the feature where the module returns several values. The other tensors are batches too,
            perhaps with several rows for each sample.
    """

    def __init__(self, exit_index: int, state: ForwardState, element: int = 0):
        self.exit_index = exit_index
        self.state = state
        self.element = element

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        at_exit = self.state.at_exit
        if at_exit is None:
            return None
        if not isinstance(output, (list, tuple)):  # a tensor or, in symbolic tracing, an FX proxy
            return at_exit(self.exit_index, output)[0]
        feature = output[self.element]
        onward, rows = at_exit(self.exit_index, feature)
        parts = [
            _rows_of(part, rows, len(feature)) if rows is not None and isinstance(part, torch.Tensor) else part
            for part in output
        ]
        parts[self.element] = onward
        return type(output)(parts)


def _rows_of(part: torch.Tensor, rows: torch.Tensor, batch: int) -> torch.Tensor:
    return take(part, rows) if len(part) == batch else part.unflatten(0, (batch, -1))[rows].flatten(0, 1)


def last_called(module: nn.Module) -> nn.Module:
    """The module to hook for the output of ``module``: the last layer of a sequence, else ``module`` itself.

    timm's gradient checkpointing calls the layers of a sequence, not the sequence.
    """
    while type(module).forward is nn.Sequential.forward and len(module) > 0:  # type: ignore[arg-type]
        module = module[-1]
    return module


def is_tapped(module: nn.Module) -> bool:
    """Whether the module or one of its submodules has a :class:`Tap`."""
    return any(isinstance(hook, Tap) for part in module.modules() for hook in part._forward_hooks.values())
