"""ONNX Runtime's ways to predict, for benchmarks that compare it with PyTorch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..base.model import MultiExitModel
from ..evaluation.bench import LAST_EXIT, Way, policy_costs
from ..evaluation.flops import last_exit_flops
from ..inference.policy import ExitPolicy
from .to_onnx import MODEL_FILE, VERIFIED, export_onnx, open_session

RUNTIME = "ONNX Runtime"


def onnx_ways(
    model: MultiExitModel,
    images: torch.Tensor,
    policies: Mapping[str, ExitPolicy],
    folder: str | Path,
    counted: MultiExitModel | None = None,
) -> dict[str, Way]:
    """Export a network and let ONNX Runtime predict, with as many threads as PyTorch has.

    Args:
        model: A network with exits, not fused: the export folds its norms.
        images: (N, C, H, W), normalised.
        policies: Operating points by name. Those that differ only in the values of their thresholds share a file.
        folder: Folder for the files.
        counted: The network whose multiply-adds are counted, e.g. the fused one; by default ``model``.

    Returns:
        The last exit alone and each policy, to be timed by :func:`timm_dfs.evaluation.bench.measure`.

    Raises:
        ValueError: If the network cannot be exported, see :func:`timm_dfs.export_onnx`.
        ModuleNotFoundError: Without the extra ``deploy``.
    """
    folder, counted = Path(folder), counted or model
    given = images.contiguous()
    whole = torch.full((len(images),), float(last_exit_flops(counted, tuple(images.shape[1:]))), dtype=torch.float64)
    export_onnx(model, folder / "last", layout="last", images=images[:VERIFIED])
    last = f"{RUNTIME}, last exit"
    ways = {f"{LAST_EXIT}, ONNX": Way(_runner(_session(folder / "last")), given, whole, is_whole=True, pool=last)}
    sessions: dict[str, Any] = {}
    for name, policy in policies.items():
        if len(policy.answering) == 1:
            continue  # its file would be the last exit alone
        graph = graph_of(policy)
        if graph not in sessions:
            place = folder / f"graph_{len(sessions)}"
            export_onnx(model, place, policy, images=images[: max(VERIFIED, len(policy.answering))])
            sessions[graph] = _session(place)
        thresholds = np.asarray(policy.thresholds, np.float32)
        ways[f"{name}, ONNX"] = Way(
            _runner(sessions[graph], thresholds=thresholds),
            given,
            policy_costs(counted, images, policy),
            pool=f"{RUNTIME}, {graph}",
        )
    return ways


def graph_of(policy: ExitPolicy) -> str:
    """Name of the graph that a policy is exported to; thresholds are an input, so only the rest of it counts."""
    return repr((policy.confidence, policy.answering, policy.temperatures, policy.ensemble))


def _session(folder: Path) -> Any:
    return open_session(folder / MODEL_FILE, torch.get_num_threads())


def _runner(session: Any, **constant: np.ndarray) -> Callable[[torch.Tensor], object]:
    return lambda images: session.run(None, {"images": images.numpy(), **constant})
