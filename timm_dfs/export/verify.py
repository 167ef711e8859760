"""Comparison of an exported model's predictions with those expected of it."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..inference.confidence import PATIENCE, confidence_function
from ..inference.policy import ExitPolicy
from ..inference.prediction import Prediction

TOLERANCE = 1e-4
"""Largest difference of logits; where the largest logit is above 1, as a share of it."""

NEAR = 1e-5
"""Distance of a confidence from its threshold below which rounding may choose the exit."""

Run = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Called as ``run(images, thresholds)``; returns logits or probabilities (B, C), and exits (B,)."""


@dataclass(frozen=True)
class Check:
    """Result of a comparison that found no fault.

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


Expect = Callable[[ExitPolicy], Prediction]
"""Expected exits and logits of images with a policy."""


def verify(
    expect: Expect,
    logits: torch.Tensor,
    policy: ExitPolicy,
    images: torch.Tensor,
    run: Run,
    batch: int | None,
    softmax: bool,
) -> tuple[Check, ...]:
    """Compare a runtime's predictions with the expected ones, at batch 1 and with all images in one batch.

    Args:
        expect: What is expected, such as :func:`timm_dfs.predict` returns it.
        logits: Every exit's logits (E, N, C).
        policy: The policy.
        images: (N, C, H, W).
        run: The runtime.
        batch: The only batch size that the file takes; N is a multiple of it. ``None``: any.
        softmax: Whether it puts out probabilities.

    Raises:
        ValueError: If logits or exits differ.
    """
    policies = {"policy": policy}
    if len(policy.answering) > 1:
        policies["mixed"] = mixed(policy, logits)
    sizes = (1, len(images)) if batch is None else (batch,)
    checks = []
    for name, each in policies.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The logits of samples")  # NaN is compared below
            expected = expect(each)
        if softmax:
            expected = expected._replace(logits=_probabilities(each, expected))
        near = near_threshold(each, logits)
        if name == "mixed":
            _warn_of_uncompared(each, expected.exit_index[~near])
        thresholds = np.asarray(each.thresholds, np.float32)
        for size in dict.fromkeys(sizes):
            results = [run(part.numpy(), thresholds) for part in images.split(size)]
            found = Prediction(*(torch.from_numpy(np.concatenate(parts)) for parts in zip(*results)))
            largest = _compare(f"with {name} thresholds at batch {size}", found, expected, near)
            counts = torch.bincount(found.exit_index, minlength=len(logits)).tolist()
            checks.append(Check(name, size, tuple(counts), largest, int(near.sum())))
    return tuple(checks)


def _warn_of_uncompared(policy: ExitPolicy, exits: torch.Tensor) -> None:
    """Warn of exits at which no image is sure to leave by thresholds that :func:`mixed` chose for all of them."""
    missing = sorted(set(policy.answering) - set(exits.tolist()))
    if missing and policy.confidence != PATIENCE:
        warnings.warn(
            f"No image that was verified with leaves at exits {', '.join(map(str, missing))}, so their logits were not "
            "compared; give more images, and different ones, or leave images out.",
            stacklevel=4,
        )


def _compare(where: str, found: Prediction, expected: Prediction, near: torch.Tensor) -> float:
    """The largest difference of logits; too large a one, or another exit, is an error."""
    other = (found.exit_index != expected.exit_index) & ~near
    if other.any():
        row = int(other.nonzero()[0])
        raise ValueError(
            f"Verification failed: {where}, image {row} leaves at exit {found.exit_index[row]}, but predict says exit "
            f"{expected.exit_index[row]}; {int(other.sum())} of {len(other)} images differ. Nothing was written."
        )
    same = found.exit_index == expected.exit_index
    difference = (found.logits - expected.logits)[same].abs()
    difference[(found.logits.isnan() & expected.logits.isnan())[same]] = 0
    largest = difference.max().item() if difference.numel() else 0.0
    finite = expected.logits[expected.logits.isfinite()]
    allowed = TOLERANCE * max(1.0, finite.abs().max().item() if finite.numel() else 1.0)
    if not largest <= allowed:
        raise ValueError(
            f"Verification failed: {where}, logits differ by {largest:.1e} from predict's; at most {allowed:.1e} is "
            "allowed. Nothing was written."
        )
    return largest


def _probabilities(policy: ExitPolicy, prediction: Prediction) -> torch.Tensor:
    logits, exits = prediction
    if policy.temperatures is not None:
        logits = logits / torch.tensor(policy.temperatures)[exits][:, None]
    return logits.softmax(-1)


def mixed(policy: ExitPolicy, logits: torch.Tensor) -> ExitPolicy:
    """A policy with the same exits and confidence by which about as many images leave at each of its exits.

    Args:
        policy: The policy.
        logits: (E, N, C) of the images.
    """
    if policy.confidence == PATIENCE:
        return policy.with_thresholds([1.0 if k in policy.answering else None for k in range(len(logits))])
    share, left = divmod(logits.shape[1], len(policy.answering))
    counts = [0] * len(logits)
    for place, k in enumerate(policy.answering):
        counts[k] = share + (place >= len(policy.answering) - left)  # the last exit first: all before it run with it
    start = [None if k not in policy.answering else 0.0 if counts[k] else 1.0 for k in range(len(logits))]
    return leaving_at(policy.with_thresholds(start), logits, counts)


def leaving_at(policy: ExitPolicy, logits: torch.Tensor, counts: Sequence[int]) -> ExitPolicy:
    """A policy with other thresholds, half-way between two images, by which so many images leave at each exit.

    Where all or none of the images that reach an exit are to leave there, they bound its threshold from one side only:
    it stays, or is moved just as far as it must. Where none reaches it, and with patience, it stays.

    Args:
        policy: Its exits and confidence stay.
        logits: (E, N, C) of the images.
        counts: Images for each exit; those of the last exit are the rest.
    """
    if policy.confidence == PATIENCE:
        return policy
    thresholds = list(policy.thresholds)
    logits = policy.predicted(logits)
    active = torch.ones(logits.shape[1], dtype=torch.bool)
    for k in policy.answering[:-1]:
        confidence = _confidence(policy, k, logits)
        values = confidence[active & confidence.isfinite()].sort(descending=True).values.double()
        if 0 < counts[k] < len(values):
            thresholds[k] = ((values[counts[k] - 1] + values[counts[k]]) / 2).item()
        elif counts[k] and len(values):
            thresholds[k] = min(thresholds[k], values[-1].item())
        elif len(values):  # above the largest, which would leave at its own confidence
            thresholds[k] = max(thresholds[k], min(values[0].item() + NEAR, 1.0))
        active &= ~(confidence >= thresholds[k])
    return policy.with_thresholds(thresholds)


def near_threshold(policy: ExitPolicy, logits: torch.Tensor) -> torch.Tensor:
    """Bool (N,): images whose exit rounding may choose, given all exits' logits (E, N, C)."""
    early, logits = policy.answering[:-1], policy.predicted(logits)
    near = torch.zeros(logits.shape[1], dtype=torch.bool)
    for k in early:
        if policy.confidence == PATIENCE:
            first, second = logits[k].topk(2).values.unbind(-1)
            near |= first - second < NEAR
        else:
            near |= (_confidence(policy, k, logits) - policy.thresholds[k]).abs() < NEAR
    return near


def _confidence(policy: ExitPolicy, exit_index: int, logits: torch.Tensor) -> torch.Tensor:
    temperature = 1.0 if policy.temperatures is None else policy.temperatures[exit_index]
    return confidence_function(policy.confidence)(logits[exit_index] / temperature)
