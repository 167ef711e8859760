"""What each exit is worth: logits collected in order, accuracy and calibration as a plain loop finds them."""

import pytest
import torch
from helpers import images, module_modes, settled, tiny_vgg
from hypothesis import given
from hypothesis import strategies as st

from timm_dfs import anytime_accuracy, calibration_error, collect_logits
from timm_dfs.evaluation.accuracy import reliability, risk_coverage


def random_case(seed, exits=3, samples=40, classes=6):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(exits, samples, classes, generator=generator)
    return logits, torch.randint(classes, (samples,), generator=generator)


def loader_of(x, targets, batch):
    return list(zip(x.split(batch), targets.split(batch)))


def test_collected_logits_are_forward_exits_over_the_loader_in_its_order():
    model = settled(tiny_vgg())
    x, targets = images(7), torch.arange(7)
    logits, collected = collect_logits(model, loader_of(x, targets, 3))  # the last batch is smaller
    assert logits.shape == (3, 7, 5) and logits.dtype == torch.float32
    assert torch.equal(collected, targets)
    with torch.no_grad():
        assert torch.allclose(logits, torch.stack(model.forward_exits(x)), atol=1e-5)


def test_a_model_in_train_mode_is_collected_in_eval_mode_and_put_back():
    model = settled(tiny_vgg(drop_rate=0.5))
    loader = loader_of(images(4), torch.arange(4), 2)
    expected, _ = collect_logits(model, loader)
    model.train()
    model.stages[1].eval()
    modes = module_modes(model)
    logits, _ = collect_logits(model, loader)
    assert torch.equal(logits, expected)
    assert module_modes(model) == modes


def test_batches_are_moved_to_the_models_type_and_logits_come_back_in_float32():
    model = settled(tiny_vgg()).double()
    logits, _ = collect_logits(model, loader_of(images(4), torch.arange(4), 2))
    assert logits.dtype == torch.float32 and not logits.requires_grad


def test_a_network_that_ends_in_a_softmax_is_warned_of_when_its_logits_are_collected():
    model = settled(tiny_vgg())
    for head in model.heads:
        head.fc = torch.nn.Sequential(head.fc, torch.nn.Softmax(-1))
    with pytest.warns(UserWarning, match="look like softmax outputs"):
        collect_logits(model, loader_of(images(4), torch.arange(4), 2))


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match="no batch"):
        collect_logits(tiny_vgg(), [])


@given(st.integers(0, 1000), st.integers(1, 6))
def test_accuracy_is_the_percentage_of_samples_with_fewer_than_topk_larger_logits(seed, topk):
    logits, targets = random_case(seed)
    right = [
        sum(sum(value > row[target] for value in row) < topk for row, target in zip(exit_logits, targets.tolist()))
        for exit_logits in logits.tolist()
    ]
    accuracy = anytime_accuracy(logits, targets, topk)
    assert accuracy.dtype == torch.float32
    assert accuracy.tolist() == pytest.approx([100 * n / len(targets) for n in right], abs=1e-4)


def test_accuracy_rises_with_topk_to_a_hundred_percent():
    logits, targets = random_case(0)
    curve = torch.stack([anytime_accuracy(logits, targets, topk) for topk in range(1, 7)])
    assert (curve.diff(dim=0) >= 0).all() and (curve[0] < 100).all()
    assert (curve[-1] == 100).all()


def test_the_default_is_top_one():
    logits, targets = random_case(1)
    assert torch.equal(anytime_accuracy(logits, targets), anytime_accuracy(logits, targets, topk=1))
    assert anytime_accuracy(logits, targets)[0].item() == pytest.approx(
        100 * (logits[0].argmax(-1) == targets).double().mean().item(), abs=1e-4
    )


@pytest.mark.parametrize("topk", [0, -1, 7])
def test_a_topk_outside_the_classes_is_refused_by_value(topk):
    with pytest.raises(ValueError, match=f"topk is {topk}.* 6 classes"):
        anytime_accuracy(*random_case(0), topk=topk)


def naive_calibration_error(logits, targets, bins):
    """Equation 5 of Guo et al.: bins (m/M, (m+1)/M], each weighing its samples' share."""
    inside = [[] for _ in range(bins)]
    for row, target in zip(logits, targets.tolist()):
        probabilities = row.softmax(0)
        confidence = probabilities.max().item()
        m = next(m for m in range(bins) if confidence <= (m + 1) / bins or m == bins - 1)
        inside[m].append((confidence, probabilities.argmax().item() == target))
    error = 0.0
    for members in inside:
        if members:
            confidence = sum(c for c, _ in members) / len(members)
            accuracy = sum(right for _, right in members) / len(members)
            error += len(members) / len(targets) * abs(accuracy - confidence)
    return error


@given(st.integers(0, 1000), st.sampled_from([1, 2, 10, 15]))
def test_calibration_error_equals_a_loop_over_bins(seed, bins):
    logits, targets = random_case(seed)
    expected = [naive_calibration_error(exit_logits, targets, bins) for exit_logits in logits]
    assert calibration_error(logits, targets, bins).tolist() == pytest.approx(expected, abs=1e-5)


def test_an_exit_that_is_right_as_often_as_it_says_has_no_error():
    confidences = torch.tensor([0.75] * 4 + [0.6] * 5)
    logits = torch.stack((confidences, 1 - confidences), -1).log()[None]
    targets = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 1])
    assert calibration_error(logits, targets).item() == pytest.approx(0, abs=1e-6)


