"""Softmax outputs given in place of logits are noticed, and tensors on another device."""

import warnings

import pytest
import torch

from timm_dfs import (
    ExitPolicy,
    budgeted_batch,
    calibration_error,
    find_thresholds,
    fit_operating_point,
    fit_temperatures,
    measure_policy,
)

TARGETS = torch.arange(60) % 4
LOGITS = torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(0)) + 2 * torch.nn.functional.one_hot(TARGETS, 4)

USES = {
    "fit_operating_point": lambda data: fit_operating_point(data, [1, 2], max_accuracy_drop=1),
    "fit_temperatures": lambda data: fit_temperatures(*data),
    "find_thresholds": lambda data: find_thresholds(data[0], [0.5, 0.5]),
    "measure_policy": lambda data: measure_policy(ExitPolicy([0.5, 0.0]), data, [1, 2]),
    "budgeted_batch": lambda data: budgeted_batch(data, data, [1, 2], points=1),
    "calibration_error": lambda data: calibration_error(*data),
}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_softmax_outputs_in_place_of_logits_are_warned_of(use, precision):
    with pytest.warns(UserWarning, match="look like softmax outputs"):
        use((LOGITS.softmax(-1).to(precision).float(), TARGETS))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0])
def test_logits_are_not(use, scale):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*softmax outputs")
        use((LOGITS * scale, TARGETS))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_logits_on_another_device_are_refused_by_it(use):
    with pytest.raises(ValueError, match=r"on meta; give both on the CPU"):
        use((LOGITS.to("meta"), TARGETS.to("meta")))


def test_targets_on_another_device_are_refused_by_it():
    for name in USES.keys() - {"find_thresholds"}:  # it takes none
        with pytest.raises(ValueError, match=r"on meta; give both on the CPU"):
            USES[name]((LOGITS, TARGETS.to("meta")))
