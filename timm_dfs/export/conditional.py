"""The layout ``graph``: one ONNX graph whose nested ``If`` nodes end it where every image has exited."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..inference.policy import ExitPolicy
from .cut import Stage, is_batch_size, rows_per_image, shrinks
from .decision import THRESHOLDS, Memory, check_left_out, combine, decide
from .network import IMAGES, Network, require
from .scope import FLOAT, INT, Scope

LOGITS, PROBABILITIES, EXIT_INDEX = "logits", "probabilities", "exit_index"
"""Names of the graph's outputs."""

REPEATED = 4096
"""Most bytes of a weight that every stage which reads it has a copy of; a larger one lies where it is read first. ONNX
Runtime optimises best what it finds in the same graph."""


@dataclass(frozen=True)
class _Batch:
    """The images that are active in one scope.

    Attributes:
        names: What tensors of the network are called in the scope.
        counted: Name of a tensor whose first axis is as long as the batch.
        memory: Of the exits before.
        active: Name of a bool tensor (B,), false for images that have exited already and are computed on, because
            the batch cannot shrink; ``None``: all are active.
    """

    names: dict[str, str]
    counted: str
    memory: Memory
    active: str | None = None


class _Writer:
    """Writes stages into nested scopes."""

    def __init__(self, network: Network, stages: Sequence[Stage], policy: ExitPolicy, classes: int, thresholds: str):
        self.network = network
        self.stages = stages
        self.policy = policy
        self.classes = classes
        self.thresholds = thresholds
        self.weights = {tensor.name: tensor for tensor in network.graph.initializer}
        self.placed: set[str] = set()

    def write(self, scope: Scope, place: int, batch: _Batch) -> tuple[str, str]:
        """Write a stage and, behind an ``If``, all deeper ones; return the names of logits (B, C) and exits (B,)."""
        stage = self.stages[place]
        names = self._copy(scope, stage, batch)
        own = names.get(stage.logits, stage.logits)
        logits, before = combine(scope, self.policy, stage.exit_index, own, batch.memory)
        size = scope.op("Shape", batch.counted, start=0, end=1)
        exits = scope.op("Expand", scope.constant([stage.exit_index]), size)
        if place == len(self.stages) - 1:
            return logits, exits
        staying, memory = decide(scope, self.policy, self.thresholds, stage.exit_index, logits, self.classes, before)
        if batch.active is not None:
            staying = scope.op("And", staying, batch.active)
        rows = scope.op("Squeeze", scope.op("NonZero", staying), scope.constant([0]))
        anyone = scope.op("Greater", scope.op("Size", rows), scope.constant(0))
        batch = replace(batch, names=names, memory=memory)
        fewer = shrinks(self.network, self.stages[place + 1])
        onward = self._on_fewer if fewer else self._on_all
        deeper = Scope(f"after_exit_{stage.exit_index}")
        outputs = onward(deeper, place + 1, batch, logits, exits, rows, staying)
        ended = Scope(f"end_at_exit_{stage.exit_index}")
        unchanged = [ended.op("Identity", name) for name in (logits, exits)]
        result = scope.op(
            "If",
            anyone,
            outputs=2,
            then_branch=self._branch(deeper, outputs),
            else_branch=self._branch(ended, unchanged),
        )
        return result, f"{result}.1"

    def _copy(self, scope: Scope, stage: Stage, batch: _Batch) -> dict[str, str]:
        """Copy a stage's nodes and weights; return what tensors are called here."""
        names = dict(batch.names)
        suffix = f"@{stage.exit_index}"
        for name in stage.weights:
            weight = self.weights[name]
            if name not in self.placed:
                self.placed.add(name)
                scope.weights[name] = weight
            elif weight.ByteSize() <= REPEATED:
                names[name] = name + suffix
                scope.weights[name + suffix] = renamed(weight, name + suffix)
        for node in stage.nodes:
            copy_node(scope, node, names, suffix, batch.counted)
        return names

    def _on_fewer(
        self, scope: Scope, place: int, batch: _Batch, logits: str, exits: str, rows: str, staying: str
    ) -> list[str]:
        """Gather the images that stay, run the deeper stages on them, and scatter what they predict."""
        names = dict(batch.names)
        for name in self.stages[place].reads:
            names[name] = self._gather(scope, name, names.get(name, name), rows)
        memory = batch.memory.map(lambda name: scope.op("Gather", name, rows, axis=0))
        results = self.write(scope, place, _Batch(names, rows, memory))
        index = scope.op("Unsqueeze", rows, scope.constant([1]))
        return [scope.op("ScatterND", own, index, result) for own, result in zip((logits, exits), results)]

    def _on_all(
        self, scope: Scope, place: int, batch: _Batch, logits: str, exits: str, rows: str, staying: str
    ) -> list[str]:
        """Run the deeper stages on the whole batch, and take what they predict for the images that stay."""
        results = self.write(scope, place, replace(batch, active=staying))
        column = scope.op("Unsqueeze", staying, scope.constant([1]))
        return [
            scope.op("Where", mask, result, own)
            for mask, result, own in zip((column, staying), results, (logits, exits))
        ]

    def _gather(self, scope: Scope, name: str, here: str, rows: str) -> str:
        """Rows of a tensor that has one or several for each image."""
        sizes = self.network.shapes[name]
        each = rows_per_image(sizes)
        if each == 1:
            return scope.op("Gather", here, rows, axis=0)
        by_image = scope.op("Reshape", here, scope.constant([-1, each, *sizes[1:]]))
        return scope.op("Reshape", scope.op("Gather", by_image, rows, axis=0), scope.constant([-1, *sizes[1:]]))

    def _branch(self, scope: Scope, outputs: Sequence[str]) -> Any:
        logits, exits = outputs
        described = [scope.value(logits, FLOAT, ["rows", self.classes]), scope.value(exits, INT, ["rows"])]
        return scope.graph([], described)


