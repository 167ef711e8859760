"""Accuracy and calibration of each exit over a data set."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..base.caches import forget
from ..base.evaluating import as_images, evaluating, require_classes, require_exits
from ..base.model import MultiExitModel
from ..calibration.logits import check_finite, check_on_cpu, check_targets, warn_of_probabilities


def collect_logits(
    model: MultiExitModel, loader: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Collect the logits of every exit for every sample of a loader, in its order.

    Args:
        model: A network with exits; it is evaluated in eval mode and returned to the mode it was in.
        loader: Batches of images (B, in_chans, H, W) and targets (B,); images are moved to the model's device and type.

    Returns:
        Logits (E, N, C) in float32 and targets (N,), both on the CPU.

    Raises:
        ValueError: If the loader is empty, a batch is not a pair of images and one target per image, or the model has
            one logit.

    Example:
        >>> import timm, torch, timm_dfs
        >>> model = timm.create_model("dfs_vgg7_cifar100", depths=(1, 1), widths=(8, 16), num_classes=10)
        >>> loader = [(torch.randn(4, 3, 32, 32), torch.arange(4)) for _ in range(3)]
        >>> logits, targets = timm_dfs.collect_logits(model, loader)
        >>> logits.shape, targets.shape
        (torch.Size([2, 12, 10]), torch.Size([12]))
    """
    require_exits(model)
    require_classes(model)
    forget(model)  # weights may have changed since the model was put into eval mode
    logits, targets = [], []
    with evaluating(model), torch.inference_mode():
        for batch in loader:
            x, target = _images_and_targets(batch)
            of_exits = torch.stack(model.forward_exits(as_images(model, x)))
            logits.append(of_exits.float().cpu())
            targets.append(target.cpu())
    if not logits:
        raise ValueError("The loader gave no batch; check the data set and split.")
    collected = torch.cat(logits, 1)
    warn_of_probabilities(collected)
    return collected, torch.cat(targets)


def _images_and_targets(batch: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Parts of a loader's batch; ``ValueError`` unless it is a pair of images and one target per image."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(x, torch.Tensor) for x in batch):
        parts = (
            f"with the keys {', '.join(map(str, batch))}"
            if isinstance(batch, dict)
            else f"of {len(batch)} parts"
            if isinstance(batch, (tuple, list))
            else ""
        )
        raise ValueError(
            f"The loader gave a {type(batch).__name__} {parts}; give pairs of tensors, images (B, C, H, W) and targets "
            "(B,), e.g. ((batch['image'], batch['label']) for batch in loader)."
        )
    x, target = batch
    if target.shape != x.shape[:1]:
        raise ValueError(
            f"A batch has {len(x)} images but targets of shape {tuple(target.shape)}; give one class each (B,). "
            "Multi-label classification, with several labels per image, is not supported."
        )
    return x, target


def anytime_accuracy(logits: torch.Tensor, targets: torch.Tensor, topk: int = 1) -> torch.Tensor:
    """Accuracy of each exit over all samples (anytime prediction; MSDNet, section 5).

    Args:
        logits: Logits (E, N, C).
        targets: Targets (N,).
        topk: A prediction is correct if the target is among the ``topk`` largest logits.

    Returns:
        Accuracy (E,), percent, float32.

    Raises:
        ValueError: If shapes disagree, there is no sample, or ``topk`` is not in 1 … C.

    Example:
        >>> import torch, timm_dfs
        >>> logits = torch.tensor([[[1.0, 2.0, 0.0], [0.0, 1.0, 2.0]], [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]])
        >>> timm_dfs.anytime_accuracy(logits, torch.tensor([0, 2]))  # 2 exits, 2 samples, 3 classes
        tensor([ 50., 100.])
    """
    _check(logits, targets)
    if not 1 <= topk <= logits.shape[-1]:
        raise ValueError(f"topk is {topk}; there are {logits.shape[-1]} classes.")
    correct = (logits.topk(topk).indices == targets[:, None]).any(-1)
    return 100 * correct.float().mean(1)


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

    Example:
        >>> import torch, timm_dfs
        >>> logits = torch.tensor([[[0.8, 0.2]] * 4]).log()  # 1 exit, 4 samples: a confidence of 80 %
        >>> timm_dfs.calibration_error(logits, torch.tensor([0, 0, 1, 1]))  # but 50 % correct
        tensor([0.3000])
    """
    found = reliability(logits, targets, bins)
    gap = (found.accuracy - found.confidence).abs() * found.share
    return gap.nansum(1).float()


class Reliability(NamedTuple):
    """Accuracy of each exit by confidence.

    Attributes:
        share: Share of the samples in each bin of confidence (E, bins).
        accuracy: Share of a bin's samples that are predicted correctly (E, bins); NaN in an empty bin.
        confidence: Mean confidence of a bin's samples (E, bins); NaN in an empty bin.
    """

    share: torch.Tensor
    accuracy: torch.Tensor
    confidence: torch.Tensor


def reliability(logits: torch.Tensor, targets: torch.Tensor, bins: int = 15) -> Reliability:
    """Compute the reliability diagram of each exit (Guo et al., ICML 2017, section 2).

    Args:
        logits: Logits (E, N, C).
        targets: Targets (N,).
        bins: Number of equally wide bins of confidence, the largest softmax probability; a bin includes its upper end.

    Raises:
        ValueError: If shapes disagree, there is no sample, ``bins`` is not positive, or tensors are not on the CPU.
    """
    check_on_cpu(logits, targets)
    _check(logits, targets)
    if bins < 1:
        raise ValueError(f"bins is {bins}; give at least 1.")
    warn_of_probabilities(logits)
    confidence, predicted = logits.softmax(-1, dtype=torch.float32).max(-1)
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count, correct, total = (
        torch.zeros(len(logits), bins, dtype=torch.float64).scatter_add_(1, index, values.double())
        for values in (torch.ones_like(confidence), predicted == targets, confidence)
    )
    return Reliability(count / len(targets), correct / count, total / count)


def risk_coverage(logits: torch.Tensor, targets: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Error of each exit on its most confident samples (Geifman and El-Yaniv, NeurIPS 2017, section 2).

    Args:
        logits: Logits (E, N, C).
        targets: Targets (N,).

    Returns:
        For each exit coverage and risk, shares in float64: one value for each distinct confidence, the largest softmax
        probability, from the most confident samples alone to all. Samples of equal confidence are taken together.

    Raises:
        ValueError: If shapes disagree, there is no sample, or tensors are not on the CPU.
    """
    check_on_cpu(logits, targets)
    _check(logits, targets)
    warn_of_probabilities(logits)
    confidence, predicted = logits.softmax(-1, dtype=torch.float32).max(-1)
    wrong = (predicted != targets).double()
    count = torch.arange(1, len(targets) + 1, dtype=torch.float64)
    curves = []
    for of_exit, errors in zip(confidence, wrong, strict=True):
        order = of_exit.argsort(descending=True)
        last = torch.cat([of_exit[order].diff() != 0, torch.tensor([True])])
        curves.append(((count / len(targets))[last], (errors[order].cumsum(0) / count)[last]))
    return curves


def _check(logits: torch.Tensor, targets: torch.Tensor) -> None:
    if logits.ndim != 3 or len(logits) == 0 or targets.shape != logits.shape[1:2] or len(targets) == 0:
        raise ValueError(
            f"Logits have shape {tuple(logits.shape)} and targets {tuple(targets.shape)}; "
            "give (exits, samples, classes) and (samples,), at least one sample."
        )
    check_finite(logits)
    check_targets(targets, logits.shape[-1])
