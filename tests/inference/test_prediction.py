"""Early exit inside a batch predicts each sample as if it were alone, and computes no more than is needed."""

import copy
import math
import threading
import warnings

import pytest
import timm
import torch
from helpers import TINY, cells, images, module_modes, recorded_batches, recorded_heads, settled, tiny_msdnet, tiny_vgg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_dfs import ExitPolicy, predict

BATCH = 8


@pytest.fixture(scope="module", params=TINY)
def model(request):
    torch.manual_seed(0)
    return settled(TINY[request.param]())


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    return settled(tiny_vgg())


def all_logits(model, x):
    with torch.no_grad():
        return torch.stack(model.forward_exits(x))


def splitting_policy(model, x):
    """A policy with which some of the batch leave at every exit."""
    confidence = all_logits(model, x).softmax(-1).amax(-1)
    thresholds, left = [], torch.arange(len(x))
    for k in range(model.num_exits - 1):
        surest_first = left[confidence[k, left].argsort(descending=True)]
        leaving = max(1, len(left) // 3)
        # between two samples' confidences, so that rounding moves no sample
        thresholds.append(confidence[k, surest_first[leaving - 1 : leaving + 1]].mean().item())
        left = surest_first[leaving:]
    policy = ExitPolicy([*thresholds, 0.0])
    assert set(policy.exit_index(all_logits(model, x)).tolist()) == set(range(model.num_exits))
    return policy


def test_predict_agrees_with_the_policy_on_the_logits_of_all_exits(model):
    x = images(BATCH)
    policy = splitting_policy(model, x)
    logits = all_logits(model, x)
    expected = policy.exit_index(logits)
    prediction = predict(model, x, policy)
    assert torch.equal(prediction.exit_index, expected)
    assert torch.allclose(prediction.logits, logits[expected, torch.arange(BATCH)], atol=1e-4)


def test_a_batch_is_predicted_as_its_samples_one_by_one_in_their_order(model):
    x = images(BATCH)
    policy = splitting_policy(model, x)
    together = predict(model, x, policy)
    alone = [predict(model, x[n : n + 1], policy) for n in range(BATCH)]
    assert together.exit_index.tolist() == [p.exit_index.item() for p in alone]
    assert torch.allclose(together.logits, torch.cat([p.logits for p in alone]), atol=1e-4)


def test_a_permuted_batch_gets_the_permuted_prediction(model):
    x = images(BATCH)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    policy = splitting_policy(model, x)
    straight, permuted = predict(model, x, policy), predict(model, x[order], policy)
    assert torch.equal(permuted.exit_index, straight.exit_index[order])
    assert torch.allclose(permuted.logits, straight.logits[order], atol=1e-4)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(thresholds=st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_for_any_thresholds_predict_agrees_with_the_policy(vgg, thresholds, seed):
    x = images(5, size=8, seed=seed)
    policy = ExitPolicy(thresholds)
    prediction = predict(vgg, x, policy)
    logits = all_logits(vgg, x)
    expected = logits[prediction.exit_index, torch.arange(5)]
    assert torch.allclose(prediction.logits, expected, atol=1e-4)
    confidence = logits.softmax(-1).amax(-1)
    exits = policy.exit_index(logits)
    reachable = torch.tensor([2.0 if t is None else t for t in policy.thresholds[:-1]])
    too_close = ((confidence[:-1] - reachable[:, None]).abs() < 1e-5).any(0)  # rounding may decide
    assert torch.equal(prediction.exit_index[~too_close], exits[~too_close])


@pytest.mark.parametrize("never", [None, math.inf])
def test_with_thresholds_that_no_sample_reaches_predict_is_forward(model, never):
    x = images(BATCH)
    with recorded_heads(model) as calls:
        prediction = predict(model, x, ExitPolicy([never] * model.num_exits))
    assert set(calls) == {model.num_exits - 1}
    assert (prediction.exit_index == model.num_exits - 1).all()
    with torch.no_grad():
        assert torch.equal(prediction.logits, model(x))


def test_with_thresholds_of_zero_all_samples_leave_at_once_and_nothing_deeper_is_computed(model):
    x = images(BATCH)
    with recorded_batches(dict(model.named_modules())) as calls:
        prediction = predict(model, x, ExitPolicy([0.0] * model.num_exits))
    assert (prediction.exit_index == 0).all()
    assert torch.allclose(prediction.logits, all_logits(model, x)[0], atol=1e-4)
    assert [k for k in range(model.num_exits) if f"heads.{k}" in calls] == [0]
    later_stages = tuple(f"stages.{k}." for k in range(1, model.num_exits))
    assert not [name for name in calls if name.startswith(later_stages)]


def test_the_rest_of_the_batch_goes_on_smaller(model):
    x = images(BATCH)
    policy = splitting_policy(model, x)
    with recorded_heads(model) as calls:
        exits = predict(model, x, policy).exit_index
    assert calls == {k: [(exits >= k).sum().item()] for k in range(model.num_exits)}


def test_stages_between_exits_see_the_smaller_batch():
    model = settled(tiny_vgg())
    x = images(BATCH)
    policy = splitting_policy(model, x)
    with recorded_batches(dict(enumerate(model.stages))) as calls:
        exits = predict(model, x, policy).exit_index
    assert calls == {k: [(exits >= k).sum().item()] for k in range(model.num_exits)}


@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_msdnet_computes_only_the_cells_that_the_exit_needs(exit_index):
    model = settled(tiny_msdnet())
    thresholds = [None, None, None]
    thresholds[exit_index] = 0.0
    reach = model.exit_layers[exit_index]
    with recorded_batches(cells(model)) as calls:
        predict(model, images(), ExitPolicy(thresholds))
    assert set(calls) == {(layer, j) for layer, j in cells(model) if layer + j <= reach}
    assert all(sizes == [4] for sizes in calls.values())  # each once
    if exit_index == 0:
        assert len(calls) == 6 < len([cell for cell in cells(model) if cell[0] <= reach])
    if exit_index == 2:
        assert set(calls) == set(cells(model))


def test_going_on_computes_what_was_left_waiting_and_nothing_twice():
    model = settled(tiny_msdnet())
    x = images(BATCH)
    policy = splitting_policy(model, x)
    with recorded_batches(cells(model)) as calls:
        exits = predict(model, x, policy).exit_index
    for (layer, j), sizes in calls.items():
        first_needing = next(k for k, reach in enumerate(model.exit_layers) if layer + j <= reach)
        assert sizes == [(exits >= first_needing).sum().item()]


def test_an_empty_batch_gets_an_empty_prediction(model):
    prediction = predict(model, images(0), ExitPolicy([0.5] * model.num_exits))
    assert prediction.logits.shape == (0, model.num_classes)
    assert prediction.exit_index.shape == (0,) and prediction.exit_index.dtype == torch.int64


def test_exit_indices_are_int64_and_logits_have_one_row_a_sample(model):
    prediction = predict(model, images(BATCH), ExitPolicy([0.5] * model.num_exits))
    assert prediction.exit_index.shape == (BATCH,) and prediction.exit_index.dtype == torch.int64
    assert prediction.logits.shape == (BATCH, model.num_classes)


@pytest.mark.parametrize("shape", [(3, 16, 16), (16, 16), (1, 2, 3, 16, 16), (2, 1, 16, 16), (2, 4, 16, 16)])
def test_what_is_no_batch_of_images_is_refused_by_its_shape(vgg, shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)") as error:
        predict(vgg, torch.zeros(shape), ExitPolicy([0.5] * 3))
    assert str(shape) in str(error.value)


def test_a_model_in_train_mode_is_evaluated_in_eval_mode_and_put_back_module_by_module():
    model = settled(tiny_vgg(drop_rate=0.5))
    x = images()
    policy = splitting_policy(model, x)
    expected = predict(model, x, policy)
    model.train()
    model.stages[0].bn.eval()  # frozen by its owner
    modes, state = module_modes(model), {key: value.clone() for key, value in model.state_dict().items()}
    prediction = predict(model, x, policy)
    assert torch.equal(prediction.logits, expected.logits)
    assert module_modes(model) == modes and model.training and not model.stages[0].bn.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_modes_come_back_after_an_error_too():
    model = tiny_vgg().train()
    modes = module_modes(model)
    model.heads[1].fc.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(model, images(), ExitPolicy([1.0, 1.0, 1.0]))
    assert module_modes(model) == modes


def test_a_nan_sample_goes_to_the_last_exit_with_a_warning_and_the_others_are_as_without_it(model):
    x = images(BATCH)
    policy = splitting_policy(model, x)
    clean = predict(model, x, policy)
    broken = x.clone()
    broken[[2, 5], 0, 3, 3] = math.nan
    with pytest.warns(UserWarning, match=r"\[2, 5\].*NaN"):
        prediction = predict(model, broken, policy)
    others = torch.tensor([0, 1, 3, 4, 6, 7])
    assert prediction.exit_index[[2, 5]].tolist() == [model.num_exits - 1] * 2
    assert prediction.logits[[2, 5]].isnan().any(-1).all()
    assert torch.equal(prediction.exit_index[others], clean.exit_index[others])
    assert torch.allclose(prediction.logits[others], clean.logits[others], atol=1e-4)


def test_a_nan_sample_does_not_leave_at_a_later_exit_that_is_fine(vgg):
    spoil = torch.tensor([1])
    handle = vgg.heads[0].register_forward_hook(lambda _, inputs, output: output.index_fill(0, spoil, math.nan))
    try:
        with pytest.warns(UserWarning, match=r"\[1\]"):
            prediction = predict(vgg, images(), ExitPolicy([1.0, 0.0, 0.0]))
    finally:
        handle.remove()
    assert prediction.exit_index[1] == 2
    assert prediction.logits.isfinite().all()


def test_finite_batches_raise_no_warning(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(model, images(BATCH), ExitPolicy([0.5] * model.num_exits))


# Presets.


def with_presets(**presets):
    return settled(tiny_vgg(presets=presets, pretrained_cfg_overlay=dict(num_classes=5)))


def test_a_preset_is_its_thresholds_and_confidence_by_name():
    exact = dict(thresholds=[None, None, 0.0], confidence="max_prob")
    model = with_presets(fast=dict(thresholds=[0.0, 0.0, 0.0]), exact=exact)
    assert (predict(model, images(), "fast").exit_index == 0).all()
    assert (predict(model, images(), "exact").exit_index == 2).all()


def test_an_unknown_preset_is_refused_and_the_known_ones_named():
    model = with_presets(fast=dict(thresholds=[0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match=r"'slow'.*'fast'"):
        predict(model, images(), "slow")
    with pytest.raises(ValueError, match=r"'slow'.*none"):
        predict(tiny_vgg(), images(), "slow")


def test_a_preset_for_another_number_of_exits_is_refused():
    model = tiny_vgg()
    model.presets = dict(fast=dict(thresholds=[0.0, 0.0]))
    with pytest.raises(ValueError, match=r"2 thresholds.* 3 exits"):
        predict(model, images(), "fast")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_policy_for_another_number_of_exits_is_refused(vgg, count):
    with pytest.raises(ValueError, match=f"{count} thresholds.* 3 exits"):
        predict(vgg, images(), ExitPolicy([0.5] * count))


# Sharing.


def test_threads_may_share_a_model_in_eval_mode(vgg):
    batches = [images(BATCH, seed=seed) for seed in range(2)]
    policies = [splitting_policy(vgg, x) for x in batches]
    expected = [predict(vgg, x, policy) for x, policy in zip(batches, policies)]
    predictions = [[], []]
    both_are_ready = threading.Barrier(2)

    def work(i):
        both_are_ready.wait()
        predictions[i] += [predict(vgg, batches[i], policies[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(predictions[i]) == 20  # no thread died
        for prediction in predictions[i]:
            assert torch.equal(prediction.exit_index, expected[i].exit_index)
            assert torch.allclose(prediction.logits, expected[i].logits, atol=1e-5)


def test_predictions_need_no_gradient(vgg):
    assert not predict(vgg, images().requires_grad_(), ExitPolicy([0.5] * 3)).logits.requires_grad


def test_a_network_without_exits_is_refused_by_its_class():
    with pytest.raises(ValueError, match="ResNet has no exits"):
        predict(timm.create_model("test_resnet"), images(), ExitPolicy([0.0]))


@pytest.mark.parametrize("policy", [[0.9] * 3, None, 0.5], ids=str)
def test_a_policy_that_is_none_is_refused(policy):
    with pytest.raises(ValueError, match="policy is"):
        predict(tiny_msdnet(), images(), policy)


@pytest.mark.parametrize("x", [images().byte(), images().long(), images().numpy()], ids=lambda x: str(x.dtype))
def test_what_is_not_a_batch_of_normalised_images_is_refused(x):
    with pytest.raises(ValueError, match="x "):
        predict(tiny_msdnet(), x, ExitPolicy([0.0] * 3))


def test_images_come_in_the_network_s_type():
    model = settled(tiny_msdnet())
    policy = ExitPolicy([0.3, 0.3, 0.0])
    expected = predict(model, images(), policy)
    assert torch.equal(predict(model, images().double(), policy).exit_index, expected.exit_index)
    assert predict(model.double(), images(), policy).logits.dtype == torch.float64


def test_logits_are_ordinary_tensors():
    logits = predict(settled(tiny_msdnet()), images(), ExitPolicy([0.3, 0.3, 0.0])).logits
    assert not logits.is_inference()
    logits.add_(1)


def test_threads_that_share_a_network_in_training_mode_change_nothing_in_it():
    model = settled(tiny_msdnet()).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    policy = ExitPolicy([0.3, 0.3, 0.0])
    threads = [threading.Thread(target=lambda: [predict(model, images(), policy) for _ in range(10)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_a_network_of_one_logit_is_refused():
    model = tiny_vgg(num_classes=1)
    with pytest.raises(ValueError, match="one logit"):
        predict(model, images(2), ExitPolicy([0.5] * model.num_exits))


def test_a_network_without_classes_is_refused():
    model = tiny_vgg(num_classes=0)
    with pytest.raises(ValueError, match=r"num_classes=0.*pooled features"):
        predict(model, images(2), ExitPolicy([0.5] * model.num_exits))


@pytest.mark.parametrize("ensemble", [None, "mean"])
def test_a_bfloat16_networks_samples_leave_where_calibration_says(vgg, ensemble):
    model = copy.deepcopy(vgg).bfloat16()
    x = images(64).bfloat16()
    logits = all_logits(model, x)
    temperatures = [1.3, 0.7, 1.1]
    policy = ExitPolicy([0.5] * model.num_exits, temperatures=temperatures, ensemble=ensemble)
    scaled = policy.predicted(logits.float()) / torch.tensor(temperatures)[:, None, None]
    confidence = scaled.softmax(-1).amax(-1)
    for k in range(model.num_exits - 1):  # each sample's own confidence decides alone, so that rounding would show
        for sample in range(0, 64, 8):
            exact = [math.inf] * model.num_exits
            exact[k] = confidence[k, sample].item()
            at = policy.with_thresholds(exact)
            if ensemble is None:
                prediction = predict(model, x, at)
                assert prediction.exit_index[sample] == k and prediction.logits.dtype == torch.bfloat16
            assert torch.equal(at.exit_index(logits), at.exit_index(logits.float()))
    assert policy.predicted(logits).dtype == (torch.bfloat16 if ensemble is None else torch.float32)


def test_a_nan_in_an_ensemble_is_told(vgg):
    x = images(2)
    x[0] = math.nan
    with pytest.warns(UserWarning, match="an ensemble makes their logits NaN"):
        predict(vgg, x, ExitPolicy([0.5] * vgg.num_exits, ensemble="mean"))
