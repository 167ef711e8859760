"""One flat ONNX graph of a network with exits: images to every exit's logits."""

import copy
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base.caches import forget
from ..base.model import MultiExitModel

BATCH = "batch"
"""Name of the dynamic batch axis."""

IMAGES = "images"
"""Name of the graph's input."""

OLDEST_OPSET = 18
"""Oldest ONNX opset with the operators used here: ``ReduceMax`` takes its axes as an input from 18 on."""


@dataclass(frozen=True)
class Network:
    """ONNX graph of every exit's logits.

    Attributes:
        graph: ``onnx.GraphProto`` with the input ``images`` and one output for each exit.
        opset: Version of ONNX's operators.
        logits: Names of the exits' logits, shallow to deep.
        shapes: By value, its sizes: an int, or the name of a symbolic size such as ``"batch"`` or ``"4*batch"``.
        types: By value, ONNX's number of its element type.
    """

    graph: Any
    opset: int
    logits: tuple[str, ...]
    shapes: dict[str, tuple[int | str, ...]]
    types: dict[str, int]


def require(module: str, extra: str = "deploy") -> Any:
    """Import a module that an extra of timm-dfs installs.

    Raises:
        ModuleNotFoundError: If it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Exporting needs {error.name}, which is not installed: pip install 'timm-dfs[{extra}]'."
        ) from None


def plain(model: MultiExitModel) -> MultiExitModel:
    """A copy of the model in eval mode on the CPU, float32 and contiguous, which is what is exported."""
    forget(model)  # what layers keep cannot be copied with its gradients
    exported = copy.deepcopy(model).eval().requires_grad_(False)
    return exported.to("cpu", torch.float32).to(memory_format=torch.contiguous_format)


def check_opset(opset: int) -> None:
    """Raise ``ValueError`` unless the exporter and the installed onnx support this opset."""
    newest = require("onnx").defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET <= opset <= newest:
        raise ValueError(
            f"opset is {opset!r}; give {OLDEST_OPSET} to {newest}: older ones lack operators of the conditional graph, "
            "and the installed onnx knows no newer one."
        )


def trace(model: MultiExitModel, input_size: Sequence[int], opset: int) -> Network:
    """Export :meth:`~timm_dfs.MultiExitModel.forward_exits` with a dynamic batch.

    Args:
        model: A model as :func:`plain` returns it.
        input_size: (channels, height, width) of an image.
        opset: ONNX opset.

    Raises:
        ValueError: If torch or ONNX cannot express the network, or its weights exceed 2 GB, the most that fits in one
            ONNX file.
    """
    onnx = require("onnx")
    require("onnxscript")
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size >= 2**31:
        raise ValueError(f"The weights take {size / 2**30:.1f} GB; one ONNX file holds less than 2.")
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                AllExits(model).eval(),
                (torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0)),),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                input_names=[IMAGES],
                output_names=[f"logits_{k}" for k in range(model.num_exits)],
                custom_translation_table=_translations(),
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # torch raises many kinds, each with the whole graph in its text
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        kind = type(getattr(model, "backbone", model)).__name__
        raise ValueError(f"{kind} cannot be exported to ONNX with a dynamic batch: {reason[0][:300]}") from error
    if program is None:
        raise ValueError("torch.onnx.export returned nothing.")
    proto = program.model_proto
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    return network_of(proto.graph, opset)


def network_of(graph: Any, opset: int) -> Network:
    """A network from ``onnx.GraphProto``, which loses its notes: stack traces name local paths."""
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    values = [*graph.input, *graph.value_info, *graph.output]
    shapes = {value.name: _sizes(value) for value in values}
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return Network(graph, opset, tuple(output.name for output in graph.output), shapes, types)


class AllExits(nn.Module):
    """Every exit's logits as the outputs of ``forward``, which is what gets exported."""

    def __init__(self, model: MultiExitModel):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model.forward_exits(images)


def _translations() -> dict[Callable, Callable]:
    """Translations to ONNX that replace the exporter's own."""
    ops: Any = require("onnxscript").opset18
    library = require("onnxscript.function_libs.torch_lib.ops.nn")

    def as_strided(self: Any, size: Any, stride: Any, storage_offset: int = 0) -> Any:
        # Average pooling to one value restores channels-last strides, which ONNX has not. The exporter's own
        # translation indexes element by element over the whole batch.
        if len(size) != len(self.shape):
            raise ValueError("as_strided changes the number of axes, which is not exported.")
        return ops.Identity(self)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        rank = len(query.shape)
        added = attn_mask is None or attn_mask.dtype == query.dtype  # a mask of booleans is not added
        if rank == 4 or is_causal or enable_gqa or not added:
            return library.aten_scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        transposed = ops.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
        scores = ops.Mul(ops.MatMul(query, transposed), ops.Constant(value_float=float(factor)))
        if attn_mask is not None:
            scores = ops.Add(scores, attn_mask)
        return ops.MatMul(ops.Softmax(scores, axis=-1), value)

    aten = torch.ops.aten
    return {aten.as_strided.default: as_strided, aten.scaled_dot_product_attention.default: attention}


def _sizes(value: Any) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims)
