"""Checks of the logits and targets that operating points and temperatures are fitted to."""

import warnings
from collections.abc import Collection

import torch


def check_data(name: str, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Raise ``ValueError`` unless ``data`` are finite logits (E, N, C) and the targets (N,) of their samples."""
    logits, targets = data
    check_logits(logits)
    check_on_cpu(targets)
    if targets.shape != logits.shape[1:2]:
        raise ValueError(f"{name} has {logits.shape[1]} samples but targets of shape {tuple(targets.shape)}.")
    check_targets(targets, logits.shape[-1])


def check_logits(logits: torch.Tensor) -> None:
    """Raise ``ValueError`` unless these are finite logits (E, N, C > 1) on the CPU, no size 0.

    Warns if they are probabilities.
    """
    check_on_cpu(logits)
    if logits.ndim != 3 or logits.numel() == 0:
        raise ValueError(f"Logits have shape {tuple(logits.shape)}; give (exits, samples, classes), none of them 0.")
    if logits.shape[-1] == 1:
        raise ValueError("Logits are of one class, whose softmax is always 1; give at least two classes.")
    check_finite(logits)
    warn_of_probabilities(logits)


def check_on_cpu(*tensors: torch.Tensor) -> None:
    """Raise ``ValueError`` unless logits and targets are on the CPU, where choices are made and measured."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"Logits or targets are on {tensor.device}; give both on the CPU, as collect_logits does: .cpu()."
            )


def check_targets(targets: torch.Tensor, classes: int) -> None:
    """Raise ``ValueError`` unless targets are integers in 0 … ``classes`` - 1."""
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.min() < 0 or targets.max() >= classes:
        raise ValueError(
            f"Targets are {targets.dtype} from {targets.min()} to {targets.max()}; give integers in 0 … {classes - 1}."
        )


def check_finite(logits: torch.Tensor) -> None:
    """Raise ``ValueError``, naming sample and exit, unless all logits (E, N, C) are finite."""
    if not logits.isfinite().all():
        bad = (~logits.isfinite()).any(-1).nonzero()[0].tolist()
        raise ValueError(f"Logits of sample {bad[1]} at exit {bad[0]} are not finite; leave such samples out.")


def warn_of_probabilities(logits: torch.Tensor) -> None:
    """Warn if logits (E, N, C) are softmax outputs, whose softmax would be far less confident than the network."""
    if logits.shape[-1] > 1 and logits.min() >= 0 and logits.max() <= 1:
        sums = logits.sum(-1, dtype=torch.float32)
        if torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
            warnings.warn(
                "All logits are in [0, 1] and sum to 1, so they look like softmax outputs, to which the softmax would "
                "be applied again; give logits.",
                stacklevel=4,
            )


def early_exits(exits: Collection[int] | None, num_exits: int) -> list[int]:
    """The early exits among those that may be active, by default all.

    Raises:
        ValueError: If one of them does not exist.
    """
    last = num_exits - 1
    unknown = [k for k in exits or () if k not in range(num_exits)]
    if unknown:
        raise ValueError(f"exits names {unknown}; the exits are 0 to {last}.")
    return list(range(last)) if exits is None else sorted(set(exits) - {last})


def halves(
    data: tuple[torch.Tensor, torch.Tensor],
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Split samples into two random halves, the same ones at every call."""
    logits, targets = data
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    return (logits[:, first], targets[first]), (logits[:, second], targets[second])
