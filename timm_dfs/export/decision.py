"""A policy's decision at one exit, as ONNX nodes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..inference.confidence import PATIENCE
from ..inference.ensemble import effective_weights
from ..inference.policy import ExitPolicy
from .scope import BOOL, FLOAT, INT, Scope

THRESHOLDS = "thresholds"
"""Name of the graph's second input (E,)."""


@dataclass(frozen=True)
class Memory:
    """Names of tensors (B,) that say what the exits before found; ``None`` before the first exit.

    Attributes:
        broken: Bool: an exit's softmax was NaN, so the image goes to the last exit.
        prediction: int64: the class that the exit before predicted. Only with patience.
        agreed: float32: how many exits just before that one predicted the same class. Only with patience.
        logits: Exits before, each with its own logits (B, C). Only with an ensemble.
    """

    broken: str | None = None
    prediction: str | None = None
    agreed: str | None = None
    logits: tuple[tuple[int, str], ...] = ()

    def map(self, function: Callable[[str], str]) -> "Memory":
        """The same, ``function`` applied to each name."""
        broken, prediction, agreed = (
            None if name is None else function(name) for name in (self.broken, self.prediction, self.agreed)
        )
        return Memory(broken, prediction, agreed, tuple((k, function(name)) for k, name in self.logits))


def decide(
    scope: Scope, policy: ExitPolicy, thresholds: str, exit_index: int, logits: str, classes: int, before: Memory
) -> tuple[str, Memory]:
    """Write which images go deeper than an early exit.

    Args:
        scope: The graph to add nodes to.
        policy: Its confidence and temperatures count.
        thresholds: Name of the thresholds (E,).
        exit_index: The exit.
        logits: Name of the policy's logits (B, C) there, from :func:`combine`.
        classes: C.
        before: Memory of the exits before.

    Returns:
        Name of a bool tensor (B,), true for images that go deeper, and the memory for the next exit.
    """
    axis = scope.constant([1])
    largest = scope.op("ReduceMax", logits, axis, keepdims=0)
    broken = _is_broken(scope, logits, largest, axis)
    if before.broken is not None:
        broken = scope.op("Or", broken, before.broken)
    memory = Memory(broken, logits=before.logits)
    if policy.confidence == PATIENCE:
        prediction = scope.op("ArgMax", logits, axis=1, keepdims=0)
        if before.prediction is None or before.agreed is None:
            agreed = scope.op("Mul", scope.op("Cast", prediction, to=FLOAT), scope.constant(0, np.float32))
        else:
            same = scope.op("Cast", scope.op("Equal", prediction, before.prediction), to=FLOAT)
            agreed = scope.op("Mul", scope.op("Add", before.agreed, scope.constant(1, np.float32)), same)
        memory = Memory(broken, prediction, agreed, before.logits)
        confidence = agreed
    else:
        if policy.temperatures is not None:
            logits = scope.op("Div", logits, scope.constant(policy.temperatures[exit_index], np.float32))
        if policy.confidence not in _CONFIDENCES:
            raise ValueError(f"The confidence {policy.confidence!r} has no ONNX form; add one to export/decision.py.")
        confidence = _CONFIDENCES[policy.confidence](scope, scope.op("Softmax", logits, axis=1), classes)
    threshold = scope.op("Gather", thresholds, scope.constant(exit_index), axis=0)
    confident = scope.op("GreaterOrEqual", confidence, threshold)
    return scope.op("Or", scope.op("Not", confident), broken), memory


def combine(scope: Scope, policy: ExitPolicy, exit_index: int, logits: str, before: Memory) -> tuple[str, Memory]:
    """Write the policy's logits at an exit.

    Args:
        scope: The graph to add nodes to.
        policy: Its ensemble counts.
        exit_index: The exit.
        logits: Name of the exit's own logits (B, C).
        before: Memory of the exits before.

    Returns:
        Name of the policy's logits (B, C), and the memory with the exit's own added.
    """
    if policy.ensemble is None:
        return logits, before
    memory = replace(before, logits=(*before.logits, (exit_index, logits)))
    own = dict(memory.logits)
    weights = effective_weights(policy.ensemble, exit_index, policy.answering)
    parts = [scope.op("Mul", own[j], scope.constant(weight, np.float32)) for j, weight in weights.items()]
    return (scope.op("Sum", *parts) if len(parts) > 1 else parts[0]), memory


def _is_broken(scope: Scope, logits: str, largest: str, axis: str) -> str:
    """Bool (B,): rows whose softmax is NaN, because a logit is NaN or the largest one is not finite."""
    nan = scope.op("ReduceMax", scope.op("Cast", scope.op("IsNaN", logits), to=FLOAT), axis, keepdims=0)
    return scope.op("Or", scope.op("Cast", nan, to=BOOL), scope.op("IsInf", largest))


def _max_prob(scope: Scope, probabilities: str, classes: int) -> str:
    return scope.op("ReduceMax", probabilities, scope.constant([1]), keepdims=0)


def _margin(scope: Scope, probabilities: str, classes: int) -> str:
    best = scope.op("TopK", probabilities, scope.constant([2]), axis=1, outputs=2)
    first, second = (scope.op("Gather", best, scope.constant(i), axis=1) for i in (0, 1))
    return scope.op("Sub", first, second)


def _entropy(scope: Scope, probabilities: str, classes: int) -> str:
    positive = scope.op("Max", probabilities, scope.constant(_TINY, np.float32))
    products = scope.op("Mul", probabilities, scope.op("Log", positive))
    negative = scope.op("ReduceSum", products, scope.constant([1]), keepdims=0)
    share = scope.op("Div", negative, scope.constant(math.log(classes), np.float32))
    return scope.op("Max", scope.op("Add", share, scope.constant(1, np.float32)), scope.constant(0, np.float32))


_TINY = float(np.finfo(np.float32).tiny)  # keeps 0 * log(0) at 0

_CONFIDENCES: dict[str, Callable[[Scope, str, int], str]] = {
    "max_prob": _max_prob,
    "margin": _margin,
    "entropy": _entropy,
}
"""By name, as in :data:`timm_dfs.inference.confidence.CONFIDENCES`; from probabilities (B, C) to (B,)."""


def check_left_out(scope: Scope, policy: ExitPolicy) -> str:
    """Write that thresholds which let an exit answer that is not in the file are an error, and return their new name.

    ONNX cannot raise errors, so a ``Gather`` reads out of bounds; its name, which runtimes report, tells the reason.
    """
    exits = len(policy.thresholds)
    left_out = sorted(set(range(exits)) - set(policy.answering))
    if not left_out:
        return THRESHOLDS
    highest = policy.highest_confidence
    of_these = scope.op("Gather", THRESHOLDS, scope.constant(left_out), axis=0)
    reached = scope.op("LessOrEqual", of_these, scope.constant(highest, np.float32))
    any_reached = scope.op("ReduceMax", scope.op("Cast", reached, to=INT), scope.constant([0]), keepdims=0)
    offset = scope.op("Mul", any_reached, scope.constant(exits))
    indices = scope.op("Add", scope.constant(list(range(exits))), offset)
    label = f"exits {', '.join(map(str, left_out))} are not in this file: keep their thresholds above {highest}"
    return scope.op("Gather", THRESHOLDS, indices, axis=0, label=label)
