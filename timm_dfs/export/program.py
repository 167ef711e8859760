"""Cutting a network's ``torch.export`` program at its exits, for runtimes that take such programs."""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..base.model import MultiExitModel
from .network import IMAGES, AllExits


@dataclass(frozen=True)
class StageProgram:
    """Stage of a network: what one exit's logits need and no earlier stage computed.

    Attributes:
        exit_index: The exit.
        module: Takes the tensors ``inputs`` and returns the exit's logits, then the tensors ``outputs``.
        inputs: ``images`` and states made by earlier stages that the stage itself reads.
        outputs: States that it makes and deeper stages read.
        keeps: What deeper stages read, whichever stage made it.
    """

    exit_index: int
    module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keeps: tuple[str, ...]


def cut_program(model: MultiExitModel, images: torch.Tensor, exits: Sequence[int]) -> list[StageProgram]:
    """Cut a network at these exits, shallow to deep; heads of others are left out.

    Args:
        model: A model as :func:`~timm_dfs.export.network.plain` returns it.
        images: Images (B, C, H, W); B is the only batch size that the stages take.
        exits: Exits, the last one included.

    Raises:
        ValueError: If torch cannot export the network.
    """
    try:
        with torch.no_grad():
            program = torch.export.export(AllExits(model).eval(), (images,), strict=False)
            whole = program.run_decompositions({}).module()  # without operators that write in place
    except Exception as error:  # torch raises many kinds
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        kind = type(getattr(model, "backbone", model)).__name__
        raise ValueError(f"{kind} cannot be exported by torch.export: {reason[0][:300]}") from error
    graph: fx.Graph = whole.graph
    start = next(node for node in graph.nodes if node.op == "placeholder")
    logits: Any = graph.output_node().args[0]
    varying = _that_vary(graph, start)
    _store_resized(whole, varying)
    taken = {start}
    parts: list[list[fx.Node]] = []
    for k in exits:
        needed = _ancestors(logits[k], taken)
        taken |= needed & varying
        parts.append([node for node in graph.nodes if node in needed])
    names = {start: IMAGES}
    crossing = []
    for place in range(len(parts)):
        before = {start, *(node for part in parts[:place] for node in part)} & varying
        deeper = [parent for part in parts[place:] for node in part for parent in node.all_input_nodes]
        deeper += [logits[k] for k in exits[place:]]
        crossing.append([node for node in dict.fromkeys(deeper) if node in before])
        for node in crossing[-1]:
            names.setdefault(node, f"state_{len(names) - 1}")
    crossing.append([])
    stages = []
    for place, (k, part) in enumerate(zip(exits, parts)):
        read = {logits[k], *(parent for node in part for parent in node.all_input_nodes)}
        inputs = [node for node in crossing[place] if node in read]
        outputs = [node for node in crossing[place + 1] if node in set(part)]
        module = _module(whole, {node: names[node] for node in inputs}, part, [logits[k], *outputs])
        inputs_, outputs_, keeps = (
            tuple(names[node] for node in nodes) for nodes in (inputs, outputs, crossing[place + 1])
        )
        stages.append(StageProgram(k, module, inputs_, outputs_, keeps))
    return stages


def _that_vary(graph: fx.Graph, start: fx.Node) -> set[fx.Node]:
    """Nodes whose values depend on the images; every stage repeats those of the others that it reads."""
    varying = {start}
    for node in graph.nodes:
        if not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
    return varying


def _store_resized(whole: Any, varying: set[fx.Node]) -> None:
    """Store resized weights, such as position embeddings, as buffers; mobile runtimes lack the antialiased resize."""
    values: dict[fx.Node, Any] = {}
    for node in list(whole.graph.nodes):
        if node.op == "get_attr":
            values[node] = operator.attrgetter(node.target)(whole)
        elif node.op == "call_function" and node not in varying:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
            if "upsample" in str(node.target):
                name = f"resized_{len(values)}"
                whole.register_buffer(name, values[node].contiguous())
                with whole.graph.inserting_before(node):
                    stored = whole.graph.get_attr(name)
                values[stored] = values[node]
                node.replace_all_uses_with(stored)


def _ancestors(node: fx.Node, taken: set[fx.Node]) -> set[fx.Node]:
    """The node and those that it needs, without those already taken."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node not in taken and node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _module(
    whole: torch.nn.Module, inputs: dict[fx.Node, str], nodes: Iterable[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {node: graph.placeholder(name) for node, name in inputs.items()}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(whole, graph)
