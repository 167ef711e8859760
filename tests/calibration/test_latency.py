"""Operating points within a latency."""

import pytest
import torch

from timm_dfs import ExitPolicy, measure_policy
from timm_dfs.calibration.latency import fit_latency, percentile
from timm_dfs.calibration.operating_point import check_preset

FLOPS, TIMES = [10.0, 20.0, 40.0], [3.0, 5.0, 9.0]


@pytest.fixture(scope="module")
def val():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(10, (600,), generator=generator)
    logits = torch.randn(3, 600, 10, generator=generator)
    logits += torch.tensor([1.5, 2.5, 4.0])[:, None, None] * torch.nn.functional.one_hot(targets, 10)
    return logits, targets


def fit(val, **limit):
    return fit_latency(val, FLOPS, TIMES, ExitPolicy([0.5, 0.5, 0.0]), **limit)


@pytest.mark.parametrize("limit", [3.5, 5.0, 8.0, 20.0])
def test_the_mean_latency_keeps_to_its_limit_and_is_that_of_the_exits_taken(val, limit):
    point = fit(val, mean=limit)
    exits = point.policy.exit_index(val[0])
    assert point.latency.mean_ms == pytest.approx(torch.tensor(TIMES)[exits].mean().item())
    assert point.latency.mean_ms <= limit
    assert point.average_flops == pytest.approx(measure_policy(point.policy, val, FLOPS).average_flops)


@pytest.mark.parametrize("limit", [3.0, 5.5, 9.0])
def test_at_most_one_sample_in_twenty_exceeds_the_95th_percentile(val, limit):
    point = fit(val, p95=limit)
    late = torch.tensor(TIMES)[point.policy.exit_index(val[0])] > limit
    assert late.double().mean() <= 0.05
    assert point.latency.p95_ms <= limit


def test_more_time_is_never_less_accurate(val):
    accuracies = [fit(val, mean=limit).accuracy for limit in (3.5, 5.0, 8.0)]
    assert accuracies == sorted(accuracies) and accuracies[0] < accuracies[-1]
    accuracies = [fit(val, p95=limit).accuracy for limit in (3.0, 5.0, 9.0)]
    assert accuracies == sorted(accuracies) and accuracies[0] < accuracies[-1]


def test_the_preset_says_on_which_machine_and_in_which_unit(val):
    point = fit_latency(val, FLOPS, TIMES, ExitPolicy([0.5, 0.5, 0.0]), mean=5.0, threads=2, machine="a processor")
    preset = point.preset()
    assert preset["latency"]["machine"] == "a processor" and preset["latency"]["threads"] == 2
    check_preset(preset, 3)
    preset["latency"]["mean_ms"] = "soon"
    with pytest.raises(ValueError, match="mean_ms"):
        check_preset(preset, 3)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (dict(mean=2.9), "first exit takes 3 ms"),
        (dict(p95=float("nan")), "out of range"),
        (dict(), "exactly one"),
        (dict(mean=5.0, p95=5.0), "exactly one"),
    ],
)
def test_limits_that_cannot_be_met_are_refused(val, limit, message):
    with pytest.raises(ValueError, match=message):
        fit(val, **limit)
    with pytest.raises(ValueError, match="each of 3 exits"):
        fit_latency(val, FLOPS, TIMES[:2], ExitPolicy([0.5, 0.5, 0.0]), mean=5.0)
    with pytest.raises(ValueError, match=r"flops is \[10.0, 20.0\]"):
        fit_latency(val, FLOPS[:2], TIMES, ExitPolicy([0.5, 0.5, 0.0]), mean=5.0)


def test_a_percentile_is_a_value_that_enough_samples_do_not_exceed():
    values = torch.arange(1.0, 21.0)
    assert percentile(values, 95) == 19
    assert percentile(values, 100) == 20