def copy_node(scope: Scope, node: Any, names: dict[str, str], suffix: str, counted: str) -> None:
    """Copy a node of the network's into a stage; ``counted``'s first axis is the stage's batch."""
    if is_batch_size(node):
        names[node.output[0]] = scope.op("Shape", counted, start=0, end=1)
    else:
        scope.copy(node, names, suffix)


def renamed(weight: Any, name: str) -> Any:
    """A copy of an initializer under another name."""
    copy = type(weight)()
    copy.CopyFrom(weight)
    copy.name = name
    return copy


def default_thresholds(policy: ExitPolicy) -> Any:
    """The policy's thresholds as an initializer, which an input of the same name may override."""
    onnx = require("onnx")
    return onnx.numpy_helper.from_array(np.asarray(policy.thresholds, np.float32), THRESHOLDS)


def conditional_graph(
    network: Network, stages: Sequence[Stage], policy: ExitPolicy, classes: int, batch: int | str, softmax: bool
) -> Any:
    """``onnx.GraphProto`` that predicts as :func:`timm_dfs.predict` does.

    Args:
        network: The network.
        stages: From :func:`~timm_dfs.export.cut.cut` at the policy's answering exits.
        policy: The policy; its thresholds become the default of the input ``thresholds``.
        classes: C.
        batch: Number of images, or the name of a dynamic axis.
        softmax: Put out probabilities, of logits divided by their exit's temperature, instead of logits.
    """
    scope = Scope("main")
    scope.weights[THRESHOLDS] = default_thresholds(policy)
    thresholds = check_left_out(scope, policy)
    writer = _Writer(network, stages, policy, classes, thresholds)
    logits, exits = writer.write(scope, 0, _Batch({}, IMAGES, Memory()))
    name = LOGITS
    if softmax:
        name = PROBABILITIES
        if policy.temperatures is not None:
            temperatures = scope.constant(policy.temperatures, np.float32)
            of_exits = scope.op("Gather", temperatures, exits, axis=0)
            logits = scope.op("Div", logits, scope.op("Unsqueeze", of_exits, scope.constant([1])))
        logits = scope.op("Softmax", logits, axis=1)
    scope.call(logits, name)
    scope.call(exits, EXIT_INDEX)
    sizes = network.shapes[IMAGES][1:]
    inputs = [scope.value(IMAGES, FLOAT, [batch, *sizes]), scope.value(THRESHOLDS, FLOAT, [len(policy.thresholds)])]
    outputs = [scope.value(name, FLOAT, [batch, classes]), scope.value(EXIT_INDEX, INT, [batch])]
    return scope.graph(inputs, outputs)
