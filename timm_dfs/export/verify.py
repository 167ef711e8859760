"""Checks of an exported model against :func:`timm_dfs.predict`."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..base.model import MultiExitModel
from ..inference.confidence import PATIENCE, confidence_function
from ..inference.policy import ExitPolicy
from ..inference.prediction import predict

TOLERANCE = 1e-4
"""Largest difference of logits; where the largest logit is above 1, as a share of it."""

NEAR = 1e-5
"""Distance of a confidence from its threshold below which rounding may choose the exit."""

Run = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Called as ``run(images, thresholds)``; returns logits or probabilities (B, C), and exits (B,)."""


@dataclass(frozen=True)
class Check:
    """Result of a comparison with :func:`timm_dfs.predict` that found no fault.

    Attributes:
        thresholds: ``"policy"``, or ``"mixed"``: chosen so that about as many images leave at each exit.
        batch_size: Images a batch.
        exit_counts: How many images left at each exit of the network.
        largest_difference: Of logits, or of probabilities where those are put out.
        near_threshold: How many images were excepted, a confidence of theirs being within 1e-5 of its threshold.
    """

    thresholds: str
    batch_size: int
    exit_counts: tuple[int, ...]
    largest_difference: float
    near_threshold: int


@torch.inference_mode()
def verify(
    model: MultiExitModel, policy: ExitPolicy, images: torch.Tensor, run: Run, batch: int | None, softmax: bool
) -> tuple[Check, ...]:
    """Compare a runtime's predictions with those of :func:`timm_dfs.predict`, at batch 1 and all images in one batch.

    Args:
        model: The exported model.
        policy: Its policy.
        images: (N, C, H, W).
        run: The runtime.
        batch: The only batch size that the file takes; N is a multiple of it. ``None``: any.
        softmax: Whether it puts out probabilities.

    Raises:
        ValueError: If logits or exits differ.
    """
    logits = torch.stack(model.forward_exits(images))
    policies = {"policy": policy}
    if len(policy.answering) > 1:
        policies["mixed"] = mixed(policy, logits)
    sizes = (1, len(images)) if batch is None else (batch,)
    return tuple(
        _compare(model, name, each, near_threshold(each, logits), images, run, size, softmax)
        for name, each in policies.items()
        for size in dict.fromkeys(sizes)
    )


def _compare(
    model: MultiExitModel,
    name: str,
    policy: ExitPolicy,
    near: torch.Tensor,
    images: torch.Tensor,
    run: Run,
    size: int,
    softmax: bool,
) -> Check:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The logits of samples")  # NaN is compared below
        expected, exits = predict(model, images, policy)
    if softmax:
        if policy.temperatures is not None:
            expected = expected / torch.tensor(policy.temperatures)[exits][:, None]
        expected = expected.softmax(-1)
    thresholds = np.asarray(policy.thresholds, np.float32)
    results = [run(part.numpy(), thresholds) for part in images.split(size)]
    found, left = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*results))
    other = (left != exits) & ~near
    if other.any():
        row = int(other.nonzero()[0])
        raise ValueError(
            f"Verification failed: with {name} thresholds at batch {size}, image {row} leaves at exit {left[row]}, "
            f"but predict says exit {exits[row]}; {int(other.sum())} of {len(images)} differ. Nothing was written."
        )
    same = left == exits
    difference = (found - expected)[same].abs()
    difference[found[same].isnan() & expected[same].isnan()] = 0
    largest = difference.max().item() if difference.numel() else 0.0
    finite = expected[expected.isfinite()]
    allowed = TOLERANCE * max(1.0, finite.abs().max().item() if finite.numel() else 1.0)
    if not largest <= allowed:
        raise ValueError(
            f"Verification failed: with {name} thresholds at batch {size}, logits differ by {largest:.1e} from "
            f"predict's; at most {allowed:.1e} is allowed. Nothing was written."
        )
    counts = torch.bincount(left, minlength=model.num_exits).tolist()
    return Check(name, size, tuple(counts), largest, int(near.sum()))


def mixed(policy: ExitPolicy, logits: torch.Tensor) -> ExitPolicy:
    """A policy with the same exits and confidence by which images leave at all of its exits, if they can.

    Args:
        policy: The policy.
        logits: (E, N, C) of the images.
    """
    *early, last = policy.answering
    thresholds = [float("inf")] * len(policy.thresholds)
    thresholds[last] = 0.0
    if policy.confidence == PATIENCE:
        for k in early:
            thresholds[k] = 1.0
        return ExitPolicy(thresholds, PATIENCE)
    active = torch.ones(logits.shape[1], dtype=torch.bool)
    for place, k in enumerate(early):
        confidence = _confidence(policy, k, logits)
        values = confidence[active & confidence.isfinite()].sort(descending=True).values
        leaving = round(len(values) / (len(early) - place + 1))
        if 0 < leaving < len(values):
            thresholds[k] = (values[leaving - 1] + values[leaving]).item() / 2
            active &= ~(confidence >= thresholds[k])
        else:
            thresholds[k] = 1.0
    return ExitPolicy(thresholds, policy.confidence, policy.temperatures)


def near_threshold(policy: ExitPolicy, logits: torch.Tensor) -> torch.Tensor:
    """Bool (N,): images whose exit rounding may choose, given all exits' logits (E, N, C)."""
    early = policy.answering[:-1]
    near = torch.zeros(logits.shape[1], dtype=torch.bool)
    for k in early:
        if policy.confidence == PATIENCE:
            if logits.shape[-1] > 1:
                first, second = logits[k].topk(2).values.unbind(-1)
                near |= first - second < NEAR
        else:
            near |= (_confidence(policy, k, logits) - policy.thresholds[k]).abs() < NEAR
    return near


def _confidence(policy: ExitPolicy, exit_index: int, logits: torch.Tensor) -> torch.Tensor:
    temperature = 1.0 if policy.temperatures is None else policy.temperatures[exit_index]
    return confidence_function(policy.confidence)(logits[exit_index] / temperature)
