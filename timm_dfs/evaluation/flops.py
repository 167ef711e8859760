"""Cost of each exit in multiply-accumulate operations (MACs, also multiply-adds), as fvcore counts them."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from ..base.evaluating import evaluating, require_exits
from ..base.model import MultiExitModel
from ..inference.precision import own_precision

# Operators without multiply-adds in fvcore's count: elementwise arithmetic, activations, pooling, copies.
FREE_OPERATORS = frozenset(
    f"aten::{name}"
    for name in """
    abs add add_ addcmul sub sub_ rsub mul mul_ div div_ neg pow sqrt rsqrt exp log sin cos ceil
    square sigmoid sigmoid_ tanh clamp clamp_ clamp_min
    relu relu_ relu6 hardtanh hardtanh_ hardswish hardswish_ hardsigmoid hardsigmoid_ silu silu_ gelu elu
    leaky_relu leaky_relu_ softplus softmax log_softmax mean sum linalg_vector_norm max amax min amin argmax cumsum
    max_pool2d avg_pool1d avg_pool2d adaptive_max_pool2d
    cat stack copy_ clone contiguous zeros zeros_like ones ones_like eye empty full full_like arange fill_
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
    """Multiply-adds of a convolution whose padding is ``"same"`` or ``"valid"``."""
    output, weight = (tuple(value.type().sizes()) for value in (outputs[0], inputs[1]))
    return math.prod(output) * math.prod(weight[1:])


def _interpolation_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """One for each output value, as fvcore counts nearest-neighbour interpolation."""
    return math.prod(outputs[0].type().sizes())


def _rms_norm_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Per value 3, and 1 for the weight: one less than fvcore counts for a norm that subtracts the mean."""
    weighted = inputs[2].type().kind() == "TensorType"
    return math.prod(inputs[0].type().sizes()) * (4 if weighted else 3)


def _lstm_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of all weight matrices, each applied once to every step of every sequence."""
    *steps, _ = inputs[0].type().sizes()
    weights = [value.type().sizes() for value in inputs[-7].node().inputs()]
    return math.prod(steps) * sum(math.prod(sizes) for sizes in weights if len(sizes) == 2)


MORE_HANDLES = {
    "aten::scaled_dot_product_attention": _attention_flops,
    "aten::_convolution_mode": _convolution_flops,
    "aten::upsample_bicubic2d": _interpolation_flops,
    "aten::_upsample_bicubic2d_aa": _interpolation_flops,
    "aten::_upsample_bilinear2d_aa": _interpolation_flops,
    "aten::upsample_linear1d": _interpolation_flops,
    "aten::rms_norm": _rms_norm_flops,
    "aten::lstm": _lstm_flops,
}
"""Handles of operators with multiply-adds that fvcore does not count."""


class _AllExits(nn.Module):
    """Logits of all exits from one walk, followed by the settled states of networks that defer work at an exit.

    Tracing it gives one output per exit and then ``state_sizes[k]`` outputs for each exit k.
    """

    def __init__(self, model: MultiExitModel):
        super().__init__()
        self.model = model
        self.state_sizes = [0] * model.num_exits

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits: list[torch.Tensor] = []
        settled: list[torch.Tensor] = []

        def advance(state: list[torch.Tensor], exit_index: int) -> list[torch.Tensor]:
            state = self.model.advance(state, exit_index)
            tensors = self.model.settle(state, exit_index)
            self.state_sizes[exit_index] = len(tensors)
            settled.extend(tensors)
            return state

        network = self.model
        if network.settle.__func__ is not MultiExitModel.settle:  # type: ignore[attr-defined]
            network = copy.copy(network)  # shares all modules, so that advance is replaced for this walk only
            network.advance = advance  # type: ignore[method-assign]
        network.walk(x, lambda _, of_exit: logits.append(of_exit))
        return (*logits, *settled)


