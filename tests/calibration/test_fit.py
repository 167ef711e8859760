"""Operating points: the best thresholds found on validation data, measured on other data, and kept with the weights."""

import json
import math

import pytest
import torch
from formula_fill import exit_logits
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_dfs import (
    ExitPolicy,
    OperatingPoint,
    anytime_accuracy,
    budgeted_batch,
    fit_operating_point,
    fit_temperatures,
    measure_policy,
    operating_frontier,
)
from timm_dfs.calibration.operating_point import Source, check_preset

FLOPS = [10, 25, 45, 70]


def made_up(samples=400, exits=4, classes=8, stream=3):
    """Validation and test data whose deeper exits are more accurate."""
    logits, targets = exit_logits(stream, samples, exits, classes)
    return (logits[0], targets[0]), (logits[1], targets[1])


@pytest.fixture(scope="module")
def val():
    return made_up()[0]


@pytest.fixture(scope="module")
def test():
    return made_up()[1]


# Thresholds.


@pytest.mark.parametrize("confidence", ["max_prob", "margin", "entropy", "patience"])
def test_a_point_says_what_its_policy_does_on_the_validation_data(val, confidence):
    point = fit_operating_point(val, FLOPS, budget=35, confidence=confidence)
    exits = point.policy.exit_index(val[0])
    right = val[0].argmax(-1).gather(0, exits[None])[0] == val[1]
    assert point.accuracy == pytest.approx(100 * right.double().mean().item())
    assert point.average_flops == pytest.approx(torch.tensor(FLOPS).double()[exits].mean().item())
    assert point.average_flops <= 35
    assert (point.fitted_on.split, point.fitted_on.samples) == ("validation", 400)


def test_a_budget_buys_no_less_accuracy_than_geometric_exit_fractions_do(val):
    for geometric in budgeted_batch(val, val, FLOPS)[::8]:
        point = fit_operating_point(val, FLOPS, budget=geometric.average_flops)
        assert point.average_flops <= geometric.average_flops
        assert point.accuracy >= geometric.accuracy - 1e-4  # of float32


def test_an_accuracy_costs_no_more_than_with_geometric_exit_fractions(val):
    for geometric in budgeted_batch(val, val, FLOPS)[::12]:
        point = fit_operating_point(val, FLOPS, accuracy=geometric.accuracy - 1e-4)
        assert point.average_flops <= geometric.average_flops + 1e-9
        assert point.accuracy >= geometric.accuracy - 1e-4


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from([11, 16, 21]))
def test_a_budget_buys_nearly_what_the_best_of_all_thresholds_would(seed, budget):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(4, (3, 10, 3), generator=generator).float()  # few values: ties
    targets = torch.randint(3, (10,), generator=generator)
    flops = [10, 15, 25]
    rows = [sorted({*logits[k].softmax(-1).amax(-1).tolist(), math.inf}) for k in range(2)]
    done = [
        measure_policy(ExitPolicy([first, second, 0.0]), (logits, targets), flops)
        for first in rows[0]
        for second in rows[1]
    ]
    best = max(one.accuracy for one in done if one.average_flops <= budget)
    with pytest.warns(UserWarning, match="chance"):
        found = fit_operating_point((logits, targets), flops, budget=budget).accuracy
    assert best - 10.1 <= found <= best + 1e-9  # one sample of ten


@pytest.mark.parametrize("drop", [0, 1.5, 6])
def test_a_drop_in_accuracy_is_kept_to_at_less_cost(val, drop):
    point = fit_operating_point(val, FLOPS, max_accuracy_drop=drop)
    assert point.accuracy >= anytime_accuracy(*val)[-1].item() - drop - 1e-4
    assert point.average_flops < FLOPS[-1]


def test_a_larger_drop_costs_less_and_more_budget_is_more_accurate(val):
    costs = [fit_operating_point(val, FLOPS, max_accuracy_drop=drop).average_flops for drop in (0, 2, 8)]
    assert costs == sorted(costs, reverse=True)
    accuracies = [fit_operating_point(val, FLOPS, budget=budget).accuracy for budget in (12, 20, 40)]
    assert accuracies == sorted(accuracies)


