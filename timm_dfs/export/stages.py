"""The layouts ``stages`` and ``last``: graphs without control flow, one for each exit or one for the last exit."""

from collections.abc import Sequence
from typing import Any

from ..inference.ensemble import effective_weights
from ..inference.policy import ExitPolicy
from .conditional import LOGITS, PROBABILITIES, copy_node
from .cut import Stage, rows_per_image, shrinks
from .network import BATCH, IMAGES, Network
from .scope import FLOAT, Scope


def last_graph(network: Network, stage: Stage, classes: int, batch: int | str, softmax: bool) -> Any:
    """``onnx.GraphProto`` of the last exit alone.

    Args:
        network: The network.
        stage: The only one of a cut at the last exit.
        classes: C.
        batch: Number of images, or the name of a dynamic axis.
        softmax: Put out probabilities instead of logits.
    """
    scope = Scope("main")
    names = _copied(scope, network, stage, {IMAGES: IMAGES})
    logits = names[stage.logits]
    name = PROBABILITIES if softmax else LOGITS
    scope.call(scope.op("Softmax", logits, axis=1) if softmax else logits, name)
    inputs = [scope.value(IMAGES, FLOAT, [batch, *network.shapes[IMAGES][1:]])]
    return scope.graph(inputs, [scope.value(name, FLOAT, [batch, classes])])


def stage_graphs(network: Network, stages: Sequence[Stage], classes: int, batch: int | str) -> list[Any]:
    """One ``onnx.GraphProto`` for each stage; its first output is the exit's logits, the others the state.

    Raises:
        ValueError: If a stage reads no tensor whose first axis is the batch.
    """
    states = _states(stages)
    graphs = []
    for place, stage in enumerate(stages):
        scope = Scope(f"stage_{place}")
        own = _inputs(stage)
        names = _copied(scope, network, stage, {name: states[name] for name in own})
        scope.call(names[stage.logits], LOGITS)
        size = batch if place == 0 else BATCH
        inputs = [_described(scope, network, name, states[name], size) for name in own]
        outputs = [scope.value(LOGITS, FLOAT, [size, classes])]
        for name in _outputs(stages, place):
            scope.call(names[name], states[name])
            outputs.append(_described(scope, network, name, states[name], size))
        graphs.append(scope.graph(inputs, outputs))
    return graphs


def routing(network: Network, stages: Sequence[Stage], policy: ExitPolicy, files: Sequence[str]) -> dict[str, Any]:
    """Order, inputs, outputs and rules of the stages, as ``router.json`` holds them.

    Args:
        network: The network.
        stages: Its stages.
        policy: The policy.
        files: Names of the stages' files.
    """
    states = _states(stages)
    return dict(
        stages=[
            dict(
                file=file,
                exit_index=stage.exit_index,
                inputs=[states[name] for name in _inputs(stage)],
                logits=LOGITS,
                outputs=[states[name] for name in _outputs(stages, place)],
                keeps=[states[name] for name in stages[place + 1].reads] if place + 1 < len(stages) else [],
                shrinks=place + 1 < len(stages) and shrinks(network, stages[place + 1]),
            )
            for place, (stage, file) in enumerate(zip(stages, files, strict=True))
        ],
        **rules(policy),
    )


def rules(policy: ExitPolicy) -> dict[str, Any]:
    """How a policy decides, as ``router.json`` holds it."""
    return dict(
        confidence=policy.confidence,
        thresholds=policy.json_thresholds,
        temperatures=policy.temperatures and list(policy.temperatures),
        weights=None
        if policy.ensemble is None
        else {
            str(k): {str(j): weight for j, weight in effective_weights(policy.ensemble, k, policy.answering).items()}
            for k in policy.answering
        },
    )


def _copied(scope: Scope, network: Network, stage: Stage, names: dict[str, str]) -> dict[str, str]:
    counted = next((here for name, here in names.items() if rows_per_image(network.shapes.get(name)) == 1), None)
    if counted is None:
        raise ValueError(
            f"The stage of exit {stage.exit_index} reads no tensor whose first axis is the batch; use the layout graph."
        )
    names = dict(names)
    weights = {tensor.name: tensor for tensor in network.graph.initializer}
    for name in stage.weights:
        scope.weights[name] = weights[name]
    for node in stage.nodes:
        copy_node(scope, node, names, f"@{stage.exit_index}", counted)
    return names


def _states(stages: Sequence[Stage]) -> dict[str, str]:
    """Names in files of the tensors that cross a cut."""
    crossing = dict.fromkeys(name for stage in stages[1:] for name in stage.reads if name != IMAGES)
    return {IMAGES: IMAGES, **{name: f"state_{i}" for i, name in enumerate(crossing)}}


def _inputs(stage: Stage) -> list[str]:
    """Tensors that the stage itself reads, among those that it or a deeper stage reads."""
    read = {name for node in stage.nodes for name in node.input} | {stage.logits}
    return [name for name in stage.reads if name in read]


def _outputs(stages: Sequence[Stage], place: int) -> list[str]:
    """Tensors of a stage that deeper stages read."""
    made = {name for node in stages[place].nodes for name in node.output}
    return [name for name in (stages[place + 1].reads if place + 1 < len(stages) else ()) if name in made]


def _described(scope: Scope, network: Network, name: str, here: str, batch: int | str) -> Any:
    first, *sizes = network.shapes[name]
    rows = rows_per_image(network.shapes[name])
    if rows:
        first = batch if rows == 1 else rows * batch if isinstance(batch, int) else f"{rows}*{batch}"
    return scope.value(here, network.types[name], [first, *sizes])
