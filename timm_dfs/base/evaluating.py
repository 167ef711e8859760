"""Evaluation of a model: eval mode for a limited time, checks of inputs, and forward passes on shapes alone."""

import logging
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from timm.utils import unwrap_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .caches import forget
from .model import MultiExitModel

BATCH = 7
"""Batch size of forward passes without data: a prime, so that no other axis has the same size."""

MOST_RESIZED = 3
"""Largest factor, without a warning, between the size of images and the size that the model was built for. Evaluation
at a somewhat larger size than in training is common (FixRes, arXiv 1906.06423)."""

MOST_BRIGHT = 10
"""Largest value of an image, without a warning, as a multiple of white's. White among values from 0 to 255 is 50 to 250
times as large."""

Result = TypeVar("Result")

_LOCKS: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()
"""One lock for each model, held while a model in training mode is evaluated."""

_LOCKS_CHANGE = threading.Lock()

_FAKE_TENSOR_LOG = logging.getLogger("torch._subclasses.fake_tensor")

_warned_of_size: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()

_warned_of_values: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode for the duration; afterwards every module is in the mode it was in.

    A model that is in eval mode already is left untouched, so threads may share it. A model in training mode is used by
    one thread at a time.
    """
    with _lock_of(model):
        training = _in_training(model)
        for module in training:
            module.training = False
        if training:
            try:
                yield
            finally:
                forget(model)  # in training, weights change
                for module in training:
                    module.training = True
            return
    yield


def _lock_of(model: nn.Module) -> Any:
    with _LOCKS_CHANGE:
        return _LOCKS.setdefault(unwrap_model(model), threading.RLock())  # a compiled model shares its modules


def _in_training(model: nn.Module) -> list[nn.Module]:
    """The modules in training mode. ``model.modules()`` would take as long as an early exit of one image."""
    every: list[nn.Module] = [model]
    for module in every:
        every.extend(part for part in module._modules.values() if part is not None)
    return [module for module in every if module.training]


def require_exits(model: nn.Module) -> None:
    """Raise ``ValueError`` unless ``model`` has exits; of a wrapper such as DataParallel, name the model inside."""
    if hasattr(model, "forward_exits"):  # not isinstance: a compiled model is of another class
        return
    kind = type(model).__name__
    if hasattr(getattr(model, "module", None), "forward_exits"):
        raise ValueError(f"{kind} only wraps a model with exits; give its .module.")
    raise ValueError(f"{kind} has no exits; create one of the models that 'timm-dfs list' names.")


def require_classes(model: nn.Module) -> None:
    """Raise ``ValueError`` if ``model`` has no classes, or a single logit, of which a softmax is always 1."""
    if model.num_classes < 1:
        raise ValueError(
            f"The model has num_classes={model.num_classes}: its outputs are pooled features, which have no "
            "confidence. Give it classes (reset_classifier), or call forward_exits for the features."
        )
    if model.num_classes == 1:
        raise ValueError(
            "The model has one logit: its softmax is 1 for every image, so that all images would leave at the first "
            "exit. Binary and multi-label classification are not supported; train two classes with a cross-entropy."
        )


def as_images(model: MultiExitModel, x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` on the model's device and in its data type.

    Warns once for each model if images are much larger or smaller than those it was built for, or if the values of the
    first are too large to be normalised as the model's ``pretrained_cfg`` says.

    Raises:
        ValueError: Unless ``x`` is a floating-point batch (B, in_chans, H, W).
    """
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x is a {type(x).__name__}; give a tensor (B, {model.in_chans}, H, W).")
    if x.ndim != 4 or x.shape[1] != model.in_chans or 0 in x.shape[2:]:
        raise ValueError(f"x has shape {tuple(x.shape)}; give a batch of images (B, {model.in_chans}, H, W).")
    if not x.is_floating_point():
        raise ValueError(f"x has data type {x.dtype}; give images normalised as the model's pretrained_cfg says.")
    _check_size(model, x.shape[2:])
    _check_values(model, x)
    return x.to(next(model.parameters()))


