"""Budgeted batch classification does what the official procedure does, and what its documentation says."""

import json
import math

import pytest
import torch
from formula_fill import exit_logits
from helpers import GOLDEN_DATA
from hypothesis import given
from hypothesis import strategies as st

from timm_dfs import ExitPolicy, anytime_accuracy, budgeted_batch, find_thresholds
from timm_dfs.calibration.budgeted_batch import _halfway, geometric_exit_fractions

GOLDEN = json.loads((GOLDEN_DATA / "budgeted_batch_golden.json").read_text())
INF = math.inf


@pytest.fixture(scope="module")
def golden_data():
    logits, targets = exit_logits(GOLDEN["stream"], GOLDEN["samples"], GOLDEN["exits"], GOLDEN["classes"])
    return (logits[0], targets[0]), (logits[1], targets[1])


@pytest.fixture(scope="module")
def golden_curve(golden_data):
    return budgeted_batch(*golden_data, GOLDEN["flops"], points=len(GOLDEN["points"]))


def ours(threshold):
    """A golden threshold in our words: the official code writes 1e8 for never, -1e8 for always."""
    return {1e8: INF, -1e8: -INF}.get(threshold, threshold)


def test_the_official_procedure_gives_the_same_thresholds(golden_curve):
    for point, golden in zip(golden_curve, GOLDEN["points"], strict=True):
        assert point.thresholds == pytest.approx([ours(t) for t in golden["thresholds"]], abs=1e-6)


def test_the_official_procedure_gives_the_same_accuracy_and_cost(golden_curve):
    for point, golden in zip(golden_curve, GOLDEN["points"], strict=True):
        assert point.accuracy == pytest.approx(golden["test_top1"], abs=0.1)
        assert point.average_flops == pytest.approx(golden["test_flops"], rel=1e-3)


def test_validation_logits_in_place_of_the_test_logits_give_the_official_validation_accuracy(golden_data):
    val, _ = golden_data
    curve = budgeted_batch(val, val, GOLDEN["flops"], points=len(GOLDEN["points"]))
    assert [p.accuracy for p in curve] == pytest.approx([g["val_top1"] for g in GOLDEN["points"]], abs=0.1)


def test_exit_fractions_are_geometric_and_sum_to_one():
    for p, golden in enumerate(GOLDEN["points"], 1):
        fractions = geometric_exit_fractions(p / 20, GOLDEN["exits"])
        assert fractions.sum().item() == pytest.approx(1, abs=1e-6)
        assert fractions.tolist() == pytest.approx(golden["exit_fractions"], rel=1e-4)


def test_the_official_thresholds_and_those_of_find_thresholds_let_the_same_validation_samples_leave(
    golden_data, golden_curve
):
    (val_logits, _), _ = golden_data
    for p in (1, 17, 40):
        thresholds = find_thresholds(val_logits, geometric_exit_fractions(p / 20, GOLDEN["exits"])).tolist()
        official = golden_curve[p - 1].thresholds
        assert all(own <= theirs for own, theirs in zip(thresholds, official))
        exits, official_exits = (ExitPolicy(values).exit_index(val_logits) for values in (thresholds, official))
        assert torch.equal(exits, official_exits)


def test_every_point_is_what_its_thresholds_give_as_a_policy(golden_data, golden_curve):
    _, (logits, targets) = golden_data
    flops = torch.tensor(GOLDEN["flops"], dtype=torch.float64)
    for point in golden_curve[::8]:
        exits = ExitPolicy(point.thresholds).exit_index(logits)
        answers = logits[exits, torch.arange(len(targets))].argmax(-1)
        assert point.accuracy == pytest.approx(100 * (answers == targets).double().mean().item(), abs=1e-3)
        assert point.average_flops == pytest.approx(flops[exits].mean().item())


def test_points_go_from_the_cheapest_to_the_dearest(golden_curve):
    costs = [point.average_flops for point in golden_curve]
    assert costs == sorted(costs) and costs[0] < costs[-1]


# The documented procedure, one sample at a time.