def test_the_cheapest_and_the_dearest_budget_can_be_had(val):
    assert fit_operating_point(val, FLOPS, budget=FLOPS[0]).average_flops == FLOPS[0]
    dearest = fit_operating_point(val, FLOPS, budget=FLOPS[-1])
    assert dearest.accuracy >= anytime_accuracy(*val).max().item() - 1e-4


@pytest.mark.parametrize("confidence", ["max_prob", "patience"])
def test_an_exit_that_may_not_be_active_never_is(val, confidence):
    point = fit_operating_point(val, FLOPS, max_accuracy_drop=3, exits=[1, 2], confidence=confidence)
    assert 0 not in point.policy.answering and 3 in point.policy.answering
    assert point.policy.thresholds[0] == math.inf
    with pytest.raises(ValueError, match="first exit that may be active costs 25"):
        fit_operating_point(val, FLOPS, budget=20, exits=[1, 2], confidence=confidence)


def test_an_exit_that_is_never_worth_its_cost_is_switched_off(val):
    logits, targets = val[0].clone(), val[1]
    logits[1] = -logits[1]  # wrong wherever it is sure
    with pytest.warns(UserWarning, match="Exits 1 are correct no more often than chance"):
        assert 1 not in fit_operating_point((logits, targets), FLOPS, max_accuracy_drop=2).policy.answering


def test_the_same_data_give_the_same_point(val):
    first, second = (fit_operating_point(val, FLOPS, max_accuracy_drop=1) for _ in range(2))
    assert first.policy.thresholds == second.policy.thresholds


def test_thresholds_lie_between_confidences_so_rounding_moves_no_sample(val):
    point = fit_operating_point(val, FLOPS, budget=40)
    exits = point.policy.exit_index(val[0])
    for noise in (1e-6, -1e-6):  # another runtime's
        assert torch.equal(point.policy.exit_index(val[0] * (1 + noise)), exits)
        assert torch.equal(point.policy.exit_index((val[0] + noise * torch.rand_like(val[0])).double()), exits)


def test_temperatures_are_part_of_the_policy(val):
    temperatures = fit_temperatures(*val)
    point = fit_operating_point(val, FLOPS, budget=40, temperatures=temperatures)
    assert point.policy.temperatures == tuple(temperatures.tolist())
    assert point.average_flops <= 40


def test_a_frontier_goes_from_never_early_to_the_cheapest_and_each_step_is_a_trade(val):
    points = operating_frontier(val, FLOPS, points=12)
    assert points[0].policy.answering == (3,)
    costs, accuracies = ([getattr(point, of) for point in points[1:]] for of in ("average_flops", "accuracy"))
    assert costs == sorted(costs, reverse=True) and accuracies == sorted(accuracies, reverse=True)
    assert costs[-1] == FLOPS[0] and len(points) > 4


# Which data may touch what.


def test_what_was_fitted_on_is_refused_for_reporting(val, test):
    point = fit_operating_point(val, FLOPS, max_accuracy_drop=1)
    with pytest.raises(ValueError, match=r"400 of the 400 test samples.* fitted or chosen on"):
        measure_policy(point, val, FLOPS)
    mixed = (torch.cat([test[0], val[0][:, :40]], 1), torch.cat([test[1], val[1][:40]]))
    with pytest.raises(ValueError, match="40 of the 440 test samples"):
        measure_policy(point, mixed, FLOPS)


