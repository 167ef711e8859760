"""Checks of the logits and targets that everything here is fitted to."""

import torch


def check_data(name: str, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Raise ``ValueError`` unless ``data`` are finite logits (E, N, C) and their samples' targets (N,)."""
    logits, targets = data
    check_logits(logits)
    if targets.shape != logits.shape[1:2]:
        raise ValueError(f"{name} has {logits.shape[1]} samples but targets of shape {tuple(targets.shape)}.")
    check_targets(targets, logits.shape[-1])


def check_logits(logits: torch.Tensor) -> None:
    """Raise ``ValueError`` unless these are finite logits (E, N, C), none of the sizes 0."""
    if logits.ndim != 3 or logits.numel() == 0:
        raise ValueError(f"Logits have shape {tuple(logits.shape)}; give (exits, samples, classes), none of them 0.")
    check_finite(logits)


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