class Costs:
    """Costs of a network's exits, counted in one trace of the network.

    Args:
        model: A network with exits.
        input_size: (channels, height, width) of the image; by default the pretrained config's.

    Raises:
        ValueError: If an operator costs something that fvcore cannot count, or ``input_size`` is not three
            positive numbers.
    """

    def __init__(self, model: MultiExitModel, input_size: Sequence[int] | None = None):
        require_exits(model)
        model = getattr(model, "_orig_mod", model)  # a compiled model wraps the one that can be traced
        size = tuple((model.in_chans, *model.pretrained_cfg["input_size"][1:]) if input_size is None else input_size)
        if len(size) != 3 or min(size) < 1 or size[0] != model.in_chans:
            raise ValueError(
                f"input_size is {size}; give (channels, height, width), {model.in_chans} channels for this model."
            )
        self.num_exits = model.num_exits
        exits = _AllExits(model)
        like = next(model.parameters())
        with evaluating(model), own_precision(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, and those of fvcore's import of torch.jit
            from fvcore.nn import FlopCountAnalysis

            image = torch.zeros(1, *size, device=like.device, dtype=like.dtype)
            self._graph, _ = torch.jit._get_trace_graph(exits, (image,))
            self._fvcore = FlopCountAnalysis(exits, image).set_op_handle(**MORE_HANDLES)
        self._state_sizes = exits.state_sizes
        unknown = sorted({_kind(node) for node in self._graph.nodes() if not self._is_known(node)} - FREE_OPERATORS)
        if unknown:
            raise ValueError(
                f"Cannot count the cost of {', '.join(unknown)}: give it a handle in timm_dfs/evaluation/flops.py, "
                "or add it to FREE_OPERATORS if it does no multiply-adds."
            )

    def of_exits(self, lazy: bool = False, heads: Collection[int] | None = None) -> list[int]:
        """Costs up to and including each exit, as :func:`exit_flops` gives them."""
        heads = range(self.num_exits) if heads is None else heads
        if unknown := [k for k in heads if k not in range(self.num_exits)]:
            raise ValueError(f"heads names {unknown}; the exits are 0 to {self.num_exits - 1}.")
        return [self._up_to(k, lazy, heads) for k in range(self.num_exits)]

    def of_last_exit_alone(self) -> int:
        """Cost of the last exit without the heads before it, as :func:`last_exit_flops` gives it."""
        return self._up_to(self.num_exits - 1, True, ())

    def _up_to(self, exit_index: int, lazy: bool, heads: Collection[int]) -> int:
        outputs = [k for k in range(exit_index) if k in heads] + [exit_index]
        if not lazy:
            first = self.num_exits + sum(self._state_sizes[:exit_index])
            outputs += range(first, first + self._state_sizes[exit_index])
        return sum(map(self._count, _part(self._graph, outputs).nodes()))

    def _is_known(self, node: Any) -> bool:
        return _kind(node) in self._fvcore._op_handles or self._fvcore._should_ignore_node(node)

    def _count(self, node: Any) -> int:
        handle = self._fvcore._op_handles.get(node.kind())
        count = 0 if handle is None else handle(list(node.inputs()), list(node.outputs()))
        return int(sum(count.values()) if isinstance(count, Counter) else count)


def _kind(node: Any) -> str:
    """An operator's name; of an operator written in Python, the name of its class too."""
    return f"{node.kind()}.{node.pyname()}" if node.kind() == "prim::PythonOp" else node.kind()


def _part(graph: Any, outputs: Collection[int]) -> Any:
    """Copy of a trace that computes some of its outputs, without the nodes that come after or are not needed.

    Nodes that come after are removed first, because one that writes into a tensor in place would otherwise count as
    needed for what was computed before it.
    """
    part = graph.copy()
    (packed,) = part.outputs()
    wanted = [value for i, value in enumerate(packed.node().inputs()) if i in outputs]
    part.eraseOutput(0)
    for value in wanted:
        part.registerOutput(value)
    for node in reversed(list(part.nodes())):
        if not all(node.isAfter(value.node()) for value in wanted):
            break
        node.destroy()
    torch._C._jit_pass_dce_graph(part)
    return part


def exit_flops(
    model: MultiExitModel,
    input_size: Sequence[int] | None = None,
    lazy: bool = False,
    heads: Collection[int] | None = None,
) -> list[int]:
    """Multiply-adds for one image up to and including each exit, heads of the exits before it included.

    Counted by fvcore: one multiply-add is one; convolution, linear, attention, norm, adaptive average pooling and
    interpolation count, elementwise operations and pooling in windows do not. The network is traced once, in its own
    precision, whatever autocast says.

    Args:
        model: A network with exits.
        input_size: (channels, height, width) of the image; by default the pretrained config's.
        lazy: ``False``: the published convention, all that the training forward computes up to the exit.
            ``True``: what :func:`timm_dfs.predict` computes for a sample that leaves at the exit.
        heads: The earlier exits whose heads are computed, as a policy's ``answering`` names them; by default all.
            Chained exits compute all of them in any case.

    Returns:
        One count per exit, shallow to deep.

    Raises:
        ValueError: If an operator has a cost that fvcore cannot count, ``input_size`` is not three positive numbers, or
            ``heads`` names an exit that is not there.

    Example:
        >>> import timm, timm_dfs
        >>> model = timm.create_model("dfs_vgg7_cifar100", depths=(1, 1), widths=(8, 16), num_classes=10)
        >>> timm_dfs.exit_flops(model)
        [245840, 1462512]
        >>> timm_dfs.exit_flops(model, heads=())  # no other head computed
        [245840, 1454240]
    """
    return Costs(model, input_size).of_exits(lazy, heads)


def last_exit_flops(model: MultiExitModel, input_size: Sequence[int] | None = None) -> int:
    """Multiply-adds for one image of the last exit without the heads before it: the network without early exits.

    With chained exits the heads before it are included, because its logits need them.

    Args and errors as for :func:`exit_flops`.
    """
    return Costs(model, input_size).of_last_exit_alone()
