"""Chained exits: logits, gradients, early exit and weights of networks whose exits add to those before them."""

import copy
import json
import math

import pytest
import timm
import torch
from helpers import CLASSES, TINY, images, recorded_heads, same_weights, settled, tiny_msdnet, tiny_vgg, twin, wrapped
from timm.layers import set_reentrant_ckpt
from timm.models import load_checkpoint, save_for_hf
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from timm_dfs import ExitPolicy, exit_flops, fuse, predict
from timm_dfs.evaluation.flops import last_exit_flops
from timm_dfs.hub import folder as hub

CHAIN = 0.5
TARGETS = torch.arange(4)


def twin_of_resnet(**kwargs):
    return twin(**{"drop_rate": 0.0, **kwargs})


def twin_of_vit(**kwargs):
    return twin("NLC", **{"drop_rate": 0.0, **kwargs})


NETWORKS = {**TINY, "twin": twin_of_resnet, "twin of a ViT": twin_of_vit}


@pytest.fixture(params=NETWORKS)
def make(request):
    return lambda **kwargs: NETWORKS[request.param](**{"drop_rate": 0.0, **kwargs})


def batch_for(model, batch=4, seed=0):
    return images(batch, 64 if hasattr(model, "backbone") else 16, seed=seed)


def settled_pair(make):
    """The same weights without and with chained exits, in eval mode."""
    torch.manual_seed(0)
    plain = settled(make())
    return plain, same_weights(plain, make(chain=CHAIN))


def chained(own, chain=CHAIN):
    """Chained logits from the exits' own, by their definition."""
    logits = [own[0]]
    for of_exit in own[1:]:
        logits.append(of_exit + chain * logits[-1].detach())
    return logits


# Logits.


@torch.no_grad()
def test_in_eval_mode_logits_are_the_chain_of_the_exits_own(make):
    plain, model = settled_pair(make)
    x = batch_for(model)
    own = plain.forward_exits(x)
    for ours, expected in zip(model.forward_exits(x), chained(own), strict=True):
        assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(model(x), plain(x), atol=1e-2)


@torch.no_grad()
def test_forward_in_eval_mode_gives_the_last_exits_chained_logits(make):
    _, model = settled_pair(make)
    x = batch_for(model)
    assert torch.equal(model(x), model.forward_exits(x)[-1])


def test_without_a_chain_every_exit_is_on_its_own(make):
    model = settled(make())
    x = batch_for(model)
    read = [head.register_forward_hook(lambda _, inputs, output: found.append(output)) for head in model.heads]
    found = []
    logits = model.forward_exits(x)
    assert model.chain == 0 and not model.is_chained and len(read) == len(found)
    assert all(torch.equal(ours, own) for ours, own in zip(logits, found))


def test_pooled_features_are_not_chained(make):
    plain, model = make(num_classes=0).eval(), make(num_classes=0, chain=CHAIN).eval()
    same_weights(plain, model)
    x = batch_for(model)
    assert all(torch.equal(ours, own) for ours, own in zip(model.forward_exits(x), plain.forward_exits(x)))
    assert torch.equal(model(x), plain(x))


def test_a_head_without_the_others_gives_features_but_no_logits(make):
    plain, model = settled_pair(make)
    x = batch_for(model)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features, pre_logits=True), plain.forward_head(features, pre_logits=True))
    with pytest.raises(ValueError, match=r"chain=0\.5.*call the model"):
        model.forward_head(features)


