"""Bounds on the drop in accuracy hold as often as they say."""

import math

import pytest
import torch
from formula_fill import exit_logits

from timm_dfs import ExitPolicy, OperatingPoint, bound_risk, control_risk, fit_operating_point, operating_frontier
from timm_dfs.calibration.operating_point import Source
from timm_dfs.calibration.risk import is_shown

SPLITS = 200
FLOPS = [1.0, 2.0]
# Points chosen without data: samples leave at the early exit from these confidences on. The last exit is correct.
FAMILY = [
    OperatingPoint(ExitPolicy([threshold, 0.0]), 1 + cost, 0.0, Source("", "", 1))
    for threshold, cost in [(None, 1.0), *((1 - step / 100, 1 - step / 50) for step in range(2, 50, 2))]
]


def calibrated(samples, generator):
    """Two exits, two classes: an early exit right as often as it is sure, from a half to 1, and a last always right."""
    sure = 0.5 + 0.5 * torch.rand(samples, generator=generator, dtype=torch.float64).clamp(max=1 - 1e-9)
    right = torch.rand(samples, generator=generator, dtype=torch.float64) < sure
    targets = torch.randint(2, (samples,), generator=generator)
    said = torch.where(right, targets, 1 - targets)
    early = torch.nn.functional.one_hot(said, 2) * (sure / (1 - sure)).log()[:, None]
    return torch.stack([early, 9.0 * torch.nn.functional.one_hot(targets, 2)]).float(), targets


def true_drop(point):
    """Of such data, percentage points: the integral of 2 (1 - c) over confidences c from the threshold to 1."""
    return 100 * max(0.0, 1 - point.policy.thresholds[0]) ** 2


def most_misses(confidence):
    """Misses in :data:`SPLITS` that a bound missing with probability 1 - confidence exceeds once in 1000 times."""
    p, misses, at_least = 1 - confidence, 0, 1.0
    while at_least > 1e-3:
        at_least -= math.comb(SPLITS, misses) * p**misses * confidence ** (SPLITS - misses)
        misses += 1
    return misses


def test_the_chosen_point_exceeds_the_drop_no_more_often_than_it_may(confidence=0.95):
    generator = torch.Generator().manual_seed(0)
    chosen = [control_risk(FAMILY, calibrated(1000, generator), 4, confidence) for _ in range(SPLITS)]
    drops = [true_drop(point) for point in chosen]
    assert sum(drop > 4 for drop in drops) <= most_misses(confidence)
    assert sum(drops) / SPLITS > 1.5  # and it is of use: much of what may be dropped is spent


def test_bounds_hold_as_often_where_classes_follow_one_another(confidence=0.95):
    generator = torch.Generator().manual_seed(2)
    point, bounds, chosen = FAMILY[10], [], []
    for _ in range(SPLITS):
        logits, targets = calibrated(1000, generator)
        # Samples on which early exit loses nothing first, as in a folder that begins with an easy class.
        order = (point.policy.predicted(logits)[0].argmax(-1) != targets).int().argsort(stable=True)
        held_out = logits[:, order], targets[order]
        bounds.append(bound_risk(point, held_out, confidence).risk.max_accuracy_drop)
        chosen.append(control_risk(FAMILY, held_out, 4, confidence))
    assert sum(bound < true_drop(point) for bound in bounds) <= most_misses(confidence)
    assert sum(true_drop(point) > 4 for point in chosen) <= most_misses(confidence)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_a_bound_is_below_the_true_drop_no_more_often_than_it_may_be(confidence):
    generator = torch.Generator().manual_seed(1)
    point = FAMILY[10]
    bounds = [bound_risk(point, calibrated(1000, generator), confidence).risk.max_accuracy_drop for _ in range(SPLITS)]
    assert sum(bound < true_drop(point) for bound in bounds) <= most_misses(confidence)
    assert sum(bounds) / SPLITS < true_drop(point) + 3


def test_the_true_drop_is_what_many_samples_have():
    logits, targets = calibrated(200_000, torch.Generator().manual_seed(2))
    for point in FAMILY[5::8]:
        exits = point.policy.exit_index(logits)
        right = logits.argmax(-1).gather(0, exits[None])[0] == targets
        assert 100 * (1 - right.double().mean().item()) == pytest.approx(true_drop(point), abs=0.2)


