"""Weights with which exits predict together, and operating points of ensembles."""

import itertools
import warnings

import pytest
import torch

from timm_dfs import (
    ensemble_logits,
    fit_ensemble,
    fit_operating_point,
    fit_presets,
    fit_temperatures,
    measure_policy,
    operating_frontier,
)
from timm_dfs.calibration.ensemble import choose_ensemble
from timm_dfs.calibration.latency import fit_latency
from timm_dfs.calibration.operating_point import check_preset

FLOPS = [10.0, 20.0, 40.0]


def exits_with_own_noise(seed, samples=600, classes=10, noise=1.5):
    """Logits of three exits that err independently: together they know more than each alone."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(3, samples, classes, generator=generator) * noise
    return logits + 3 * torch.nn.functional.one_hot(targets, classes), targets


def cross_entropy(logits, targets):
    temperatures = fit_temperatures(logits, targets)
    return [torch.nn.functional.cross_entropy(row / t, targets).item() for row, t in zip(logits, temperatures)]


def test_fitted_weights_are_no_worse_than_the_mean_where_they_were_fitted():
    logits, targets = exits_with_own_noise(0)
    logits[0] *= 0.3  # a hesitant exit
    fitted, mean = (ensemble_logits(logits, e) for e in (fit_ensemble(logits, targets), "mean"))
    for ours, theirs in zip(cross_entropy(fitted, targets), cross_entropy(mean, targets), strict=True):
        assert ours <= theirs + 1e-3


def test_an_exit_that_knows_nothing_gets_no_weight():
    logits, targets = exits_with_own_noise(0)
    logits[0] = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(3))
    weights = fit_ensemble(logits, targets)
    assert weights[2][0] < 0.1
    assert [sum(row) for row in weights] == pytest.approx([1, 1, 1])
    assert weights == fit_ensemble(logits, targets)


@pytest.mark.parametrize("scale", [1e-3, 0.03, 0.1, 30.0])
@pytest.mark.parametrize("seed", range(4))
def test_weights_do_not_depend_on_the_scale_of_the_logits(scale, seed):
    logits, targets = exits_with_own_noise(seed, samples=2000, noise=1.0)
    for ours, theirs in zip(fit_ensemble(scale * logits, targets), fit_ensemble(logits, targets), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)


def test_logits_that_are_all_alike_have_finite_weights():
    assert fit_ensemble(torch.zeros(2, 4, 3), torch.arange(4) % 3)[1] == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize("samples", [1, 2, 20])
def test_weights_are_finite_where_every_prediction_is_right(samples):
    targets = torch.arange(samples) % 4
    logits = 50.0 * torch.nn.functional.one_hot(targets, 4).repeat(3, 1, 1)
    for row in fit_ensemble(logits, targets):
        assert sum(row) == pytest.approx(1) and min(row) > 0


def test_exits_that_are_left_out_have_no_weight():
    weights = fit_ensemble(*exits_with_own_noise(0), exits=[1, 2])
    assert weights[2][0] == 0
    assert weights[0] == (1.0,)


def test_the_last_exit_counts_in_any_case_and_others_must_be_there():
    data = exits_with_own_noise(0)
    assert fit_ensemble(*data, exits=[0, 1]) == fit_ensemble(*data)
    with pytest.raises(ValueError, match=r"exits names \[3\]; the exits are 0 to 2"):
        fit_ensemble(*data, exits=[0, 3])


def test_exits_that_err_independently_predict_together():
    assert choose_ensemble(exits_with_own_noise(0)) is not None


def test_exits_that_always_agree_predict_alone():
    logits, targets = exits_with_own_noise(0)
    assert choose_ensemble((logits[:1].repeat(3, 1, 1), targets)) is None


def test_an_ensemble_is_more_accurate_within_every_budget():
    val, test = exits_with_own_noise(0), exits_with_own_noise(1)
    for budget in (15.0, 25.0, 40.0):
        alone, together = (fit_operating_point(val, FLOPS, budget=budget, ensemble=e) for e in (None, "mean"))
        assert together.average_flops <= budget
        assert measure_policy(together, test, FLOPS).accuracy > measure_policy(alone, test, FLOPS).accuracy


def test_a_point_s_accuracy_is_that_of_its_policy_on_the_samples_fitted_on():
    val = exits_with_own_noise(0)
    point = fit_operating_point(val, FLOPS, max_accuracy_drop=0, ensemble="mean")
    exits = point.policy.exit_index(val[0])
    predicted = point.policy.predicted(val[0])[exits, torch.arange(len(exits))].argmax(-1)
    assert point.accuracy == pytest.approx(100 * (predicted == val[1]).double().mean().item())
    assert point.accuracy >= 100 * (val[0][-1].argmax(-1) == val[1]).double().mean().item()


def test_no_exit_of_an_ensemble_is_switched_off_in_the_search():
    logits, targets = exits_with_own_noise(0)
    logits[0] *= 0.01  # no sample should leave here
    point = fit_operating_point((logits, targets), FLOPS, budget=40, ensemble="mean")
    assert point.policy.answering == (0, 1, 2)
    surest = 100 * logits  # many confidences are exactly 1 in float32
    assert fit_operating_point((surest, targets), FLOPS, budget=40, ensemble="mean").policy.answering == (0, 1, 2)


def test_where_exits_are_worse_together_the_last_one_predicts_alone():
    logits, targets = exits_with_own_noise(0)
    logits[:2] = 9 * torch.nn.functional.one_hot((targets + 1) % 10, 10)  # always wrong, and sure
    with pytest.warns(UserWarning, match="no more often than chance"):
        point = fit_operating_point((logits, targets), FLOPS, max_accuracy_drop=0, ensemble="mean")
    assert point.policy.answering == (2,)
    assert point.accuracy == 100 * (logits[-1].argmax(-1) == targets).double().mean().item()


def test_the_frontier_of_an_ensemble_begins_with_the_last_exit_alone():
    first, *rest = operating_frontier(exits_with_own_noise(0), FLOPS, ensemble="mean", points=5)
    assert first.policy.answering == (2,)
    assert all(point.policy.answering == (0, 1, 2) for point in rest)


def test_no_point_of_an_ensemble_s_frontier_but_the_first_costs_more_and_is_no_more_accurate():
    """Else ``control_risk``, which stops at the first point that fails, would try a poor and costly one first."""
    logits, targets = exits_with_own_noise(0)
    logits[2] = 4 * torch.randn(logits[2].shape, generator=torch.Generator().manual_seed(1))  # spoils the others
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no more often than chance")
        _, *rest = operating_frontier((logits, targets), FLOPS, ensemble="mean", points=10)
    for dearer, cheaper in itertools.pairwise(rest):
        assert dearer.average_flops > cheaper.average_flops and dearer.accuracy > cheaper.accuracy


def test_where_the_budget_allows_it_the_last_exit_predicts_alone_if_that_is_more_accurate():
    logits, targets = exits_with_own_noise(0)
    logits[:2] += 6 * torch.randn(2, *logits.shape[1:])  # the early exits are poor, not useless
    alone = 100 * (logits[-1].argmax(-1) == targets).double().mean().item()
    point = fit_operating_point((logits, targets), FLOPS, budget=FLOPS[-1], ensemble="mean")
    assert point.policy.answering == (2,) and point.accuracy == alone
    by_time = fit_latency((logits, targets), FLOPS, [1, 2, 4], point.policy, mean=4)
    assert by_time.policy.answering == (2,) and by_time.accuracy == alone
    for budget in (25.0, 35.0):
        point = fit_operating_point((logits, targets), FLOPS, budget=budget, ensemble="mean")
        assert point.average_flops <= budget and point.policy.answering == (0, 1, 2)


@pytest.mark.parametrize("confidence", ["max_prob", "margin", "entropy", "patience"])
def test_presets_of_an_ensemble_keep_to_the_drop_below_the_last_exit_alone(confidence):
    val, held_out = exits_with_own_noise(0), exits_with_own_noise(1)
    points = fit_presets(
        val, FLOPS, max_accuracy_drops=[10], held_out=held_out, confidence=confidence, ensemble=fit_ensemble(*val)
    )
    alone = 100 * (val[0][-1].argmax(-1) == val[1]).double().mean().item()
    assert points["accurate"].accuracy >= alone
    for point in points.values():
        check_preset(point.preset(), 3)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_targets_of_any_integer_type_are_fitted_alike(dtype):
    logits, targets = exits_with_own_noise(0)
    assert fit_ensemble(logits, targets.to(dtype)) == fit_ensemble(logits, targets)
    assert torch.equal(fit_temperatures(logits, targets.to(dtype)), fit_temperatures(logits, targets))


def test_weights_are_fitted_in_inference_mode_and_under_another_default_type_alike():
    logits, targets = exits_with_own_noise(0)
    weights, temperatures = fit_ensemble(logits, targets), fit_temperatures(logits, targets)
    with torch.inference_mode():
        assert fit_ensemble(logits.clone(), targets.clone()) == weights
    try:
        torch.set_default_dtype(torch.float64)
        assert fit_ensemble(logits, targets) == weights
        assert torch.equal(fit_temperatures(logits, targets), temperatures)
    finally:
        torch.set_default_dtype(torch.float32)
