"""Bounds on the drop in accuracy that early exit causes, which hold with a stated probability.

The drop is the last exit's accuracy minus the policy's, both over all samples to come. On one sample it is 1 (only the
last exit is correct), -1 (only the policy is) or 0. Its mean is bounded by betting (Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", arXiv 2010.09686): the bound is valid for any number of
samples, and narrow where policy and last exit seldom differ. It assumes that the samples used for the bound and the
samples to come are drawn independently from the same distribution, and that nothing of the policy was chosen on them.

Several points are tested one after the other without a correction for multiple tests ("fixed-sequence testing":
Angelopoulos et al., "Learn then Test", arXiv 2110.01052; for early exit Jazbec et al., "Fast yet Safe", NeurIPS 2024,
arXiv 2405.20915): in an order fixed beforehand, a point may be trusted if all points before it were.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .logits import check_data
from .operating_point import Data, OperatingPoint, Risk
from .seen import fingerprints, refuse_seen

LARGEST_BET = 1.5
"""Largest share of the capital bet on one sample, in units of half the range of drops; below 2, at which one sample
could take all."""


def bound_risk(point: OperatingPoint, held_out: Data, confidence_level: float = 0.95) -> OperatingPoint:
    """Bound an operating point's drop in accuracy.

    Args:
        point: A point from :func:`timm_dfs.fit_operating_point`.
        held_out: Logits (E, N, C) and targets (N,) that the point was not fitted on.
        confidence_level: Probability, over the drawing of the samples, with which the bound of this point holds.

    Returns:
        The point with its ``risk``: the least bound that ``held_out`` allows, from 0 to 100 percentage points.

    Raises:
        ValueError: If the point was fitted on these samples, the data do not fit it, or ``confidence_level`` is not
            between 0 and 1.

    Example:
        >>> import torch, timm_dfs
        >>> _ = torch.manual_seed(0)
        >>> logits, targets = torch.randn(2, 200, 3).cumsum(0), torch.arange(200) % 3  # 2 exits, 200 samples, 3 classes
        >>> logits += 4 * torch.nn.functional.one_hot(targets, 3)
        >>> val, held_out = (logits[:, :100], targets[:100]), (logits[:, 100:], targets[100:])
        >>> point = timm_dfs.fit_operating_point(val, flops=[10, 30], max_accuracy_drop=1)
        >>> 0 < timm_dfs.bound_risk(point, held_out, confidence_level=0.9).risk.max_accuracy_drop < 20
        True
    """
    drops = _drops(point, held_out, confidence_level)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if is_shown(drops, middle, confidence_level) else (middle, high)
    return replace(point, risk=Risk(100 * high, confidence_level, len(drops)))


def control_risk(
    points: Sequence[OperatingPoint], held_out: Data, max_accuracy_drop: float, confidence_level: float = 0.95
) -> OperatingPoint:
    """Choose the cheapest point whose drop in accuracy is at most ``max_accuracy_drop`` with a stated probability.

    Args:
        points: Points from :func:`timm_dfs.operating_frontier`, tested in this order until the first that fails. The
            first must never exit early: its accuracy does not drop, whatever the samples.
        held_out: Logits (E, N, C) and targets (N,) that the points were not fitted on.
        max_accuracy_drop: Largest drop in accuracy below the last exit, percentage points.
        confidence_level: Probability, over the drawing of the samples, that the returned point keeps to
            ``max_accuracy_drop``.

    Returns:
        Of the points that passed the one that was cheapest where it was fitted, with its ``risk``.

    Raises:
        ValueError: If there are too few samples to show so small a drop, the points were fitted on them, or arguments
            are out of range.

    Example:
        >>> import torch, timm_dfs
        >>> _ = torch.manual_seed(0)
        >>> logits, targets = torch.randn(2, 400, 3).cumsum(0), torch.arange(400) % 3  # 2 exits, 400 samples, 3 classes
        >>> logits += 4 * torch.nn.functional.one_hot(targets, 3)
        >>> val, held_out = (logits[:, :200], targets[:200]), (logits[:, 200:], targets[200:])
        >>> points = timm_dfs.operating_frontier(val, flops=[10, 30])
        >>> timm_dfs.control_risk(points, held_out, max_accuracy_drop=5).risk
        Risk(max_accuracy_drop=5, confidence_level=0.95, samples=200)
    """
    check_shown_drop(max_accuracy_drop)
    if not points or len(points[0].policy.answering) > 1:
        raise ValueError(
            "The first point exits early, so its drop is unknown; give the points of operating_frontier()."
        )
    samples = len(held_out[1])
    check_confidence_level(confidence_level)
    if not is_shown(torch.zeros(samples), max_accuracy_drop / 100, confidence_level):
        raise ValueError(
            f"{samples} samples cannot show a drop of at most {max_accuracy_drop} points with confidence level "
            f"{confidence_level}, even if none of them shows a drop; give more samples, or a larger max_accuracy_drop."
        )
    passed = [points[0]]
    for point in points[1:]:
        drops = _drops(point, held_out, confidence_level)
        if not is_shown(drops, max_accuracy_drop / 100, confidence_level):
            break
        passed.append(point)
    cheapest = min(passed, key=lambda point: point.average_flops)
    seen = cheapest.seen | fingerprints(held_out[0])  # the choice was made on these as well
    return replace(cheapest, risk=Risk(max_accuracy_drop, confidence_level, samples), seen=seen)


def is_shown(drops: torch.Tensor, most: float, confidence_level: float) -> bool:
    """Whether drops (N,) in [-1, 1] show that their mean is below ``most``.

    If it is not, the capital of a gambler who bets on smaller drops is on average no larger than at the start, and the
    probability that it ever grows by a factor k is at most 1 / k (Ville's inequality). A bet on a sample depends on the
    samples before it alone; its size follows their variance.
    """
    values = (drops.double() + 1) / 2  # in [0, 1]
    count = torch.arange(1, len(values) + 1, dtype=torch.float64)
    means = (0.5 + values.cumsum(0)) / (count + 1)
    variances = (0.25 + ((values - means) ** 2).cumsum(0)) / (count + 1)
    before = torch.cat([variances.new_tensor([0.25]), variances[:-1]])
    bets = (2 * math.log(1 / (1 - confidence_level)) / (len(values) * before)).sqrt().clamp(max=LARGEST_BET)
    capital = torch.log1p(-bets * (values - (1 + most) / 2)).cumsum(0)
    return capital.max().item() >= math.log(1 / (1 - confidence_level))


def _drops(point: OperatingPoint, held_out: Data, confidence_level: float) -> torch.Tensor:
    """Each sample's drop (N,), in random order: 1 if only the last exit is right, -1 if only the policy is, else 0."""
    check_confidence_level(confidence_level)
    check_data("held_out", held_out)
    logits, targets = held_out
    refuse_seen(point.seen, logits, "held-out", "the operating point")
    policy = point.policy
    correct = (policy.predicted(logits).argmax(-1) == targets).double()
    drops = (logits[-1].argmax(-1) == targets).double() - correct.gather(0, policy.exit_index(logits)[None])[0]
    # Bets are placed sample by sample: in the order of a folder of classes, easy ones first could win them all.
    return drops[torch.randperm(len(drops), generator=torch.Generator().manual_seed(0)).to(drops.device)]


def check_shown_drop(max_accuracy_drop: float) -> None:
    """Raise ``ValueError`` unless samples could show a drop of at most so many percentage points."""
    if not 0 < max_accuracy_drop < 100:
        raise ValueError(
            f"max_accuracy_drop is {max_accuracy_drop}; give percentage points above 0 and below 100: no samples show "
            "that there is no drop at all."
        )


def check_confidence_level(confidence_level: float) -> None:
    """Raise ``ValueError`` unless ``confidence_level`` is a probability strictly between 0 and 1."""
    if not 0 < confidence_level < 1:
        raise ValueError(f"confidence_level is {confidence_level}; give a probability between 0 and 1, e.g. 0.95.")