def test_other_data_are_measured(val, test):
    point = fit_operating_point(val, FLOPS, max_accuracy_drop=1)
    measured = measure_policy(point, test, FLOPS)
    exits = point.policy.exit_index(test[0])
    assert sum(measured.exit_shares) == pytest.approx(1)
    assert measured.exit_shares[0] == pytest.approx((exits == 0).double().mean().item())
    assert measured.last_exit_accuracy == pytest.approx(anytime_accuracy(*test)[-1].item(), abs=1e-4)
    assert measured.average_flops == pytest.approx(torch.tensor(FLOPS).double()[exits].mean().item())
    assert measured == measure_policy(point.policy, test, FLOPS)


# Presets.


def test_a_preset_is_json_that_gives_the_same_policy_again(val):
    point = fit_operating_point(
        val, FLOPS, budget=40, exits=[0, 2], confidence="margin", temperatures=[1, 2, 1, 1], dataset="noise"
    )
    preset = json.loads(json.dumps(point.preset(), allow_nan=False))
    check_preset(preset, 4)
    again = ExitPolicy.from_preset(preset)
    assert repr(again) == repr(point.policy)
    assert preset["thresholds"][1] is None
    assert preset["fitted_on"] == dict(dataset="noise", split="validation", samples=400)


@pytest.mark.parametrize(
    "field",
    [
        dict(thresholds=[0.5] * 3),
        dict(thresholds=["0.5"] * 4),
        dict(temperatures=[1.0]),
        dict(temperatures=[1, 1, 1, 0]),
        dict(confidence="surprise"),
        dict(average_flops="many"),
        dict(average_flops=math.nan),
        dict(accuracy=101),
        dict(fitted_on="train"),
        dict(fitted_on=dict(dataset="x", split="y", samples="all")),
        dict(risk=dict(max_accuracy_drop=1)),
    ],
    ids=str,
)
def test_a_preset_whose_known_fields_are_wrong_is_refused_by_the_field(field):
    preset = OperatingPoint(ExitPolicy([0.5] * 4), 1.0, 2.0, Source("noise", "validation", 4)).preset()
    check_preset(dict(preset, latencies=[1, 2]), 4)
    (name,) = field
    with pytest.raises(ValueError, match=name.removesuffix("s")):
        check_preset({**preset, **field}, 4)


# What is refused.


@pytest.mark.parametrize("wanted", [{}, dict(budget=30, max_accuracy_drop=1)], ids=str)
def test_exactly_one_wish_is_granted(val, wanted):
    with pytest.raises(ValueError, match="exactly one"):
        fit_operating_point(val, FLOPS, **wanted)


@pytest.mark.parametrize("budget", [9.9, 70.1, -1, math.nan])
def test_a_budget_that_no_exit_costs_is_refused_with_the_costs(val, budget):
    with pytest.raises(ValueError, match=f"{budget:g} .* 10, the last 70"):
        fit_operating_point(val, FLOPS, budget=budget)


@pytest.mark.parametrize("drop", [-1, 101, math.nan])
def test_a_drop_that_is_no_percentage_is_refused(val, drop):
    with pytest.raises(ValueError, match=f"max_accuracy_drop is {drop}"):
        fit_operating_point(val, FLOPS, max_accuracy_drop=drop)


@pytest.mark.parametrize("confidence", ["max_prob", "patience"])
def test_an_accuracy_out_of_reach_is_refused_with_the_last_exit_s(val, confidence):
    with pytest.raises(ValueError, match=rf"100\.00 %.*{anytime_accuracy(*val)[-1].item():.2f} %"):
        fit_operating_point(val, FLOPS, accuracy=100, confidence=confidence)


