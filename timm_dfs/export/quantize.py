"""Static int8 quantization of a network before it is cut, and thresholds that suit the quantized network."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from ..inference.confidence import PATIENCE
from ..inference.policy import ExitPolicy
from .network import IMAGES, Network, network_of, require
from .verify import leaving_at

BATCH_SIZE = 32
"""Images a batch of calibration."""

MOST_LOST = 3
"""Accuracy in percentage points that quantization may cost without a warning."""

FEWEST = 30
"""Images at an exit that are enough to choose its threshold by."""


@dataclass(frozen=True)
class Quantization:
    """Results on the calibration images, before and after quantization.

    Attributes:
        samples: How many images.
        accuracy: Top-1 of the policy, percent: in float32, in int8.
        last_exit_accuracy: The same of the last exit.
        exit_counts: Images that left at each exit: in float32, in int8 with the new thresholds.
        thresholds: Those thresholds, ``None`` where an exit is switched off.
    """

    samples: int
    accuracy: tuple[float, float]
    last_exit_accuracy: tuple[float, float]
    exit_counts: tuple[tuple[int, ...], tuple[int, ...]]
    thresholds: tuple[float | None, ...]


def quantize(network: Network, images: torch.Tensor) -> Network:
    """A network with int8 weights and activations, whose ranges are those of these images.

    Weights are quantized by channel to 7 bits, which the 8-bit multiplication of processors without VNNI does not
    saturate at.

    Args:
        network: The network in float32.
        images: (N, C, H, W).
    """
    onnx, quantization = require("onnx"), require("onnxruntime.quantization")
    with TemporaryDirectory() as folder:
        before, after = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        before.write_bytes(flat_model(network).SerializeToString())
        with _without_advice():
            quantization.quantize_static(
                before,
                after,
                _Reader(images),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        quantized = onnx.shape_inference.infer_shapes(onnx.load(after))
    return network_of(quantized.graph, network.opset)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep back onnxruntime's advice to optimise the graph first, which torch's exporter has done."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Reader:
    """Batches of images, as onnxruntime's ``CalibrationDataReader`` gives them."""

    def __init__(self, images: torch.Tensor):
        self._batches = iter(images.split(BATCH_SIZE))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {IMAGES: batch.numpy()}


def flat_model(network: Network) -> Any:
    """``onnx.ModelProto`` that puts out every exit's logits."""
    onnx = require("onnx")
    return onnx.helper.make_model(
        network.graph, opset_imports=[onnx.helper.make_opsetid("", network.opset)], ir_version=10
    )


def all_logits(network: Network, images: torch.Tensor) -> torch.Tensor:
    """Every exit's logits (E, N, C) of images (N, C, H, W), from ONNX Runtime."""
    session = require("onnxruntime").InferenceSession(
        flat_model(network).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    parts = [np.stack(session.run(None, {IMAGES: part.numpy()})) for part in images.split(BATCH_SIZE)]
    return torch.from_numpy(np.concatenate(parts, 1))


def refit(policy: ExitPolicy, before: torch.Tensor, after: torch.Tensor, targets: torch.Tensor) -> Quantization:
    """Thresholds with which as many images leave at each exit as before quantization.

    Patience counts exits, so its thresholds stay. Warns of thresholds that few images decide.

    Args:
        policy: The policy.
        before: Logits (E, N, C) in float32.
        after: Logits (E, N, C) in int8.
        targets: Classes (N,).
    """
    exits = policy.exit_index(before)
    counts = torch.bincount(exits, minlength=len(before)).tolist()
    new = leaving_at(policy, after, counts)
    exits_after = new.exit_index(after)
    if policy.confidence != PATIENCE:
        _warn_of_few(policy, exits_after)
    last = torch.full_like(exits, len(before) - 1)
    correct = [
        (_correct(policy.predicted(before), exits, targets), _correct(new.predicted(after), exits_after, targets)),
        (_correct(before, last, targets), _correct(after, last, targets)),
    ]
    _warn_of_fall(correct)
    early, of_last = ((_percent(one), _percent(other)) for one, other in correct)
    return Quantization(
        samples=len(targets),
        accuracy=early,
        last_exit_accuracy=of_last,
        exit_counts=(tuple(counts), tuple(torch.bincount(exits_after, minlength=len(before)).tolist())),
        thresholds=tuple(new.json_thresholds),
    )


def _warn_of_few(policy: ExitPolicy, exits: torch.Tensor) -> None:
    """Warn of exits that few images reach. None comes behind a threshold of 0, at which all leave."""
    fitted = takewhile(lambda k: policy.thresholds[k] > 0, policy.answering[:-1])
    reached = {k: int((exits >= k).sum()) for k in fitted}
    few = [f"exit {k} ({count})" for k, count in reached.items() if count < FEWEST]
    if few:
        warnings.warn(
            f"Few calibration images reach {', '.join(few)}; choosing a threshold in int8 takes at least {FEWEST} "
            "at each exit, so give more.",
            stacklevel=4,
        )


def _warn_of_fall(correct: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Warn of an accuracy that falls by more than :data:`MOST_LOST`, and more than chance explains.

    Args:
        correct: Which samples are classified correctly (N,) in float32 and in int8: with early exit, by the last exit.
    """
    for name, (before, after) in zip(("early exit", "the last exit"), correct):
        lost = 100 * (before - after)
        if lost.mean() - 2 * lost.std() / len(lost) ** 0.5 > MOST_LOST:
            warnings.warn(
                f"In int8 the accuracy of {name} is {_percent(after):.1f} % instead of {_percent(before):.1f} % on the "
                "calibration images; this network loses much by quantization, so export it in float32.",
                stacklevel=4,
            )


def _correct(logits: torch.Tensor, exits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    chosen = logits[exits, torch.arange(len(exits))]
    return (chosen.argmax(-1) == targets).double()


def _percent(correct: torch.Tensor) -> float:
    return 100 * correct.mean().item()
