"""Writing ONNX nodes: one scope for the main graph and one for each branch."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .network import require

FLOAT, INT, BOOL = 1, 7, 9
"""ONNX's numbers of the element types float32, int64 and bool."""


class Scope:
    """Nodes and weights of one ONNX graph.

    Args:
        name: Begins the names of everything that :meth:`op` and :meth:`constant` add, which must differ from those of
            the scopes around.
    """

    def __init__(self, name: str):
        self.name = name
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}
        self._onnx = require("onnx")

    def op(self, kind: str, *inputs: str, label: str | None = None, outputs: int = 1, **attributes: Any) -> str:
        """Add a node and return the name of its first output.

        Args:
            kind: ONNX operator.
            inputs: Names of its inputs.
            label: The node's name, which runtimes report in errors.
            outputs: How many outputs it has.
            attributes: The operator's.
        """
        first = f"{self.name}/{kind}_{len(self.nodes)}"
        every = [first, *(f"{first}.{i}" for i in range(1, outputs))]
        self.nodes.append(self._onnx.helper.make_node(kind, inputs, every, name=label or first, **attributes))
        return first

    def call(self, value: str, name: str) -> None:
        """Give a value a name of the caller's choice."""
        self.nodes.append(self._onnx.helper.make_node("Identity", [value], [name], name=name))

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """Add a constant and return its name."""
        name = f"{self.name}/constant_{len(self.weights)}"
        self.weights[name] = self._onnx.numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def copy(self, node: Any, names: dict[str, str], suffix: str) -> None:
        """Add a node of another graph's.

        Args:
            node: The node.
            names: What values are called here, where that differs; its outputs are added.
            suffix: Ends the names of its outputs, so that several scopes may repeat the node.
        """
        own = self._onnx.NodeProto()
        own.CopyFrom(node)
        own.input[:] = [names.get(name, name) for name in node.input]
        own.output[:] = [name and name + suffix for name in node.output]
        own.name = (node.name or node.op_type) + suffix
        names.update((name, name + suffix) for name in node.output if name)
        self.nodes.append(own)

    def graph(self, inputs: Sequence[Any], outputs: Iterable[Any]) -> Any:
        """The scope as ``onnx.GraphProto``."""
        return self._onnx.helper.make_graph(self.nodes, self.name, inputs, list(outputs), [*self.weights.values()])

    def value(self, name: str, dtype: int, shape: Sequence[int | str]) -> Any:
        """Description of an input or output of ONNX's element type ``dtype``."""
        return self._onnx.helper.make_tensor_value_info(name, dtype, list(shape))
