"""Exits that predict together with those before them."""

import pytest
import torch
from helpers import images, settled, tiny_vgg

from timm_dfs import ExitPolicy, ensemble_logits, predict

WEIGHTS = [[1.0], [1.0, 3.0], [1.0, 0.0, 4.0]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return settled(tiny_vgg(depths=(1, 1, 1), widths=(4, 6, 8)))


@pytest.fixture(scope="module")
def logits(model):
    with torch.no_grad():
        return torch.stack(model.forward_exits(images(24)))


def splitting(logits, confidence="max_prob", temperatures=None, ensemble="mean"):
    """A policy by which some samples leave at every exit."""
    if confidence == "patience":
        return ExitPolicy([1, 1, 0], confidence, None, ensemble)
    probabilities = ExitPolicy([0.0, 0.0, 0.0], confidence, temperatures, ensemble)
    scaled = probabilities.predicted(logits)
    if temperatures is not None:
        scaled = scaled / torch.tensor(temperatures)[:, None, None]
    from timm_dfs.inference.confidence import CONFIDENCES

    found = CONFIDENCES[confidence](scaled)
    first = found[0].sort().values[14:16].mean()
    second = found[1, found[0] < first].sort().values[6:8].mean()
    return probabilities.with_thresholds([first.item(), second.item(), 0.0])


def test_the_mean_of_log_probabilities_is_the_geometric_mean_of_probabilities(logits):
    expected = torch.stack([logits[: k + 1].log_softmax(-1).mean(0).softmax(-1) for k in range(3)])
    torch.testing.assert_close(ensemble_logits(logits).softmax(-1), expected)


def test_weights_need_not_sum_to_one(logits):
    expected = torch.stack([logits[0], (logits[0] + 3 * logits[1]) / 4, (logits[0] + 4 * logits[2]) / 5])
    torch.testing.assert_close(ensemble_logits(logits, WEIGHTS), expected)


def test_exits_that_are_switched_off_contribute_nothing(logits):
    policy = ExitPolicy([None, 0.0, 0.0], ensemble="mean")
    predicted = policy.predicted(logits)
    torch.testing.assert_close(predicted[1], logits[1])
    torch.testing.assert_close(predicted[2], (logits[1] + logits[2]) / 2)
    other = logits.clone()
    other[0] = float("nan")
    torch.testing.assert_close(policy.predicted(other)[1:], predicted[1:])


@pytest.mark.parametrize("ensemble", ["mean", WEIGHTS])
@pytest.mark.parametrize(
    ("confidence", "temperatures"),
    [("max_prob", None), ("margin", None), ("entropy", [0.5, 1.0, 2.0]), ("patience", None)],
)
def test_a_batch_is_predicted_as_its_samples_one_by_one(model, logits, confidence, temperatures, ensemble):
    policy = splitting(logits, confidence, temperatures, ensemble)
    x = images(24)
    whole = predict(model, x, policy)
    single = [predict(model, x[i : i + 1], policy) for i in range(len(x))]
    assert torch.equal(whole.exit_index, torch.cat([part.exit_index for part in single]))
    torch.testing.assert_close(whole.logits, torch.cat([part.logits for part in single]), atol=1e-4, rtol=0)
    assert torch.equal(whole.exit_index, policy.exit_index(logits))
    expected = policy.predicted(logits)[whole.exit_index, torch.arange(len(x))]
    torch.testing.assert_close(whole.logits, expected, atol=1e-4, rtol=0)
    assert len(set(whole.exit_index.tolist())) > 1 or confidence == "patience"


def test_a_preset_holds_the_ensemble(logits):
    policy = ExitPolicy.from_preset(dict(thresholds=[0.5, 0.5, 0.0], ensemble=WEIGHTS))
    assert policy.ensemble == ExitPolicy([0.5, 0.5, 0.0], ensemble=WEIGHTS).ensemble
    assert eval(repr(policy)).ensemble == policy.ensemble


@pytest.mark.parametrize(
    ("ensemble", "message"),
    [
        ("median", "give 'mean', or"),
        (True, "give 'mean', or"),
        ([[1.0], [1.0, 1.0]], "each of 3 exits"),
        ([[1.0], [1.0], [1.0, 1.0, 1.0]], "give 2 weights"),
        ([[1.0], [1.0, "a"], [1.0, 1.0, 1.0]], "give 2 weights"),
        ([[1.0], [-1.0, 2.0], [1.0, 1.0, 1.0]], "at least 0"),
        ([[1.0], [float("nan"), 2.0], [1.0, 1.0, 1.0]], "finite"),
        ([[1.0], [0.0, 0.0], [1.0, 1.0, 1.0]], "exit's own"),
    ],
)
def test_ensembles_that_make_no_sense_are_refused(ensemble, message):
    with pytest.raises(ValueError, match=message):
        ExitPolicy([0.5, 0.5, 0.0], ensemble=ensemble)


def test_logits_of_another_shape_are_refused(logits):
    with pytest.raises(ValueError, match="exits, samples, classes"):
        ensemble_logits(logits[0])
    with pytest.raises(ValueError, match="exits are 0 to 2"):
        ensemble_logits(logits, exits=[3])
    with pytest.raises(ValueError, match="begin"):
        ExitPolicy([0.5, 0.5, 0.0], ensemble="mean").leaves(0, logits[0])