def test_a_fused_network_has_the_same_chained_logits():
    _, model = settled_pair(NETWORKS["resnet"])
    x = batch_for(model)
    for ours, theirs in zip(fuse(model).forward_exits(x), model.forward_exits(x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_a_trace_computes_the_chained_logits(make):
    _, model = settled_pair(make)
    x = batch_for(model, 2, seed=1)
    traced = torch.jit.trace(model, batch_for(model))
    assert torch.allclose(traced(x), model(x), atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_network_has_the_same_chained_logits(training):
    _, model = settled_pair(NETWORKS["vgg"])
    model.train(training)
    x = batch_for(model)
    expected, found = copy.deepcopy(model)(x), torch.compile(model, backend="eager", fullgraph=True)(x)
    if not training:
        expected, found = (expected,), (found,)
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(found, expected, strict=True))


# Training.


def own_and_output(model, x):
    """The exits' own logits, read behind their heads, and the model's output in training mode."""
    own = []
    answer = model.answer

    def recorded(exit_index, feature):
        own.append(answer(exit_index, feature))
        return own[-1]

    model.answer = recorded
    try:
        return own, model(x)
    finally:
        del model.answer


@pytest.mark.parametrize("weights", [None, [1, 0.5, 2]])
def test_each_exits_loss_sees_its_own_logits_and_those_before_times_the_chain(make, weights):
    model = make(chain=CHAIN, loss_weights=weights).train()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    own, _ = own_and_output(model, x := batch_for(model))
    torch.manual_seed(0)
    found = task(x, TARGETS)["loss"]
    expected = [F.cross_entropy(logits, TARGETS) for logits in chained(own)]
    assert torch.allclose(found, sum(w * loss for w, loss in zip(weights or [1, 1, 1], expected)), atol=1e-4)


def test_an_exits_loss_gives_no_gradient_to_the_logits_of_those_before(make):
    model = make(chain=CHAIN).train()
    own, logits = own_and_output(model, batch_for(model))
    for of, exit_logits in enumerate(logits):
        loss = F.cross_entropy(exit_logits, TARGETS)
        gradients = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
        assert [gradient is not None for gradient in gradients] == [k == of for k in range(len(own))]
        probabilities = exit_logits.detach().softmax(-1) - F.one_hot(TARGETS, CLASSES)
        assert torch.allclose(gradients[of], probabilities / len(TARGETS), atol=1e-6)


def test_distillation_teaches_chained_logits_by_the_last_exits():
    model = tiny_vgg(drop_rate=0.0, chain=CHAIN, distill_weight=0.3, distill_temperature=2).train()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    found = task(x := batch_for(model), TARGETS)
    own, _ = own_and_output(model, x)
    logits = chained(own)
    teacher = (logits[-1].detach() / 2).softmax(-1)
    expected = F.cross_entropy(logits[-1], TARGETS)
    for early in logits[:-1]:
        expected = expected + 0.7 * F.cross_entropy(early, TARGETS) + 0.3 * F.cross_entropy(early / 2, teacher)
    assert torch.allclose(found["loss"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [dict(), dict(gradient_equilibrium=True), dict(distill_feature_weight=0.1)], ids=str
)
def test_chained_exits_are_trained_with_other_settings_too(make, settings):
    model = make(chain=CHAIN, **settings).train()
    ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)(batch_for(model), TARGETS)["loss"].backward()
    assert all(classifier.weight.grad.any() for classifier in model.get_classifier())


def test_an_aggregator_gets_the_gradients_of_the_chained_losses():
    pytest.importorskip("torchjd", reason="needs the extra aggregation")
    plain = tiny_vgg(drop_rate=0.0, chain=CHAIN, beta="joint").train()
    model = same_weights(plain, tiny_vgg(drop_rate=0.0, chain=CHAIN, beta="joint", aggregator="UPGrad"))
    x = batch_for(model)
    for network in (plain, model):
        ClassificationTask(network, nn.CrossEntropyLoss(), verbose=False)(x, TARGETS)["loss"].backward()
    for head, other in zip(plain.heads, model.heads):  # one exit trains each: no aggregate
        assert torch.allclose(head.fc.weight.grad, other.fc.weight.grad, atol=1e-6)


@pytest.mark.parametrize("make_checkpointed", [tiny_msdnet, twin_of_vit])
def test_gradient_checkpointing_changes_no_gradient(make_checkpointed):
    set_reentrant_ckpt(False)
    torch.manual_seed(0)
    model = make_checkpointed(drop_rate=0.0, chain=CHAIN).train()
    x, found = batch_for(model), []
    for enable in (False, True):
        network = copy.deepcopy(model)
        network.set_grad_checkpointing(enable)
        ClassificationTask(network, nn.CrossEntropyLoss(), verbose=False)(x, TARGETS)["loss"].backward()
        found.append([parameter.grad for parameter in network.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None and theirs is None) or torch.allclose(ours, theirs, atol=1e-5)


# Early exit.


def spread(model, x):
    """A policy with which samples leave at every exit; its thresholds lie halfway between two confidences."""
    confidences = torch.stack(model.forward_exits(x)).softmax(-1).amax(-1)
    first = confidences[0].sort().values[3:5].mean()
    second = confidences[1][confidences[0] < first].sort().values[1:3].mean()
    return ExitPolicy([first.item(), second.item(), 0.0])


@torch.no_grad()
def test_a_batch_is_predicted_as_its_samples_are_and_as_forward_exits_says(make):
    _, model = settled_pair(make)
    x = batch_for(model, 8)
    policy, logits = spread(model, x), torch.stack(model.forward_exits(x))
    together = predict(model, x, policy)
    assert set(together.exit_index.tolist()) == {0, 1, 2}
    assert torch.equal(together.exit_index, policy.exit_index(logits))
    assert torch.allclose(together.logits, logits[together.exit_index, torch.arange(8)], atol=1e-4)
    for row in range(8):
        alone = predict(model, x[row : row + 1], policy)
        assert alone.exit_index.item() == together.exit_index[row]
        assert torch.allclose(alone.logits[0], together.logits[row], atol=1e-4)


@torch.no_grad()
def test_a_backbone_whose_batch_cannot_shrink_predicts_the_same():
    torch.manual_seed(0)
    model = settled(wrapped(chain=CHAIN))
    x = batch_for(model, 8)
    policy = spread(model, x)
    expected = predict(model, x, policy)
    model.shrinks = False
    found = predict(model, x, policy)
    assert torch.equal(found.exit_index, expected.exit_index)
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)


@torch.no_grad()
def test_an_exit_that_is_switched_off_still_adds_to_those_after_it(make):
    _, model = settled_pair(make)
    x = batch_for(model, 8)
    with recorded_heads(model) as calls:
        found = predict(model, x, ExitPolicy([None, None, 0.0]))
    assert {0, 1} <= set(calls)
    assert torch.allclose(found.logits, model(x), atol=1e-4)


@torch.no_grad()
def test_an_ensemble_combines_the_chained_logits():
    _, model = settled_pair(NETWORKS["vgg"])
    x = batch_for(model, 8)
    policy = ExitPolicy([None, 0.0, 0.0], ensemble=[[1], [0, 1], [0, 1, 1]])
    logits = torch.stack(model.forward_exits(x))
    assert torch.allclose(predict(model, x, policy).logits, policy.predicted(logits)[1], atol=1e-4)


def test_costs_include_the_heads_that_chained_logits_need():
    plain, model = tiny_vgg(), tiny_vgg(chain=CHAIN)
    assert exit_flops(model) == exit_flops(plain)
    assert exit_flops(model, lazy=True, heads=()) == exit_flops(plain, lazy=True)
    assert last_exit_flops(model) == exit_flops(plain, lazy=True)[-1] > last_exit_flops(plain)


# Weights.


def test_a_model_loaded_from_its_folder_is_chained_as_it_was_trained(make, tmp_path):
    _, model = settled_pair(make)
    hub.write_weights(model, tmp_path)  # in half precision
    assert json.loads((tmp_path / hub.CONFIG_FILE).read_text())["model_args"]["chain"] == CHAIN
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **model_args_of(model)).eval()
    x = batch_for(model)
    assert again.chain == CHAIN
    for ours, theirs in zip(again.forward_exits(x), model.forward_exits(x), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=2e-2)


def model_args_of(model):
    """Sizes of the tiny backbones, which tests give to timm rather than to the twin's config."""
    return dict(img_size=64, depth=4) if "vit" in model.pretrained_cfg.get("architecture", "") else {}


def test_an_unchained_models_files_do_not_mention_a_chain(tmp_path):
    model = tiny_vgg()
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert "chain" not in model.state_dict() and "chain" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("chain", [0.0, 0.25])
def test_weights_are_not_loaded_into_a_network_with_another_chain(make, chain, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(make(chain=CHAIN).state_dict(), file)
    with pytest.raises(ValueError, match=r"create it with chain=0\.5"):
        make(chain=chain).load_state_dict(torch.load(file))
    with pytest.raises(ValueError, match=r"create it with chain=0\.5"):
        load_checkpoint(make(chain=chain), str(file))
    with pytest.raises(ValueError, match=r"create it with chain=0\.5"):
        make(chain=chain, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


@pytest.mark.parametrize("chain", [0.3, 0.5, 1.0])
def test_a_chain_in_half_precision_is_the_same_chain(chain):
    model = tiny_vgg(chain=chain)
    state_dict = {
        key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()
    }
    tiny_vgg(chain=chain).load_state_dict(state_dict)


def test_weights_trained_without_a_chain_may_be_trained_further_with_one(make, tmp_path):
    file = tmp_path / "weights.pth"
    plain = make()
    torch.save(plain.state_dict(), file)
    make(chain=CHAIN).load_state_dict(torch.load(file))
    model = make(chain=CHAIN, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    assert all(
        torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items() if key != "chain"
    )


def test_presets_fitted_without_the_chain_are_dropped(tmp_path):
    hub.write_weights(settled(tiny_vgg(presets=dict(fast=dict(thresholds=[0.5, None, 0.0])))), tmp_path)
    with pytest.warns(UserWarning, match="Dropped the presets fast: the model's chain"):
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, chain=CHAIN)
    assert model.presets == {} and model.chain == CHAIN


def test_copies_and_averaged_weights_keep_the_chain():
    model = tiny_vgg(chain=0.3)
    average = ModelEmaV3(model, decay=0.9)
    average.update(model)
    for copied in (copy.deepcopy(model), average.module):
        assert copied.chain == 0.3 and copied.is_chained
        assert math.isclose(copied.state_dict()["chain"].item(), 0.3, rel_tol=1e-6)


# Arguments.


@pytest.mark.parametrize("chain", [-0.1, 1.1, math.nan, math.inf, True, "0.5", [0.5]], ids=str)
def test_a_chain_that_is_no_share_is_refused_by_its_value(make, chain):
    with pytest.raises(ValueError, match="chain is ") as error:
        make(chain=chain)
    assert repr(chain) in str(error.value)


def test_a_chain_of_one_exit_is_refused():
    with pytest.raises(ValueError, match="at least two exits"):
        tiny_msdnet(exits=1, chain=CHAIN)
