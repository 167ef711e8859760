"""What early exit costs in accuracy, as a bound that holds with a stated probability, not as a mean.

The loss is the last exit's accuracy less the policy's, both over all samples to come. On one sample it is 1 (only the
last exit is right), -1 (only the policy is) or 0. Its mean is bounded by betting (Waudby-Smith and Ramdas, "Estimating
means of bounded random variables by betting", arXiv 2010.09686): valid for any number of samples, and narrow where
policy and last exit seldom differ. Assumed is that the samples bounded on and those to come are drawn alike and
independently, and that nothing of the policy was chosen on them. Images of another kind are not covered.

Several points are tried one after the other with no correction ("fixed-sequence testing": Angelopoulos et al., "Learn
then Test", arXiv 2110.01052; for early exit Jazbec et al., "Fast yet Safe", NeurIPS 2024, arXiv 2405.20915): in an
order that was fixed beforehand, each may be trusted while all before it were.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .logits import check_data
from .operating_point import Data, OperatingPoint, Risk, refuse_seen

LARGEST_BET = 1.5
"""Of the capital, on a sample's loss in units of half its range; below 2, or one sample could take all."""


def bound_risk(point: OperatingPoint, held_out: Data, confidence: float = 0.95) -> OperatingPoint:
    """A point with the least bound on its loss of accuracy that ``held_out`` allows.

    Args:
        point: What :func:`timm_dfs.fit_operating_point` gave.
        held_out: Logits (E, N, C) and targets (N,) that the point was not fitted on.
        confidence: Probability, over the samples drawn, with which the bound is to hold; for this one point.

    Returns:
        The point with its ``risk``: a loss from 0 to 100 percentage points.

    Raises:
        ValueError: If the point was fitted on these samples, the data do not fit it, or ``confidence`` is not
            between 0 and 1.
    """
    losses = _losses(point, held_out, confidence)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if is_shown(losses, middle, confidence) else (middle, high)
    return replace(point, risk=Risk(100 * high, confidence, len(losses)))


def control_risk(
    points: Sequence[OperatingPoint], held_out: Data, loss: float, confidence: float = 0.95
) -> OperatingPoint:
    """The cheapest of the points whose loss of accuracy against the last exit is at most ``loss``, with confidence.

    Args:
        points: What :func:`timm_dfs.operating_frontier` gave: tried in this order, until the first that cannot be
            trusted. The first must never leave early: it loses nothing, whatever the samples.
        held_out: Logits (E, N, C) and targets (N,) that the points were not fitted on.
        loss: Most loss, percentage points.
        confidence: Probability, over the samples drawn, that the point returned keeps to ``loss``.

    Returns:
        Among the points trusted the one that was cheapest where it was fitted, with its ``risk``.

    Raises:
        ValueError: If there are too few samples to show so small a loss, the points were fitted on them, or arguments
            are out of range.
    """
    if not 0 < loss < 100:
        raise ValueError(f"loss is {loss}; give percentage points between 0 and 100.")
    if not points or len(points[0].policy.answering) > 1:
        raise ValueError("The first point leaves early, so nothing is known of it; give an operating_frontier().")
    samples = len(held_out[1])
    check_confidence(confidence)
    if not is_shown(torch.zeros(samples), loss / 100, confidence):
        raise ValueError(
            f"{samples} samples cannot show a loss of at most {loss} points with confidence {confidence}, even if "
            "they show none at all; give more samples, or a larger loss."
        )
    trusted = [points[0]]
    for point in points[1:]:
        if not is_shown(_losses(point, held_out, confidence), loss / 100, confidence):
            break
        trusted.append(point)
    return replace(min(trusted, key=lambda point: point.average_flops), risk=Risk(loss, confidence, samples))


def is_shown(losses: torch.Tensor, loss: float, confidence: float) -> bool:
    """Whether losses (N,) in [-1, 1] show that their mean is below ``loss``.

    If it is not, the capital of a gambler who bets on smaller losses is on average no more than at the start, and the
    probability that it ever multiplies by k is at most 1 / k (Ville's inequality). What is bet on a sample depends on
    the samples before it alone; the size of bets follows how they scatter.
    """
    values = (losses.double() + 1) / 2  # in [0, 1]
    count = torch.arange(1, len(values) + 1, dtype=torch.float64)
    means = (0.5 + values.cumsum(0)) / (count + 1)
    variances = (0.25 + ((values - means) ** 2).cumsum(0)) / (count + 1)
    before = torch.cat([variances.new_tensor([0.25]), variances[:-1]])
    bets = (2 * math.log(1 / (1 - confidence)) / (len(values) * before)).sqrt().clamp(max=LARGEST_BET)
    capital = torch.log1p(-bets * (values - (1 + loss) / 2)).cumsum(0)
    return capital.max().item() >= math.log(1 / (1 - confidence))


def _losses(point: OperatingPoint, held_out: Data, confidence: float) -> torch.Tensor:
    """Each sample's loss (N,): 1 if only the last exit is right, -1 if only the policy is, else 0."""
    check_confidence(confidence)
    check_data("held_out", held_out)
    logits, targets = held_out
    refuse_seen(point, logits, "held-out")
    right = (logits.argmax(-1) == targets).double()
    return right[-1] - right.gather(0, point.policy.exit_index(logits)[None])[0]


def check_confidence(confidence: float) -> None:
    """Raise ``ValueError`` unless ``confidence`` is a probability strictly between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a probability between 0 and 1, e.g. 0.95.")
