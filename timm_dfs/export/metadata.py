"""Metadata of an exported file: preparation of images, labels, policy, costs and versions."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import timm
import torch

from ..base.model import MultiExitModel
from ..data.images import data_config, labels_of
from ..evaluation.flops import exit_flops, last_exit_flops
from ..inference.policy import ExitPolicy
from ..version import __version__
from .network import require


def describe(
    model: MultiExitModel,
    input_size: tuple[int, int, int],
    layout: str,
    policy: ExitPolicy | None,
    preset: str | None,
    packages: Sequence[str] = ("onnx", "onnxscript"),
) -> dict[str, Any]:
    """Facts about an exported model, in the words of timm's ``pretrained_cfg`` where it has them.

    Args:
        model: The exported model.
        input_size: (channels, height, width) of its images.
        layout: The layout.
        policy: The policy; ``None`` for the last exit alone.
        preset: Name of the preset that the policy is.
        packages: Distributions whose versions are among the facts.
    """
    config = data_config(model)
    facts: dict[str, Any] = dict(
        architecture=model.pretrained_cfg.get("architecture"),
        tag=model.pretrained_cfg.get("tag"),
        layout=layout,
        num_classes=model.num_classes,
        label_names=labels_of(model),
        input_size=input_size,
        **{key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        last_exit_macs=last_exit_flops(model, input_size),
        versions={
            **{"timm_dfs": __version__, "timm": timm.__version__, "torch": torch.__version__},
            **{name: version(name) for name in packages},
        },
    )
    if policy is not None:
        costs = exit_flops(model, input_size, lazy=True, heads=policy.answering)
        facts.update(
            num_exits=model.num_exits,
            exits=policy.answering,
            preset=preset,
            confidence=policy.confidence,
            thresholds=policy.json_thresholds,
            temperatures=policy.temperatures,
            ensemble=policy.ensemble,
            exit_macs=[costs[k] for k in policy.answering],
        )
    return {key: value for key, value in facts.items() if value is not None}


def to_model(graph: Any, opset: int, facts: dict[str, Any]) -> Any:
    """``onnx.ModelProto`` of a graph; each fact is a metadata property whose value is text, or else JSON.

    Raises:
        ValueError: If the graph is not valid ONNX.
    """
    onnx = require("onnx")
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=_IR_VERSION,
        producer_name="timm_dfs",
        producer_version=__version__,
    )
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, allow_nan=False) for key, value in facts.items()
    }
    onnx.helper.set_model_props(model, texts)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"The exported graph is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
    return model


_IR_VERSION = 10
"""Of the file format; runtimes older than the newest onnx read it."""
