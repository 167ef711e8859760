"""Cutting a network's ONNX graph at its exits: what each stage computes, and the tensors that cross the cuts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .network import BATCH, IMAGES, Network


@dataclass(frozen=True)
class Stage:
    """Stage of a network: nodes that one exit's logits need and that no earlier stage computed.

    Attributes:
        exit_index: The exit.
        nodes: ``onnx.NodeProto``, in order. Every stage repeats the nodes it reads that do not depend on the images'
            values (constants, the batch size), and those that dequantize, so that quantized tensors cross the cuts.
        reads: Tensors made by earlier stages, or ``images``, that this stage or a deeper one reads.
        weights: Names of the initializers that the nodes read.
        logits: Name of the exit's logits.
    """

    exit_index: int
    nodes: tuple[Any, ...]
    reads: tuple[str, ...]
    weights: tuple[str, ...]
    logits: str


def cut(network: Network, exits: Sequence[int]) -> list[Stage]:
    """Cut a network at these exits, shallow to deep; heads of others are left out."""
    nodes = list(network.graph.node)
    weights = {tensor.name for tensor in network.graph.initializer}
    maker = {output: i for i, node in enumerate(nodes) for output in node.output}
    varying = {i for i in _that_vary(nodes) if nodes[i].op_type != "DequantizeLinear"}
    taken: set[int] = set()
    parts: list[tuple[list[int], list[str]]] = []
    for k in exits:
        needed = sorted(_ancestors(network.logits[k], nodes, maker, taken))
        taken |= varying.intersection(needed)
        parts.append((needed, [name for i in needed for name in nodes[i].input if name]))
    stages = []
    for place, (k, (own, inputs)) in enumerate(zip(exits, parts)):
        before = {IMAGES, *(name for indices, _ in parts[:place] for i in indices for name in nodes[i].output)}
        before = {name for name in before if name == IMAGES or maker[name] in varying}
        deeper = dict.fromkeys(
            name
            for (indices, _), exit_index in zip(parts[place:], exits[place:])
            for name in (*_read(indices, nodes), network.logits[exit_index])
        )
        reads = (IMAGES,) if place == 0 else tuple(name for name in deeper if name in before)
        held = tuple(name for name in dict.fromkeys(inputs) if name in weights)
        stages.append(Stage(k, tuple(nodes[i] for i in own), reads, held, network.logits[k]))
    return stages


def _read(indices: Sequence[int], nodes: Sequence[Any]) -> list[str]:
    """Names that these nodes read the values of; the images' size is the batch's and does not count."""
    return [name for i in indices for name in nodes[i].input if name and not is_batch_size(nodes[i])]


def is_batch_size(node: Any) -> bool:
    """Whether the node reads the number of images."""
    if node.op_type != "Shape" or list(node.input) != [IMAGES]:
        return False
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return bounds.get("start", 0) == 0 and bounds.get("end") == 1


def _that_vary(nodes: Sequence[Any]) -> set[int]:
    """Indices of the nodes whose outputs depend on the images' values, not only on how many images there are."""
    values, indices = {IMAGES}, set()
    for i, node in enumerate(nodes):
        if not is_batch_size(node) and values.intersection(node.input):
            indices.add(i)
            values.update(node.output)
    return indices


def _ancestors(name: str, nodes: Sequence[Any], maker: dict[str, int], taken: set[int]) -> set[int]:
    """Indices of the nodes that a value needs, without those already taken."""
    found: set[int] = set()
    waiting = [name]
    while waiting:
        i = maker.get(waiting.pop())
        if i is not None and i not in taken and i not in found:
            found.add(i)
            waiting.extend(nodes[i].input)
    return found


def rows_per_image(sizes: Sequence[int | str] | None) -> int:
    """Rows of the first axis that belong to each image; 0 where the first axis does not tell images apart."""
    if not sizes or any(not isinstance(size, int) for size in sizes[1:]):
        return 0
    first = sizes[0]
    if first == BATCH:
        return 1
    if not isinstance(first, str):
        return 0
    factors = first.split("*")
    if len(factors) != 2 or BATCH not in factors:
        return 0
    factors.remove(BATCH)
    return int(factors[0]) if factors[0].isdigit() else 0


def shrinks(network: Network, stage: Stage) -> bool:
    """Whether every tensor that the stage reads can lose the rows of images that have exited."""
    return all(rows_per_image(network.shapes.get(name)) for name in stage.reads)