@pytest.mark.parametrize("flops", [[1, 2, 3], [1, 2, 3, math.nan], [0, 1, 2, 3]], ids=str)
def test_costs_are_one_per_exit_and_above_0(val, flops):
    with pytest.raises(ValueError, match="flops is"):
        fit_operating_point(val, flops, max_accuracy_drop=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(val, bad):
    logits = val[0].clone()
    logits[1, 7, 2] = bad
    for fit in (
        lambda: fit_operating_point((logits, val[1]), FLOPS, max_accuracy_drop=1),
        lambda: fit_temperatures(logits, val[1]),
    ):
        with pytest.raises(ValueError, match="sample 7 at exit 1"):
            fit()


def test_targets_of_a_class_that_is_not_there_are_refused(val):
    with pytest.raises(ValueError, match=r"to 8.*0 … 7"):
        fit_operating_point((val[0], val[1].clamp(min=0).where(val[1] > 0, 8)), FLOPS, max_accuracy_drop=1)


def test_fewer_samples_than_exits_are_refused(val):
    with pytest.raises(ValueError, match="3 validation samples for 4 exits"):
        fit_operating_point((val[0][:, :3], val[1][:3]), FLOPS, max_accuracy_drop=1)


def test_exits_that_are_not_there_are_refused(val):
    with pytest.raises(ValueError, match=r"\[4\].* 0 to 3"):
        fit_operating_point(val, FLOPS, max_accuracy_drop=1, exits=[0, 4])


def test_exits_that_only_guess_are_named(val):
    logits = val[0].clone()
    logits[:2] = torch.randn(logits[:2].shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"Exits 0, 1 .*chance.*trained\?"):
        fit_operating_point((logits, val[1]), FLOPS, max_accuracy_drop=1)


# Temperatures.


def cross_entropy(logits, targets, temperature):
    return torch.nn.functional.cross_entropy(logits / temperature, targets).item()


def test_a_fitted_temperature_has_the_least_cross_entropy(val):
    logits = val[0] * torch.tensor([0.3, 1.0, 2.0, 4.0])[:, None, None]
    temperatures = fit_temperatures(logits, val[1])
    for k, temperature in enumerate(temperatures.tolist()):
        least = cross_entropy(logits[k], val[1], temperature)
        for other in (0.9 * temperature, 0.999 * temperature, 1.001 * temperature, 1.1 * temperature, 1.0):
            assert least <= cross_entropy(logits[k], val[1], other) + 1e-6


def test_scaled_logits_have_the_scaled_temperature(val):
    once, twice = fit_temperatures(*val), fit_temperatures(2 * val[0], val[1])
    assert torch.allclose(twice, 2 * once, rtol=1e-4)


@pytest.mark.parametrize(("sign", "limit"), [(1, 0.05), (-1, 20)])
def test_logits_that_are_all_right_or_all_wrong_end_at_a_limit(sign, limit):
    targets = torch.arange(4)
    logits = sign * 2 * torch.eye(4).repeat(2, 1, 1)
    assert fit_temperatures(logits, targets).tolist() == pytest.approx([limit] * 2, rel=1e-3)


@pytest.mark.parametrize("right", [29, 57, 58])
def test_an_accuracy_that_is_met_exactly_is_met_whatever_its_rounding(right):
    targets = torch.arange(100) % 4
    answers = torch.where(torch.arange(100) < right, targets, (targets + 1) % 4)
    logits = 9 * torch.nn.functional.one_hot(answers, 4).float().repeat(4, 1, 1)
    point = fit_operating_point((logits, targets), FLOPS, accuracy=right)
    assert point.average_flops == FLOPS[0]


@pytest.mark.parametrize("flops", [[0.1, 0.3], [0.1, 0.3, 0.7], [0.05, 0.1], [1e-9, 3.0]])
@pytest.mark.parametrize("samples", [3, 10, 77])
def test_a_budget_that_is_the_cost_of_an_exit_is_met_whatever_its_rounding(flops, samples):
    targets = torch.arange(samples) % 2
    logits = 9.0 * torch.nn.functional.one_hot(targets, 2).repeat(len(flops), 1, 1)  # all exits are right, and as sure
    logits[0, :1] = logits[0, :1].flip(-1)  # the first errs once
    for k, budget in enumerate(flops):
        point = fit_operating_point((logits, targets), flops, budget=budget)
        assert point.average_flops == pytest.approx(budget) or point.average_flops < budget
        assert point.accuracy == pytest.approx(100 if k else 100 * (1 - 1 / samples))
