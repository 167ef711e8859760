"""Evaluating: eval mode for a while, forward passes without data, and checks of what comes in."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .model import MultiExitModel

BATCH = 7  # of what is tried without data; prime, so that no other axis is taken for it


@contextmanager
def without_data(backbone: nn.Module, input_size: Sequence[int]) -> Iterator[torch.Tensor]:
    """Evaluate on a batch of images that has a shape only; nothing is computed, and what modules note is undone."""
    parameter = next(backbone.parameters())
    before = [(module.__dict__, module.__dict__.copy(), _copies(module)) for module in backbone.modules()]
    backbone.eval()
    _LOG.addFilter(_never)  # what does not fit is told by an error, and logged on the way
    try:
        # Parameters on the meta device are without data as they are, and much faster so.
        shapes_only = nullcontext() if parameter.is_meta else FakeTensorMode(allow_non_fake_inputs=True)
        with shapes_only, torch.no_grad():
            yield torch.empty(BATCH, *input_size, device=parameter.device, dtype=parameter.dtype)
    finally:
        _LOG.removeFilter(_never)
        for attributes, values, tables in before:
            attributes.clear()
            attributes.update(values)
            for table, entries in tables:
                table.clear()
                table.update(entries)


def _copies(module: nn.Module) -> list[tuple[dict, dict]]:
    """A module's buffers and other tables, where some keep what they computed for the last size, and their entries."""
    return [(value, value.copy()) for value in module.__dict__.values() if isinstance(value, dict)]


_LOG = logging.getLogger("torch._subclasses.fake_tensor")


def _never(record: logging.LogRecord) -> bool:
    return False


def require_exits(model: nn.Module) -> None:
    """Raise ``ValueError`` unless ``model`` has exits."""
    if not hasattr(model, "forward_exits"):  # a compiled one has, though of another class
        raise ValueError(f"{type(model).__name__} has no exits; create one of the models that 'timm-dfs list' names.")


def as_images(model: MultiExitModel, x: torch.Tensor) -> torch.Tensor:
    """``x`` on the model's device and in its type.

    Raises:
        ValueError: Unless ``x`` is a floating-point batch (B, in_chans, H, W).
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x is a {type(x).__name__}; give a tensor (B, {model.in_chans}, H, W).")
    if x.ndim != 4 or x.shape[1] != model.in_chans or 0 in x.shape[2:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; give a batch of images (B, {model.in_chans}, H, W).")
    if not x.is_floating_point():
        raise ValueError(f"x holds {x.dtype}; give images normalised as the model's pretrained_cfg says.")
    return x.to(next(model.parameters()))


_MODES = threading.RLock()


def _in_training(model: nn.Module) -> list[nn.Module]:
    """The modules that are in training mode; ``modules()`` takes as long as an early exit of one image."""
    every: list[nn.Module] = [model]
    for module in every:
        every.extend(part for part in module._modules.values() if part is not None)
    return [module for module in every if module.training]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode for the duration; every module gets its own mode back.

    A model that is in eval mode already is not touched, and threads may share it. With one in training mode, threads
    take turns.
    """
    with _MODES:
        training = _in_training(model)
        for module in training:
            module.training = False
        if training:
            try:
                yield
            finally:
                for module in training:
                    module.training = True
            return
    yield