def test_an_exit_that_is_sure_and_wrong_has_the_whole_error():
    logits = torch.tensor([[[50.0, 0.0]] * 4, [[0.0, 50.0]] * 4])
    assert calibration_error(logits, torch.ones(4, dtype=torch.int64)).tolist() == pytest.approx([1, 0], abs=1e-6)


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower():
    confidences = torch.tensor([0.5, 0.9])
    logits = torch.stack((confidences, 1 - confidences), -1).log()[None]
    # the first is right, the second wrong: in one bin their gaps of 0.5 and -0.9 would cancel
    assert calibration_error(logits, torch.tensor([0, 1]), bins=2).item() == pytest.approx(0.5 * (0.5 + 0.9), abs=1e-6)


@given(st.integers(0, 1000))
def test_calibration_error_is_a_share(seed):
    error = calibration_error(*random_case(seed))
    assert error.shape == (3,) and error.dtype == torch.float32
    assert ((error >= 0) & (error <= 1)).all()


@pytest.mark.parametrize("bins", [0, -3])
def test_no_bins_are_refused_by_value(bins):
    with pytest.raises(ValueError, match=f"bins is {bins}"):
        calibration_error(*random_case(0), bins=bins)


@pytest.mark.parametrize("measure", [anytime_accuracy, calibration_error])
@pytest.mark.parametrize(
    ("logits_shape", "targets_shape"), [((5, 4), (5,)), ((3, 5, 4), (4,)), ((3, 5, 4), (5, 1)), ((3, 0, 4), (0,))]
)
def test_shapes_that_disagree_are_refused_by_their_shapes(measure, logits_shape, targets_shape):
    with pytest.raises(ValueError) as error:
        measure(torch.zeros(logits_shape), torch.zeros(targets_shape, dtype=torch.int64))
    assert str(logits_shape) in str(error.value) and str(targets_shape) in str(error.value)


def test_a_batch_whose_targets_are_not_its_images_is_refused():
    with pytest.raises(ValueError, match="4 images but targets of shape"):
        collect_logits(tiny_vgg(), [(images(4), torch.zeros(3, dtype=torch.int64))])


@pytest.mark.parametrize("targets", [torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.tensor([0.3, 1.0])], ids=str)
def test_targets_that_are_no_classes_are_refused(targets):
    with pytest.raises(ValueError, match="Targets are"):
        anytime_accuracy(torch.randn(3, 2, 5), targets)


def test_nan_logits_have_no_accuracy():
    with pytest.raises(ValueError, match="not finite"):
        anytime_accuracy(torch.full((3, 2, 5), float("nan")), torch.tensor([0, 0]))


# Reliability, and risk against coverage.


@given(st.integers(0, 10_000), st.integers(1, 20))
def test_reliability_is_what_a_loop_over_samples_counts(seed, bins):
    logits, targets = random_case(seed)
    found = reliability(logits, targets, bins)
    confidence, predicted = logits.softmax(-1).max(-1)
    for k in range(3):
        for b in range(bins):
            inside = [i for i in range(40) if min(bins - 1, max(0, -(-confidence[k, i].item() * bins // 1) - 1)) == b]
            assert found.share[k, b].item() == pytest.approx(len(inside) / 40)
            if inside:
                right = sum((predicted[k, i] == targets[i]).item() for i in inside)
                assert found.accuracy[k, b].item() == pytest.approx(right / len(inside))
                assert found.confidence[k, b].item() == pytest.approx(confidence[k, inside].mean().item(), rel=1e-5)
            else:
                assert found.accuracy[k, b].isnan() and found.confidence[k, b].isnan()


@given(st.integers(0, 10_000))
def test_risk_at_a_coverage_is_the_error_of_those_as_sure(seed):
    logits, targets = random_case(seed)
    logits = logits.round()  # ties
    confidence, predicted = logits.softmax(-1).max(-1)
    wrong = (predicted != targets).double()
    for k, (coverage, risk) in enumerate(risk_coverage(logits, targets)):
        thresholds = sorted(set(confidence[k].tolist()), reverse=True)
        assert len(thresholds) == len(coverage) == len(risk)
        for threshold, share, errors in zip(thresholds, coverage.tolist(), risk.tolist()):
            confident = confidence[k] >= threshold
            assert share == pytest.approx(confident.double().mean().item())
            assert errors == pytest.approx(wrong[k][confident].mean().item())


def test_the_risk_of_all_samples_is_the_error():
    logits, targets = random_case(0)
    errors = [100 * (1 - risk[-1].item()) for _, risk in risk_coverage(logits, targets)]
    assert errors == pytest.approx(anytime_accuracy(logits, targets).tolist())


@pytest.mark.parametrize("function", [reliability, risk_coverage])
def test_no_sample_has_no_reliability(function):
    with pytest.raises(ValueError, match="at least one sample"):
        function(torch.zeros(2, 0, 3), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), ["a", "b"]), "of 3 parts"),
        (dict(image=torch.zeros(2, 3, 32, 32), label=torch.zeros(2)), "keys image, label"),
        ((torch.zeros(2, 3, 32, 32), torch.zeros(2, 5)), "several labels"),
    ],
)
def test_a_batch_that_is_no_pair_is_described(batch, words):
    with pytest.raises(ValueError, match=words):
        collect_logits(tiny_vgg(), [batch])


def test_a_network_of_one_logit_has_no_accuracy():
    with pytest.raises(ValueError, match="one logit"):
        collect_logits(tiny_vgg(num_classes=1), [])
