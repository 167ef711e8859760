"""What each exit is worth over a whole data set."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..base.evaluating import as_images, evaluating, require_exits
from ..base.model import MultiExitModel
from ..calibration.logits import check_finite, check_targets


def collect_logits(
    model: MultiExitModel, loader: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of every exit for every sample of a loader, in its order.

    Args:
        model: A network with exits; evaluated in eval mode and left in the mode it was in.
        loader: Batches of images (B, in_chans, H, W) and targets (B,); moved to the model's device and type.

    Returns:
        Logits (E, N, C) in float32 and targets (N,), both on the CPU.

    Raises:
        ValueError: If the loader is empty.
    """
    require_exits(model)
    logits, targets = [], []
    with evaluating(model), torch.inference_mode():
        for x, target in loader:
            if target.shape != x.shape[:1]:
                raise ValueError(f"A batch has {len(x)} images but targets of shape {tuple(target.shape)}; give (B,).")
            answers = torch.stack(model.forward_exits(as_images(model, x)))
            logits.append(answers.float().cpu())
            targets.append(target.cpu())
    if not logits:
        raise ValueError("The loader gave no batch; check the data set and split.")
    return torch.cat(logits, 1), torch.cat(targets)


def anytime_accuracy(logits: torch.Tensor, targets: torch.Tensor, topk: int = 1) -> torch.Tensor:
    """Accuracy of each exit over all samples (anytime prediction; MSDNet, section 5).

    Args:
        logits: Logits (E, N, C).
        targets: Targets (N,).
        topk: Count an answer as right if the target is among the ``topk`` largest logits.

    Returns:
        Accuracy (E,), percent, float32.

    Raises:
        ValueError: If shapes disagree, there is no sample, or ``topk`` is not in 1 … C.
    """
    _check(logits, targets)
    if not 1 <= topk <= logits.shape[-1]:
        raise ValueError(f"topk is {topk}; there are {logits.shape[-1]} classes.")
    right = (logits.topk(topk).indices == targets[:, None]).any(-1)
    return 100 * right.float().mean(1)


def calibration_error(logits: torch.Tensor, targets: torch.Tensor, bins: int = 15) -> torch.Tensor:
    """Expected calibration error of each exit (Guo et al., ICML 2017, arXiv 1706.04599, equation 5).

    Args:
        logits: Logits (E, N, C).
        targets: Targets (N,).
        bins: Number of equally wide bins of confidence.

    Returns:
        Error (E,) in [0, 1], float32.

    Raises:
        ValueError: If shapes disagree, there is no sample, or ``bins`` is not positive.
    """
    found = reliability(logits, targets, bins)
    gap = (found.accuracy - found.confidence).abs() * found.share
    return gap.nansum(1).float()


class Reliability(NamedTuple):
    """What each exit is right about, by how sure it is.

    Attributes:
        share: Share of the samples in each bin of confidence (E, bins).
        accuracy: Share of those that are right (E, bins); NaN where there are none.
        confidence: Their mean confidence (E, bins); NaN where there are none.
    """

    share: torch.Tensor
    accuracy: torch.Tensor
    confidence: torch.Tensor


def reliability(logits: torch.Tensor, targets: torch.Tensor, bins: int = 15) -> Reliability:
    """A reliability diagram of each exit (Guo et al., ICML 2017, section 2).

    Args:
        logits: Logits (E, N, C).
        targets: Targets (N,).
        bins: Number of equally wide bins of confidence, the largest softmax probability; each holds its upper end.

    Raises:
        ValueError: If shapes disagree, there is no sample, or ``bins`` is not positive.
    """
    _check(logits, targets)
    if bins < 1:
        raise ValueError(f"bins is {bins}; give at least 1.")
    confidence, answer = logits.softmax(-1, dtype=torch.float32).max(-1)
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count, right, sure = (
        torch.zeros(len(logits), bins, dtype=torch.float64).scatter_add_(1, index, values.double())
        for values in (torch.ones_like(confidence), answer == targets, confidence)
    )
    return Reliability(count / len(targets), right / count, sure / count)


def risk_coverage(logits: torch.Tensor, targets: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """How often each exit errs that answers only what it is surest of (Geifman and El-Yaniv, NeurIPS 2017, section 2).

    Args:
        logits: Logits (E, N, C).
        targets: Targets (N,).

    Returns:
        For each exit coverage and risk, shares in float64: one value for each different confidence, the largest softmax
        probability, from the surest samples alone to all of them. Samples that are equally sure come together.

    Raises:
        ValueError: If shapes disagree or there is no sample.
    """
    _check(logits, targets)
    confidence, answer = logits.softmax(-1, dtype=torch.float32).max(-1)
    wrong = (answer != targets).double()
    answered = torch.arange(1, len(targets) + 1, dtype=torch.float64)
    curves = []
    for sure, errors in zip(confidence, wrong, strict=True):
        order = sure.argsort(descending=True)
        last = torch.cat([sure[order].diff() != 0, torch.tensor([True])])
        curves.append(((answered / len(targets))[last], (errors[order].cumsum(0) / answered)[last]))
    return curves


def _check(logits: torch.Tensor, targets: torch.Tensor) -> None:
    if logits.ndim != 3 or len(logits) == 0 or targets.shape != logits.shape[1:2] or len(targets) == 0:
        raise ValueError(
            f"Logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}; "
            "give (exits, samples, classes) and (samples,), at least one sample."
        )
    check_finite(logits)
    check_targets(targets, logits.shape[-1])