def _check_size(model: MultiExitModel, size: Sequence[int]) -> None:
    """Warn, once for each model, if images of this (height, width) are of an unlikely size for it."""
    built_for = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (0, *size))[1:]
    if all(native <= MOST_RESIZED * side and side <= MOST_RESIZED * native for side, native in zip(size, built_for)):
        return
    if model not in _warned_of_size:
        _warned_of_size.add(model)
        warnings.warn(
            f"Images are {size[0]} x {size[1]} pixels, but this model was built for {built_for[0]} x {built_for[1]}; "
            "resize them, unless it was trained at their size.",
            stacklevel=4,
        )


def _check_values(model: nn.Module, x: torch.Tensor) -> None:
    """Warn, once for each model, if the first of images (B, C, H, W) was not normalised; to check all takes longer."""
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = config.get("mean"), config.get("std")
    if not mean or not std or not len(x) or x.is_meta or model in _warned_of_values:
        return
    white = max((1 - m) / s for m, s in zip(mean, std))
    largest = x[0].amax().item()
    if MOST_BRIGHT * white < largest < math.inf:
        _warned_of_values.add(model)
        warnings.warn(
            f"An image has the value {largest:g}, where white is {white:.2f}: divide values from 0 to 255 by 255, and "
            f"normalise them with mean {tuple(mean)} and std {tuple(std)}.",
            stacklevel=4,
        )


@contextmanager
def without_data(model: nn.Module, input_size: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield a batch of :data:`BATCH` images without data, for forward passes that compute shapes only.

    The model is in eval mode meanwhile. Afterwards its modules have the attributes, buffers and mode they had before.

    Args:
        model: A model, on any device.
        input_size: (channels, height, width) of an image.
    """
    parameter = next(model.parameters())
    _FAKE_TENSOR_LOG.addFilter(_drop)  # shapes that do not fit raise an error and are logged as well
    try:
        # Parameters on the meta device have no data and need no fake tensors, which are much slower.
        shapes_only = nullcontext() if parameter.is_meta else FakeTensorMode(allow_non_fake_inputs=True)
        with _restored(model), shapes_only, torch.no_grad():
            yield torch.empty(BATCH, *input_size, device=parameter.device, dtype=parameter.dtype)
    finally:
        _FAKE_TENSOR_LOG.removeFilter(_drop)


def on_shapes(model: nn.Module, input_size: Sequence[int], compute: Callable[[torch.Tensor], Result]) -> Result:
    """Return ``compute(images)`` for images without data, as :func:`without_data` yields them, in less time.

    The model's tensors are on the meta device meanwhile, which is three to nine times faster than fake tensors. If
    that fails, as for a model that creates tensors on a fixed device, ``compute`` is called again with fake tensors.

    Args:
        model: A model, on any device.
        input_size: (channels, height, width) of an image.
        compute: Function of the images; it may be called twice.
    """
    try:
        with _restored(model), torch.no_grad():
            dtype = next(model.parameters()).dtype
            tables: Any = [
                table for part in model.modules() for table in (part._parameters, part._buffers, part.__dict__)
            ]
            for table in tables:
                table.update({key: value.to("meta") for key, value in table.items() if torch.is_tensor(value)})
            return compute(torch.empty(BATCH, *input_size, device="meta", dtype=dtype))
    except Exception:  # an error with another cause is raised again below
        with without_data(model, input_size) as images:
            return compute(images)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode for the duration; afterwards its modules have the attributes that they had before."""
    before = [(module.__dict__, module.__dict__.copy(), _tables(module)) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for attributes, values, tables in before:
            attributes.clear()
            attributes.update(values)
            for table, entries in tables:
                table.clear()
                table.update(entries)


def _tables(module: nn.Module) -> list[tuple[dict, dict]]:
    """A module's dicts (buffers, and caches of what it computed for the last image size), each with its contents."""
    return [(value, value.copy()) for value in module.__dict__.values() if isinstance(value, dict)]


def _drop(record: logging.LogRecord) -> bool:
    return False