@pytest.mark.parametrize(("only_last", "only_early"), [(0.05, 0.05), (0.2, 0.18), (0.02, 0.0)])
def test_drops_as_large_as_asked_about_are_seldom_taken_for_smaller_ones(only_last, only_early):
    draws = torch.rand(SPLITS, 500, generator=torch.Generator().manual_seed(3))
    drops = (draws < only_last).double() - (draws > 1 - only_early).double()
    wrong = sum(is_shown(row, only_last - only_early, 0.95) for row in drops)
    assert wrong <= most_misses(0.95)
    assert all(is_shown(row, only_last - only_early + 0.15, 0.95) for row in drops[:20])


def test_more_samples_and_less_confidence_narrow_a_bound():
    point = FAMILY[10]

    def mean_bound(samples):
        draws = [calibrated(samples, torch.Generator().manual_seed(seed)) for seed in range(10)]
        return sum(bound_risk(point, draw, 0.95).risk.max_accuracy_drop for draw in draws) / len(draws)

    assert mean_bound(6000) < mean_bound(300)
    few = calibrated(300, torch.Generator().manual_seed(4))
    assert bound_risk(point, few, 0.6).risk.max_accuracy_drop < bound_risk(point, few, 0.99).risk.max_accuracy_drop


def test_a_larger_drop_gives_no_dearer_point_and_the_statement_goes_with_it():
    data = calibrated(2000, torch.Generator().manual_seed(5))
    chosen = [control_risk(FAMILY, data, drop, 0.9) for drop in (1, 4, 10)]
    costs = [point.average_flops for point in chosen]
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]
    assert [(point.risk.max_accuracy_drop, point.risk.confidence_level, point.risk.samples) for point in chosen] == [
        (drop, 0.9, 2000) for drop in (1, 4, 10)
    ]
    assert chosen[1].preset()["risk"] == dict(max_accuracy_drop=4, confidence_level=0.9, samples=2000)


def test_where_early_exits_only_lose_none_is_used():
    logits, targets = calibrated(2000, torch.Generator().manual_seed(6))
    logits[0] = -logits[0].abs() * logits[1] / 9  # sure, and wrong
    assert control_risk(FAMILY, (logits, targets), 1).policy.answering == (1,)


# Which data may touch what.


@pytest.fixture(scope="module")
def data():
    logits, targets = exit_logits(3, 300, 3, 5)
    return (logits[0], targets[0]), (logits[1], targets[1])


def test_what_thresholds_were_fitted_on_cannot_bound_their_risk(data):
    val, held_out = data
    point, points = (
        fit_operating_point(val, [1, 2, 3], max_accuracy_drop=1),
        operating_frontier(val, [1, 2, 3], points=4),
    )
    for bound in (lambda data: bound_risk(point, data), lambda data: control_risk(points, data, 5)):
        with pytest.raises(ValueError, match=r"300 of the 300 held-out samples.*fitted or chosen on"):
            bound(val)
        bound(held_out)


def test_what_a_point_was_chosen_on_cannot_bound_its_risk_again(data):
    val, held_out = data
    chosen = control_risk(operating_frontier(val, [1, 2, 3], points=4), held_out, 5)
    with pytest.raises(ValueError, match=r"300 of the 300 held-out samples.*fitted or chosen on"):
        bound_risk(chosen, held_out)


# What is refused.


@pytest.mark.parametrize("confidence", [0, 1, 95, math.nan])
def test_a_confidence_that_is_no_probability_is_refused(data, confidence):
    for bound in (
        lambda: bound_risk(FAMILY[3], calibrated(9, None), confidence),
        lambda: control_risk(FAMILY, calibrated(9, None), 1, confidence),
    ):
        with pytest.raises(ValueError, match=f"confidence_level is {confidence}"):
            bound()


@pytest.mark.parametrize("drop", [0, -1, 100, math.nan])
def test_a_drop_that_cannot_be_shown_is_refused(drop):
    with pytest.raises(ValueError, match=f"max_accuracy_drop is {drop}"):
        control_risk(FAMILY, calibrated(9, None), drop)


def test_too_few_samples_for_so_small_a_drop_are_refused():
    with pytest.raises(
        ValueError, match=r"50 samples cannot show a drop of at most 0\.5 points with confidence level 0\.95"
    ):
        control_risk(FAMILY, calibrated(50, None), 0.5)


@pytest.mark.parametrize("points", [[], FAMILY[1:]], ids=len)
def test_a_family_that_begins_early_is_refused(points):
    with pytest.raises(ValueError, match="exits early"):
        control_risk(points, calibrated(1000, None), 5)
