"""A sample leaves at the first exit whose confidence is at least that exit's threshold."""

import math

import pytest
import torch
from helpers import images, recorded_heads, settled, tiny_vgg
from hypothesis import given
from hypothesis import strategies as st

from timm_dfs import ExitPolicy, predict

INF = math.inf
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
            break  # no confidence: the last exit answers
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


def test_the_last_exit_answers_whoever_is_left_whatever_its_threshold():
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
def test_only_reachable_thresholds_and_the_last_exit_answer(thresholds):
    reachable = {k for k, t in enumerate(thresholds) if t is not None and t <= 1}
    assert ExitPolicy(thresholds).answering == tuple(sorted(reachable | {len(thresholds) - 1}))


def test_heads_of_exits_that_never_answer_are_not_computed():
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
    policy = ExitPolicy([0.5, None, 0.25])
    again = eval(repr(policy), {"ExitPolicy": ExitPolicy, "inf": INF})
    assert (again.thresholds, again.confidence) == (policy.thresholds, policy.confidence)


@pytest.mark.parametrize("thresholds", ["9999999", {0: 0.9}, {0.9}, 0.9, None, [True], ["a"]], ids=str)
def test_what_is_no_list_of_numbers_is_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds is"):
        ExitPolicy(thresholds)