def naive_thresholds(logits, thousandths):
    exits, samples, _ = logits.shape
    confidence = [[logits[k, n].softmax(0).max().item() for n in range(samples)] for k in range(exits)]
    left = list(range(samples))
    thresholds = []
    for k in range(exits - 1):
        count = samples * thousandths[k] // 1000
        if count < 1 or count > len(left):
            thresholds.append(INF)
            continue
        last = sorted((confidence[k][n] for n in left), reverse=True)[count - 1]
        left = [n for n in left if confidence[k][n] < last]
        thresholds.append((last + max((confidence[k][n] for n in left), default=0.0)) / 2)
    return [*thresholds, -INF]


@st.composite
def logits_with_ties(draw, steps=3):
    """Logits whose values are few, so that many confidences tie."""
    exits, samples = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    values = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    return torch.randint(steps, (exits, samples, 3), generator=values).float()


def distinct_logits(exits, samples, seed):
    """Logits without two equal confidences at an exit."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(samples, generator=generator) for _ in range(exits)])
    logits = torch.zeros(exits, samples, 2)
    logits[..., 0] = 2 * (1 + order) / samples
    return logits


@given(logits_with_ties(), st.data())
def test_find_thresholds_equals_the_documented_procedure_ties_included(logits, data):
    parts = data.draw(st.lists(st.integers(0, 1000), min_size=len(logits), max_size=len(logits)))
    thresholds = find_thresholds(logits, [part / 1000 for part in parts])
    assert thresholds.tolist() == pytest.approx(naive_thresholds(logits, parts), abs=1e-6)


@given(st.integers(1, 4), st.integers(1, 64), st.integers(0, 1000), st.data())
def test_without_ties_exactly_the_rounded_down_fraction_leaves_while_there_are_enough(exits, samples, seed, data):
    parts = data.draw(st.lists(st.integers(0, 64), min_size=exits, max_size=exits))  # in 64ths: exact in float32
    logits = distinct_logits(exits, samples, seed)
    policy = ExitPolicy(find_thresholds(logits, [part / 64 for part in parts]))
    leaving = torch.bincount(policy.exit_index(logits), minlength=exits).tolist()
    left = samples
    for k in range(exits - 1):
        wanted = samples * parts[k] // 64
        assert leaving[k] == (wanted if wanted <= left else 0)
        left -= leaving[k]
    assert leaving[-1] == left


def test_rounding_moves_no_validation_sample_to_another_exit():
    logits = distinct_logits(3, 200, seed=1)
    policy = ExitPolicy(find_thresholds(logits, [0.3, 0.3, 0.4]))
    exits = policy.exit_index(logits)
    for noise in (1e-5, -1e-5):  # another runtime's; confidences are 1e-3 apart
        assert torch.equal(policy.exit_index(logits * (1 + noise)), exits)
        assert torch.equal(policy.exit_index((logits + noise * torch.rand_like(logits)).double()), exits)


def test_between_neighbours_in_float32_the_threshold_is_the_last_sample_s_own():
    lower = torch.tensor(0.75)
    upper = torch.nextafter(lower, torch.tensor(1.0))
    confidences = torch.stack([torch.stack([upper, lower])] * 2)
    thresholds = _halfway(confidences, torch.tensor([upper, -INF]))
    assert thresholds[0] == upper > lower


def test_a_fraction_that_is_a_whole_number_of_samples_is_not_rounded_below_it():
    logits = distinct_logits(2, 100, seed=0)
    for wanted in range(1, 101):
        policy = ExitPolicy(find_thresholds(logits, [wanted / 100, 0]))
        assert (policy.exit_index(logits) == 0).sum() == wanted


def test_a_fraction_of_millions_of_samples_is_not_exceeded():
    logits = torch.zeros(2, 2_000_000, 2)
    logits[0, :1_500_000, 0] = 1  # surer than the rest, and three quarters of all
    policy = ExitPolicy(find_thresholds(logits, [0.75, 0.25]))
    assert (policy.exit_index(logits) == 0).sum() == 1_500_000


def test_samples_tied_with_the_threshold_leave_too():
    logits = torch.zeros(2, 10, 3)
    thresholds = find_thresholds(logits, [0.3, 0.7])
    assert ExitPolicy(thresholds).exit_index(logits).tolist() == [0] * 10


def test_thresholds_are_float32_and_the_last_exit_takes_everybody():
    thresholds = find_thresholds(torch.randn(3, 9, 4), torch.tensor([0.5, 0.2, 0.3]))
    assert thresholds.shape == (3,) and thresholds.dtype == torch.float32
    assert thresholds[-1] == -INF


def test_nobody_leaves_where_the_fraction_is_less_than_one_sample():
    assert find_thresholds(torch.randn(3, 9, 4), [0.1, 0.0, 0.9])[:2].tolist() == [INF, INF]


def test_with_one_exit_the_curve_is_its_accuracy_and_cost():
    logits, targets = torch.randn(1, 9, 4), torch.randint(4, (9,))
    for point in budgeted_batch((logits, targets), (logits, targets), [7.0], points=3):
        assert point.average_flops == 7
        assert point.accuracy == pytest.approx(anytime_accuracy(logits, targets).item())


# What is refused.


@pytest.mark.parametrize("shape", [(3, 4), (0, 5, 4), (3, 0, 4), (3, 5, 0), (1, 3, 5, 4)])
def test_logits_of_another_shape_are_refused_by_their_shape(shape):
    with pytest.raises(ValueError) as error:
        find_thresholds(torch.zeros(shape), [0.5] * shape[0])
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("fractions", [[0.5], [0.1, 0.2, 0.3], [[0.5, 0.5]]])
def test_fractions_for_another_number_of_exits_are_refused(fractions):
    with pytest.raises(ValueError, match=r"exit_fractions.*2 exits"):
        find_thresholds(torch.zeros(2, 5, 4), fractions)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, INF])
def test_fractions_outside_zero_to_one_are_refused_by_value(bad):
    with pytest.raises(ValueError, match=f"{bad:.1f}" if math.isfinite(bad) else str(bad)):
        find_thresholds(torch.zeros(2, 5, 4), [bad, 0.5])


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_logits_that_are_not_finite_are_refused_by_sample_and_exit(bad):
    good, targets = torch.zeros(2, 5, 4), torch.zeros(5, dtype=torch.int64)
    logits = good.clone()
    logits[1, 3, 2] = bad
    with pytest.raises(ValueError, match="sample 3 at exit 1"):
        find_thresholds(logits, [0.5, 0.5])
    for val, test in ((good, logits), (logits, good)):
        with pytest.raises(ValueError, match="sample 3 at exit 1"):
            budgeted_batch((val, targets), (test, targets), [1, 2])


def test_an_unknown_confidence_is_refused():
    with pytest.raises(ValueError, match="'surprise'"):
        find_thresholds(torch.zeros(2, 5, 4), [0.5, 0.5], confidence="surprise")


@pytest.mark.parametrize("confidence", ["margin", "entropy"])
def test_fractions_of_the_samples_leave_under_any_confidence(confidence):
    logits = 3 * torch.randn(3, 64, 4)
    policy = ExitPolicy(find_thresholds(logits, [0.25, 0.25, 0.5], confidence), confidence)
    assert torch.bincount(policy.exit_index(logits), minlength=3).tolist() == [16, 16, 32]


def test_patience_has_no_thresholds_for_fractions():
    with pytest.raises(ValueError, match=r"'patience'.*compares exits"):
        find_thresholds(torch.zeros(2, 5, 4), [0.5, 0.5], confidence="patience")


def test_validation_test_and_flops_of_different_networks_are_refused():
    targets = torch.zeros(5, dtype=torch.int64)
    two, three = (torch.zeros(2, 5, 4), targets), (torch.zeros(3, 5, 4), targets)
    with pytest.raises(ValueError, match="val has 2 exits, test 3 and flops 3"):
        budgeted_batch(two, three, [1, 2, 3])
    with pytest.raises(ValueError, match="val has 2 exits, test 2 and flops 3"):
        budgeted_batch(two, two, [1, 2, 3])


def test_targets_of_another_number_of_samples_are_refused():
    val = (torch.zeros(2, 5, 4), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"5 samples but targets of shape \(4,\)"):
        budgeted_batch(val, (val[0], val[1][:4]), [1, 2])


@pytest.mark.parametrize("points", [0, -1])
def test_no_points_are_refused(points):
    val = (torch.zeros(2, 5, 4), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"points is {points}"):
        budgeted_batch(val, val, [1, 2], points=points)
