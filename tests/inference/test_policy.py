"""A sample leaves at the first exit whose confidence is at least that exit's threshold."""

import math
import warnings

import pytest
import torch
from helpers import images, recorded_heads, settled, tiny_vgg
from hypothesis import given
from hypothesis import strategies as st

from timm_dfs import ExitPolicy, predict
from timm_dfs.inference.confidence import CONFIDENCES

INF = math.inf
pytestmark = pytest.mark.filterwarnings("ignore:No sample reaches")  # of thresholds out of reach, which are tried here
THRESHOLDS = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([None, INF, -INF, 0.0, 1.0, 1.5])), min_size=1, max_size=5
)


def logits_of(confidences):
    """Two-class logits (E, N, 2) with these largest softmax probabilities (each at least 0.5)."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack((p, 1 - p), -1).log()


def first_exit(logits, thresholds):
    """Exit of one sample, given its logits (E, C): the rule in plain Python."""
    for k, threshold in enumerate(thresholds[:-1]):
        if threshold is None or threshold > 1:
            continue
        row = [float(value) for value in logits[k]]
        if any(math.isnan(value) for value in row):
            break  # no confidence: it goes to the last exit
        if float(torch.tensor(row).softmax(0).max()) >= threshold:
            return k
    return len(thresholds) - 1


def test_a_sample_leaves_at_the_first_exit_that_is_sure_enough():
    logits = logits_of([[0.9, 0.6, 0.6, 0.6], [0.9, 0.9, 0.6, 0.8], [0.9, 0.9, 0.9, 0.6]])
    assert ExitPolicy([0.85, 0.75, 0.7]).exit_index(logits).tolist() == [0, 1, 2, 1]


def test_a_confidence_equal_to_the_threshold_is_enough():
    logits = torch.zeros(2, 3, 4)  # confidence exactly 1/4
    assert ExitPolicy([0.25, 0.0]).exit_index(logits).tolist() == [0, 0, 0]


def test_a_confidence_below_the_threshold_is_not_enough():
    logits = torch.zeros(2, 3, 4)
    assert ExitPolicy([0.2501, 0.0]).exit_index(logits).tolist() == [1, 1, 1]


def test_all_samples_that_are_left_exit_at_the_last_exit_whatever_its_threshold():
    logits = logits_of([[0.6, 0.9], [0.6, 0.6]])
    for last in (0.99, INF, None, -INF):
        assert ExitPolicy([0.8, last]).exit_index(logits).tolist() == [1, 0]


@given(THRESHOLDS, st.integers(0, 1000))
def test_exit_index_equals_a_loop_over_samples_and_exits(thresholds, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(thresholds), 12, 4, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.02] = math.nan
    exits = ExitPolicy(thresholds).exit_index(logits)
    assert exits.dtype == torch.int64
    assert exits.tolist() == [first_exit(logits[:, n], thresholds) for n in range(12)]


@given(THRESHOLDS, st.integers(0, 1000))
def test_leaves_says_for_each_exit_what_exit_index_says_for_all(thresholds, seed):
    logits = 3 * torch.randn(len(thresholds), 12, 4, generator=torch.Generator().manual_seed(seed))
    policy = ExitPolicy(thresholds)
    exits = torch.full((12,), -1)
    for k in policy.answering:
        leaving, broken = policy.leaves(k, logits[k])
        assert not broken.any()
        exits[(exits < 0) & leaving] = k
    assert exits.tolist() == policy.exit_index(logits).tolist()


@given(THRESHOLDS)
def test_only_exits_with_reachable_thresholds_and_the_last_exit_are_active(thresholds):
    reachable = {k for k, t in enumerate(thresholds) if t is not None and t <= 1}
    assert ExitPolicy(thresholds).answering == tuple(sorted(reachable | {len(thresholds) - 1}))


def test_heads_of_exits_that_are_switched_off_are_not_computed():
    model = settled(tiny_vgg())
    for never in (None, INF, 1.5):
        with recorded_heads(model) as calls:
            exits = predict(model, images(), ExitPolicy([never, 1.0, 0.0])).exit_index
        assert set(calls) == {1, 2}
        assert not (exits == 0).any()


def test_thresholds_may_be_a_tensor_or_any_sequence():
    expected = ExitPolicy([0.5, 0.25]).thresholds
    assert expected == (0.5, 0.25)
    assert ExitPolicy(torch.tensor([0.5, 0.25])).thresholds == expected
    assert ExitPolicy((0.5, 0.25)).thresholds == expected
    assert ExitPolicy([None, 0.25]).thresholds == (INF, 0.25)


@pytest.mark.parametrize("empty", [[], (), torch.tensor([])])
def test_empty_thresholds_are_refused(empty):
    with pytest.raises(ValueError, match="empty"):
        ExitPolicy(empty)


@pytest.mark.parametrize("thresholds", [[math.nan, 0.5], [0.5, math.nan], torch.tensor([0.5, math.nan])])
def test_nan_thresholds_are_refused_by_name(thresholds):
    with pytest.raises(ValueError, match=r"nan.*NaN"):
        ExitPolicy(thresholds)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_thresholds_for_another_number_of_exits_are_refused_with_both_numbers(count):
    with pytest.raises(ValueError, match=f"{count} thresholds.* 3 exits"):
        ExitPolicy([0.5] * count).exit_index(torch.zeros(3, 2, 4))


def test_an_unknown_confidence_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"'entropyy'.*'max_prob'"):
        ExitPolicy([0.5, 0.5], confidence="entropyy")


def test_no_samples_leave_nowhere():
    assert ExitPolicy([0.5, 0.5]).exit_index(torch.zeros(2, 0, 4)).shape == (0,)


def test_the_representation_makes_the_same_policy_again():
    for policy in (ExitPolicy([0.5, None, 0.25]), ExitPolicy([0.5, None], "margin", [1.5, 2.0])):
        again = eval(repr(policy), {"ExitPolicy": ExitPolicy, "inf": INF})
        assert (again.thresholds, again.confidence) == (policy.thresholds, policy.confidence)
        assert again.temperatures == policy.temperatures


@pytest.mark.parametrize("thresholds", ["9999999", {0: 0.9}, {0.9}, 0.9, None, [True], ["a"]], ids=str)
def test_what_is_no_list_of_numbers_is_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds is"):
        ExitPolicy(thresholds)


# Thresholds that no confidence can reach.


@pytest.mark.parametrize(
    ("confidence", "threshold", "hint"),
    [
        ("max_prob", 90, "no percentage and no logit"),
        ("margin", 1.2, "no percentage and no logit"),
        ("entropy", 2.3, "1 minus the entropy"),
        ("patience", 2, "at most 1 .*early exits before it"),
    ],
)
def test_a_finite_threshold_out_of_reach_switches_its_exit_off_with_a_warning(confidence, threshold, hint):
    with pytest.warns(UserWarning, match=f"thresholds {threshold:g}: .*'{confidence}'.*{hint}"):
        policy = ExitPolicy([threshold, 0.5, 0.0], confidence)
    assert policy.answering == (1, 2)


@pytest.mark.parametrize("thresholds", [[None, INF, 0.0], [1.0, 0, 90], [-INF, 0.5, INF], [0.5]], ids=str)
def test_what_switches_an_exit_off_by_intention_or_can_be_reached_is_not_warned_of(thresholds):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ExitPolicy(thresholds)


# Confidences.


@given(st.integers(0, 1000), st.sampled_from([2, 5]))
def test_confidences_are_what_their_names_say(seed, classes):
    logits = 3 * torch.randn(12, classes, generator=torch.Generator().manual_seed(seed))
    for row, (largest, difference, sureness) in zip(logits, zip(*(f(logits).tolist() for f in CONFIDENCES.values()))):
        p = sorted(row.double().softmax(0).tolist(), reverse=True)
        assert largest == pytest.approx(p[0], abs=1e-5)
        assert difference == pytest.approx(p[0] - p[1], abs=1e-5)
        assert sureness == pytest.approx(1 + sum(q * math.log(q) for q in p) / math.log(classes), abs=1e-5)


@pytest.mark.parametrize("name", CONFIDENCES)
def test_confidences_go_from_at_least_0_to_exactly_1(name):
    unsure, sure = CONFIDENCES[name](torch.tensor([[1.0] * 7, [1000.0] + [0.0] * 6])).tolist()
    assert 0 <= unsure < 0.2 and sure == 1
    assert CONFIDENCES[name](torch.zeros(3, 1)).tolist() == [1, 1, 1]  # with one class there is no doubt


@pytest.mark.parametrize("name", [*CONFIDENCES, "patience"])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_logits_without_a_softmax_leave_at_the_last_exit_under_any_confidence(name, bad):
    logits = torch.zeros(3, 2, 4)
    logits[0, 1, 2] = bad
    assert ExitPolicy([0, 0, 0], name).exit_index(logits).tolist() == [0, 2]


def test_a_confidence_is_of_the_logits_divided_by_the_exit_s_temperature():
    logits = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]], [[2.0, 0.0]]])
    threshold = torch.tensor([1.0, 0.0]).softmax(0)[0].item()  # temperature 2 makes it so
    for temperatures, exit_index in (([2, 1, 1], 0), ([2.1, 1, 1], 1), ([3, 3, 3], 2)):
        assert ExitPolicy([threshold] * 3, temperatures=temperatures).exit_index(logits).tolist() == [exit_index]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, INF])
def test_a_temperature_that_is_not_finite_and_above_0_is_refused_by_value(bad):
    with pytest.raises(ValueError, match=f"temperatures.*{bad}.* above 0"):
        ExitPolicy([0.5, 0.5], temperatures=[1.0, bad])


@pytest.mark.parametrize("temperatures", [[1.0], [1.0] * 3, [None, 1.0], 1.0, "12"], ids=str)
def test_temperatures_are_numbers_one_per_exit(temperatures):
    with pytest.raises(ValueError, match="temperatures"):
        ExitPolicy([0.5, 0.5], temperatures=temperatures)


# Patience.


def logits_predicting(*classes):
    """Logits (E, N, 4) whose largest are at these classes: a row of N per exit."""
    return torch.nn.functional.one_hot(torch.tensor(classes), 4).float()


def test_a_sample_leaves_once_as_many_exits_before_predicted_the_same_class():
    logits = logits_predicting([0, 0, 0], [0, 1, 1], [0, 1, 2], [0, 1, 3])
    assert ExitPolicy([0] * 4, "patience").exit_index(logits).tolist() == [0, 0, 0]
    assert ExitPolicy([1] * 4, "patience").exit_index(logits).tolist() == [1, 2, 3]
    assert ExitPolicy([2] * 4, "patience").exit_index(logits).tolist() == [2, 3, 3]


def test_patience_starts_again_with_another_class():
    assert ExitPolicy([2] * 5, "patience").exit_index(logits_predicting([0], [0], [1], [0], [0])).tolist() == [4]


def test_patience_does_not_count_exits_that_are_switched_off():
    logits = logits_predicting([0], [1], [0], [0])
    policy = ExitPolicy([1, None, 1, 1], "patience")
    assert policy.answering == (0, 2, 3)
    assert policy.exit_index(logits).tolist() == [2]


@pytest.mark.parametrize(("patience", "exits_used"), [(0, {0}), (1, {1, 2, 3, 4}), (2, {2, 3, 4}), (9, {4})])
def test_predict_is_patient_with_each_sample_of_a_shrinking_batch(patience, exits_used):
    model = settled(tiny_vgg(num_classes=2, depths=(2, 3)))
    x = images(40)
    with torch.no_grad():
        means = [logits.mean(0) for logits in model.forward_exits(x)]
        for head, mean in zip(model.heads, means):  # so that each exit predicts both classes
            head.fc.register_forward_hook(lambda *args, mean=mean: args[-1] - mean)
        logits = torch.stack(model.forward_exits(x))
    policy = ExitPolicy([patience] * model.num_exits, "patience")
    expected = policy.exit_index(logits)
    prediction = predict(model, x, policy)
    assert torch.equal(prediction.exit_index, expected)
    assert torch.allclose(prediction.logits, logits[expected, torch.arange(40)], atol=1e-5)
    assert set(expected.tolist()) == exits_used


def test_one_exit_s_logits_tell_patience_nothing():
    with pytest.raises(ValueError, match="begin"):
        ExitPolicy([1, 1], "patience").leaves(0, torch.zeros(3, 4))


def test_patience_refuses_temperatures():
    with pytest.raises(ValueError, match="leave temperatures out"):
        ExitPolicy([1, 1], "patience", [1.0, 1.0])


def test_batches_have_decisions_of_their_own():
    policy = ExitPolicy([0.5, 0.5])
    assert policy.begin() is not policy.begin()


@pytest.mark.parametrize("ensemble", [None, "mean"])
def test_probabilities_are_those_of_the_ensemble_at_the_exits_temperatures(ensemble):
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    policy = ExitPolicy([0.5, 0.5, 0.0], temperatures=[2.0, 1.0, 0.5], ensemble=ensemble)
    for k, temperature in enumerate(policy.temperatures):
        expected = (policy.predicted(logits)[k] / temperature).softmax(-1)
        assert torch.allclose(policy.probabilities(logits)[k], expected)
    assert torch.equal(policy.probabilities(logits.bfloat16()).sum(-1).round(), torch.ones(3, 5))
