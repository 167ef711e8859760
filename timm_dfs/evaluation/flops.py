"""Cost of each exit in multiply-adds, as fvcore counts them."""

import math
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from ..base.evaluating import evaluating, require_exits
from ..base.model import MultiExitModel

# Operators without multiply-adds in fvcore's count: elementwise arithmetic, activations, pooling, copies.
FREE_OPERATORS = frozenset(
    f"aten::{name}"
    for name in """
    abs add add_ addcmul sub sub_ rsub mul mul_ div div_ neg pow sqrt rsqrt exp log sin cos ceil
    sigmoid sigmoid_ tanh clamp clamp_ clamp_min
    relu relu_ relu6 hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ silu silu_ gelu elu
    leaky_relu leaky_relu_ softplus softmax log_softmax mean sum linalg_vector_norm max amax min amin argmax cumsum
    max_pool2d avg_pool1d avg_pool2d adaptive_max_pool2d
    cat stack copy_ clone contiguous zeros zeros_like ones ones_like empty full full_like arange fill_
    index index_select gather where masked_fill roll pad constant_pad_nd repeat repeat_interleave expand expand_as
    reshape_as tile flip meshgrid one_hot unfold col2im
    feature_dropout dropout dropout_ im2col eq ne lt le gt ge bitwise_not logical_not detach alias lift_fresh
    """.split()
)


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of scaled dot-product attention: queries by keys, then weights by values."""
    query, key, value = (tuple(value.type().sizes()) for value in inputs[:3])
    return math.prod(query[:-2]) * query[-2] * key[-2] * (query[-1] + value[-1])


def _convolution_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of a convolution whose padding is said in a word."""
    output, weight = (tuple(value.type().sizes()) for value in (outputs[0], inputs[1]))
    return math.prod(output) * math.prod(weight[1:])


def _interpolation_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """One for each value put out, as fvcore has it for other interpolations."""
    return math.prod(outputs[0].type().sizes())


def _rms_norm_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """One less for each value than fvcore has for a norm that subtracts the mean: 3, and 1 for the weight."""
    weighted = inputs[2].type().kind() == "TensorType"
    return math.prod(inputs[0].type().sizes()) * (4 if weighted else 3)


def _lstm_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Every weight matrix meets every step of every sequence once."""
    *steps, _ = inputs[0].type().sizes()
    weights = [value.type().sizes() for value in inputs[-7].node().inputs()]
    return math.prod(steps) * sum(math.prod(sizes) for sizes in weights if len(sizes) == 2)


MORE_HANDLES = {
    "aten::scaled_dot_product_attention": _attention_flops,
    "aten::_convolution_mode": _convolution_flops,
    "aten::upsample_bicubic2d": _interpolation_flops,
    "aten::upsample_linear1d": _interpolation_flops,
    "aten::rms_norm": _rms_norm_flops,
    "aten::lstm": _lstm_flops,
}
"""Operators with multiply-adds that fvcore does not know."""


class _UpTo(nn.Module):
    """What is computed up to one exit, every result of it an output, so that a trace drops none."""

    def __init__(self, model: MultiExitModel, exit_index: int, lazy: bool, heads: Collection[int]):
        super().__init__()
        self.model = model
        self.exit_index = exit_index
        self.lazy = lazy
        self.heads = [k for k in range(exit_index + 1) if k in heads or k == exit_index]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits: list[torch.Tensor] = []
        state = self.model.walk(x, lambda _, answer: logits.append(answer), self.heads)
        if self.lazy:
            return tuple(logits)
        return (*logits, *self.model.settle(state, self.exit_index))


class _LastExit(nn.Module):
    """The last exit's answer alone, no other head computed."""

    def __init__(self, model: MultiExitModel):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_head(self.model.forward_features(x))


def exit_flops(
    model: MultiExitModel,
    input_size: Sequence[int] | None = None,
    lazy: bool = False,
    heads: Collection[int] | None = None,
) -> list[int]:
    """Multiply-adds for one image up to and including each exit, heads of the exits before it included.

    Counted by fvcore: one multiply-add is one; convolution, linear, batch norm and interpolation count,
    elementwise operations and max-pooling do not.

    Args:
        model: A network with exits.
        input_size: (channels, height, width) of the image; by default the pretrained config's.
        lazy: ``False``: the published convention, all that the training forward computes up to the exit.
            ``True``: what :func:`timm_dfs.predict` executes for a sample that leaves there.
        heads: Of the exits before, those whose heads are computed, as by a policy's ``answering``; all by default.

    Returns:
        One count per exit, shallow to deep.

    Raises:
        ValueError: If an operator costs something that fvcore cannot count, or ``input_size`` is not three
            positive numbers.
    """
    require_exits(model)
    heads = range(model.num_exits) if heads is None else heads
    return [_count(_UpTo(model, k, lazy, heads), model, input_size) for k in range(model.num_exits)]


def last_exit_flops(model: MultiExitModel, input_size: Sequence[int] | None = None) -> int:
    """Multiply-adds of the last exit's answer alone: the network without early exits, and early exit's rival.

    Args and errors as for :func:`exit_flops`.
    """
    require_exits(model)
    return _count(_LastExit(model), model, input_size)


def _count(module: nn.Module, model: MultiExitModel, input_size: Sequence[int] | None) -> int:
    with warnings.catch_warnings():  # fvcore's import of torch.jit, which is none of the caller's business
        warnings.simplefilter("ignore", FutureWarning)
        from fvcore.nn import FlopCountAnalysis

    size = tuple((model.in_chans, *model.pretrained_cfg["input_size"][1:]) if input_size is None else input_size)
    if len(size) != 3 or min(size) < 1 or size[0] != model.in_chans:
        raise ValueError(
            f"input_size is {size}; give (channels, height, width), {model.in_chans} channels for this model."
        )
    reference = next(model.parameters())
    image = torch.zeros(1, *size, device=reference.device, dtype=reference.dtype)
    with evaluating(model), torch.no_grad():
        analysis = FlopCountAnalysis(module.eval(), image)
        analysis.set_op_handle(**MORE_HANDLES)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        total = analysis.total()
        unknown = sorted(set(analysis.unsupported_ops()) - FREE_OPERATORS)
    if unknown:
        raise ValueError(
            f"Cannot count the cost of {', '.join(unknown)}: give it a handle in timm_dfs/flops.py, "
            "or add it to FREE_OPERATORS if it does no multiply-adds."
        )
    return int(total)
