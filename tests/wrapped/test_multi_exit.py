"""A timm backbone has the same logits with exits as without, and its exits behave like those of native networks."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from helpers import (
    BACKBONES,
    CLASSES,
    backbone,
    images,
    module_modes,
    recorded_heads,
    same_weights,
    settled,
    wrapped,
)
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_reentrant_ckpt
from timm.models.convmixer import ConvMixer
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import timm_dfs
from timm_dfs import ExitPolicy, MultiExit, Objective, exit_flops, predict
from timm_dfs.base.objective import AGGREGATORS
from timm_dfs.wrapped.exit_points import ExitPoint
from timm_dfs.wrapped.feature_heads import feature_head

LAYOUTS = tuple(BACKBONES)
COMPILED = ("NCHW", "NLC")
TARGETS = torch.arange(4)


def x(batch=4, **kwargs):
    return images(batch, size=64, **kwargs)


@pytest.fixture(scope="module")
def plain():
    """A wrapped network for each layout, in eval mode, that no test changes."""
    return {layout: settled(wrapped(layout)) for layout in LAYOUTS}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


def gradients(model):
    model.zero_grad()
    torch.manual_seed(0)  # of what is dropped at random
    answers = model.forward_exits(x())
    assert len(answers) == model.num_exits
    sum((k + 1) * answer.square().mean() for k, answer in enumerate(answers)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(ours, theirs, **tolerance):
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None, name
        else:
            assert torch.allclose(ours[name], gradient, **{"rtol": 1e-4, "atol": 1e-6, **tolerance}), name


# What forward gives.


def test_in_evaluation_the_last_exits_logits_are_the_backbones_own(layout, plain):
    model = plain[layout]
    assert torch.equal(model(x()), model.backbone(x()))
    assert torch.equal(model.forward_exits(x())[-1], model.backbone(x()))


@pytest.mark.parametrize("referencing", ["two_sided", "one_sided"])
@pytest.mark.parametrize("beta", [None, 0, 0.5, 1])
def test_no_logit_of_a_referencing_network_depends_on_the_partition(beta, referencing):
    model = settled(wrapped(beta=None))
    other = same_weights(model, wrapped(beta=beta, referencing=referencing))
    for ours, theirs in zip(other.forward_exits(x()), model.forward_exits(x()), strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_without_referencing_evaluation_computes_what_was_trained(layout):
    model = settled(wrapped(layout, referencing="off"))
    last = model.forward_exits(x())[-1]
    assert not torch.allclose(last, model.backbone(x()), atol=1e-4)
    assert torch.equal(model(x()), last)
    assert torch.equal(model.forward_head(model.forward_features(x())), last)
    assert torch.allclose(predict(model, x(), ExitPolicy([None, None, 0.0])).logits, last, atol=1e-5)
    with pytest.raises(ValueError, match="referencing is 'off'"):
        model.forward_intermediates(x())


def test_joint_training_without_referencing_leaves_the_backbone_as_it_is():
    model = settled(wrapped(beta="joint", referencing="off"))
    assert torch.equal(model(x()), model.backbone(x()))
    assert torch.equal(model.forward_intermediates(x(), indices=1)[0], model.forward_features(x()))


def test_wrapping_leaves_the_weights_and_the_mode_alone(layout):
    inner = backbone(layout).eval()
    before, modes = copy.deepcopy(inner.state_dict()), module_modes(inner)
    answer = inner(x())
    model = MultiExit(inner, 3)
    assert model.backbone is inner and not model.training and module_modes(inner) == modes
    assert all(torch.equal(before[key], value) for key, value in model.backbone.state_dict().items())
    assert torch.equal(inner(x()), answer) and torch.equal(model(x()), answer)


def test_in_training_forward_gives_every_exits_logits(layout):
    model = wrapped(layout).train()
    answers = model(x())
    assert isinstance(answers, tuple) and [answer.shape for answer in answers] == [(4, CLASSES)] * 3
    assert model.num_exits == 3 and len(model.exit_points) == 2


def test_every_parameter_gets_a_gradient(layout):
    model = wrapped(layout).train()
    with torch.no_grad():
        for parameter in model.parameters():  # timm sets some to zero, so that others have no gradient
            parameter.add_(0.02 * torch.randn_like(parameter))
    missing = [name for name, gradient in gradients(model).items() if gradient is None or not gradient.any()]
    dead = {"pair": 1}.get(layout, 0)  # the pixels' last projection of TNT reads what the tokens dropped
    assert len(missing) <= dead, missing


def test_forward_is_head_after_features(layout, plain):
    model = plain[layout]
    assert torch.equal(model.forward_head(model.forward_features(x())), model(x()))
    assert model.forward_head(model.forward_features(x()), pre_logits=True).shape == (4, model.head_hidden_size)


def test_intermediate_features_are_the_backbones(plain):
    model = plain["NCHW"]
    ours, theirs = (network.forward_intermediates(x(), indices=2) for network in (model, model.backbone))
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(mine, its) for mine, its in zip(ours[1], theirs[1], strict=True))


def test_without_classes_every_exit_gives_features(layout):
    name, settings = BACKBONES[layout]
    model = MultiExit(timm.create_model(name, **settings, num_classes=0), 3).eval()
    answers = model.forward_exits(x())
    assert [answer.shape[1] for answer in answers] == model.pooled_widths()
    assert all(answer.ndim == 2 for answer in answers)


@pytest.mark.parametrize("kind", ["auto", "linear", "conv", "wide"])
def test_every_kind_of_head_gives_logits(kind):
    model = wrapped(head=kind).train()
    assert [answer.shape for answer in model(x())] == [(4, CLASSES)] * 3


def test_the_classifiers_of_wide_heads_read_many_channels_of_a_coarse_map():
    model = wrapped(head="wide").eval()
    feature = model.forward_intermediates(x(), indices=1)[1][0]
    assert model.pooled_widths()[:2] == [640, 640]
    body = model.heads[0].body(torch.randn(2, model.feature_info[0]["num_chs"], *feature.shape[2:]))
    assert body.shape[1] == 640
    assert body.shape[2] < feature.shape[2]


def test_dropout_reaches_the_early_exits():
    model = wrapped(drop_rate=0.3)
    assert [head.drop.p for head in model.heads] == [0.3, 0.3]


# Partition.


def channel_gradients(model, layout):
    """Gradient of each exit's loss by channel of each early exit's feature: {(feature, exit): (C,) or None}."""
    features = []
    handles = [
        partition.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        for partition in model.partitions
    ]
    answers = model.forward_exits(x())
    for handle in handles:
        handle.remove()
    found = {}
    for of, answer in enumerate(answers):
        loss = nn.functional.cross_entropy(answer, TARGETS)
        for k, gradient in enumerate(torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)):
            if gradient is not None:
                axes = [axis for axis in range(gradient.ndim) if axis != model.partitions[k].dim % gradient.ndim]
                gradient = gradient.abs().sum(axes)
            found[k, of] = gradient
    return found


@pytest.mark.parametrize("referencing", ["two_sided", "one_sided", "off"])
@pytest.mark.parametrize("beta", [0.25, (0.25, 0.75)], ids=["one beta", "a beta for each exit"])
def test_losses_train_the_channels_of_an_exit_feature_as_the_partition_says(layout, beta, referencing):
    model = wrapped(layout, beta=beta, referencing=referencing).train()
    assert model.beta == beta
    for (k, of), gradient in channel_gradients(model, layout).items():
        shared = model.partitions[k].shared
        share = beta[k] if isinstance(beta, tuple) else beta
        assert shared == round(share * model.feature_info[k]["num_chs"]) > 0
        if of < k:
            assert gradient is None
        elif of == k:
            assert gradient[:shared].any() == (referencing == "one_sided")
            assert gradient[shared:].all()
        else:
            assert gradient[:shared].any() and not gradient[shared:].any()


@pytest.mark.parametrize("beta", [None, 0, 1])
def test_beta_0_trains_a_feature_by_its_exit_beta_1_by_deeper_exits_and_joint_by_both(layout, beta):
    found = channel_gradients(wrapped(layout, beta=beta).train(), layout)
    for k in range(2):
        assert bool(found[k, k].any()) == (beta in (None, 0))
        assert bool(found[k, 2].any()) == (beta in (None, 1))


@pytest.mark.parametrize("size, beta, shared", [(32, 0.5, 16), (32, 0.3, 10), (48, 0.99, 48), (48, 0.001, 0)])
def test_the_shared_part_is_the_rounded_share_of_the_channels(size, beta, shared):
    model = wrapped(beta=beta)  # 32 and 48 channels
    assert {p.channels: p.shared for p in wrapped(beta=beta, exits=("layer1", "layer2")).partitions}[size] == shared
    assert model.beta == beta


@pytest.mark.parametrize("value", [[0.5], [0.5, 0.5, 0.5], [0.5, -0.1], [0.5, "0.9"], [0.5, float("nan")], [True, 0.5]])
def test_betas_that_are_no_shares_or_not_one_for_each_early_exit_are_refused(value):
    with pytest.raises(ValueError, match=r"beta is .*; give .*one number") as error:
        wrapped(beta=value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [-0.1, 1.1, "half", True, float("nan")])
def test_a_beta_outside_the_unit_interval_is_refused(value):
    with pytest.raises(ValueError, match="beta is"):
        wrapped(beta=value)


def test_a_referencing_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'one_sided'"):
        wrapped(referencing="both")


# Early exit.


def middling(model, batch):
    """Thresholds at which some samples take each exit."""
    answers = torch.stack(model.forward_exits(batch)).softmax(-1).amax(-1)
    first = answers[0].sort().values[3:5].mean()
    second = answers[1][answers[0] < first].sort().values[1:3].mean()
    return ExitPolicy([first.item(), second.item(), 0.0])


@torch.no_grad()
def test_a_batch_is_predicted_as_its_samples_are(layout, plain):
    model, batch = plain[layout], x(8)
    policy = middling(model, batch)
    together = predict(model, batch, policy)
    assert set(together.exit_index.tolist()) == {0, 1, 2}
    for row in range(8):
        alone = predict(model, batch[row : row + 1], policy)
        assert alone.exit_index.item() == together.exit_index[row]
        assert torch.allclose(alone.logits[0], together.logits[row], atol=1e-4)


@torch.no_grad()
def test_a_sample_gets_the_logits_of_its_exit(layout, plain):
    model, batch = plain[layout], x(8)
    answers = torch.stack(model.forward_exits(batch))
    prediction = predict(model, batch, middling(model, batch))
    expected = answers[prediction.exit_index, torch.arange(8)]
    assert torch.allclose(prediction.logits, expected, atol=1e-4)


def test_the_batch_shrinks_at_every_exit_that_samples_take(layout, plain):
    model, batch = plain[layout], x(8)
    assert model.shrinks
    prediction = predict(model, batch, policy := middling(model, batch))
    with recorded_heads(model) as calls:
        predict(model, batch, policy)
    assert calls == {k: [int((prediction.exit_index >= k).sum())] for k in range(2)}


@pytest.fixture
def stubborn():
    """A network that reshapes its feature in a way that depends on the batch size."""
    inner = backbone().eval()
    forward = inner.forward_features
    inner.forward_features = lambda x: forward(x).reshape(len(x), -1, x.shape[2] // 32, x.shape[3] // 32)
    return settled(MultiExit(inner, 3))


@torch.no_grad()
def test_where_the_batch_cannot_shrink_exited_samples_are_still_computed(stubborn):
    batch = x(8)
    assert not stubborn.shrinks
    prediction = predict(stubborn, batch, middling(stubborn, batch))
    assert set(prediction.exit_index.tolist()) == {0, 1, 2}
    answers = torch.stack(stubborn.forward_exits(batch))
    assert torch.allclose(prediction.logits, answers[prediction.exit_index, torch.arange(8)], atol=1e-4)


def test_layers_beyond_the_deepest_exit_taken_are_not_computed(layout, plain):
    model, calls = plain[layout], []
    deepest = model.backbone.get_submodule(model.exit_points[1].removeprefix("backbone."))
    handle = deepest.register_forward_hook(lambda *_: calls.append(1))
    prediction = predict(model, x(), ExitPolicy([0.0, 0.0, 0.0]))
    handle.remove()
    assert prediction.exit_index.tolist() == [0] * 4 and not calls


def test_two_threads_share_one_model(layout, plain):
    model = plain[layout]
    batches = [x(8, seed=seed) for seed in range(4)]
    policies = [ExitPolicy([0.0, 0.0, 0.0]), ExitPolicy([2.0, 2.0, 0.0]), middling(model, batches[0])]
    jobs = [(batch, policy) for batch in batches for policy in policies]
    expected = [predict(model, *job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: predict(model, *job), jobs * 2))
    for ours, theirs in zip(found, expected * 2, strict=True):
        assert torch.equal(ours.exit_index, theirs.exit_index)
        assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)


def test_after_a_walk_that_fails_the_model_works_as_before(plain):
    model = plain["NCHW"]
    with pytest.raises(ZeroDivisionError):
        model.walk(x(), lambda *_: 1 / 0)
    assert model.forward_state.at_exit is None
    assert torch.equal(model(x()), model.forward_exits(x())[-1])


@pytest.mark.parametrize("exits", [(3,), (-1,)])
def test_a_walk_to_an_exit_that_does_not_exist_is_refused(exits, plain):
    with pytest.raises(ValueError, match="numbered 0 to 2"):
        plain["NCHW"].walk(x(), lambda *_: None, exits=exits)


# Cost.


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLC"])
def test_cost_rises_from_exit_to_exit_and_lazily_nothing_costs_more(layout, plain):
    published, lazy = (exit_flops(plain[layout], (3, 64, 64), lazy=lazy) for lazy in (False, True))
    assert published == sorted(set(published)) and lazy == sorted(set(lazy))
    assert all(a <= b for a, b in zip(lazy, published, strict=True))


def test_without_a_size_the_cost_is_for_the_images_that_the_backbone_was_built_for(plain):
    assert exit_flops(plain["NLC"]) == exit_flops(plain["NLC"], (3, 64, 64))


# What cannot be wrapped.


def test_a_module_that_is_not_timms_is_refused():
    with pytest.raises(ValueError, match="Sequential has no forward_features"):
        MultiExit(nn.Sequential(nn.Linear(2, 2)))


def test_a_network_with_exits_is_refused(plain):
    with pytest.raises(ValueError, match="has exits already"):
        MultiExit(plain["NCHW"])
    with pytest.raises(ValueError, match="has exits already"):
        MultiExit(timm.create_model("dfs_vgg7_cifar100"))


def test_a_backbone_that_is_part_of_a_wrapped_network_is_refused(plain):
    with pytest.raises(ValueError, match="has exits already"):
        MultiExit(plain["NCHW"].backbone)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_backbone_is_refused():
    with pytest.raises(ValueError, match="scripted, which fixes its code"):
        MultiExit(torch.jit.trace(backbone(), x()))


def test_a_compiled_backbone_is_refused():
    with pytest.raises(ValueError, match=r"before torch\.compile, then compile the MultiExit"):
        MultiExit(torch.compile(backbone()))


def test_a_feature_extractor_is_refused():
    with pytest.raises(ValueError, match="timm"):
        MultiExit(timm.create_model("test_resnet", features_only=True))


def test_values_that_are_not_modules_are_refused():
    for value in (None, "resnet18", torch.ones(1)):
        with pytest.raises(ValueError, match="timm"):
            MultiExit(value)


@pytest.mark.parametrize("value", ["Linear", "", None, 3])
def test_a_head_that_does_not_exist_is_refused_with_those_that_do(value):
    with pytest.raises(ValueError, match="'auto', 'linear', 'conv'"):
        wrapped(head=value)


@pytest.mark.parametrize("kind", ["conv", "wide"])
@pytest.mark.parametrize("layout", ["NLC", "NCL"])
def test_a_convolutional_head_for_tokens_is_refused(layout, kind):
    with pytest.raises(ValueError, match="returns tokens"):
        feature_head(kind, ExitPoint("here", 8, layout, 0), CLASSES, "avg", 0.0)


def test_a_frozen_backbone_stays_frozen_and_its_exits_train():
    inner = backbone().requires_grad_(False)
    model = MultiExit(inner, 3).train()
    found = gradients(model)
    assert {name.split(".")[0] for name, gradient in found.items() if gradient is not None} == {"heads"}
    assert not any(parameter.requires_grad for parameter in inner.parameters())


# timm's verbs.


def test_resetting_gives_every_exit_a_fresh_classifier(layout):
    model = wrapped(layout).eval()
    before = model.get_classifier()
    model.presets = dict(fast=dict(thresholds=[0, 0, 0]))
    with pytest.warns(UserWarning, match="Dropped the presets fast"):
        model.reset_classifier(9)
    after = model.get_classifier()
    assert len(after) == 3 and not set(map(id, before)) & set(map(id, after))
    assert [fc.out_features for fc in after] == [9, 9, 9] and model.num_classes == 9
    assert [answer.shape for answer in model.forward_exits(x())] == [(4, 9)] * 3


def test_resetting_to_no_classes_gives_features(layout):
    model = wrapped(layout).eval()
    pooled = model.forward_head(model.forward_features(x()), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x()), pooled)
    assert [answer.ndim for answer in model.forward_exits(x())] == [2, 2, 2]


@pytest.mark.parametrize("layout, pool", [("NCHW", "max"), ("NHWC", "max"), ("NLC", "avg")])
def test_resetting_with_another_pooling_changes_the_backbones(layout, pool):
    model, inner = wrapped(layout).eval(), backbone(layout).eval()
    model.reset_classifier(7, pool)
    inner.reset_classifier(7, pool)
    inner.load_state_dict(model.backbone.state_dict())
    assert torch.equal(model(x()), inner(x()))
    assert [answer.shape for answer in model.forward_exits(x())] == [(4, 7)] * 3


def test_resetting_to_no_classes_and_no_pooling_gives_the_backbones_map():
    model = wrapped().eval()
    model.reset_classifier(0, "")
    assert torch.equal(model(x()), model.forward_features(x())) and model(x()).ndim == 4
    assert len(model.forward_exits(x())) == 3


def test_negative_classes_are_refused_and_change_nothing():
    model = wrapped().eval()
    answer = model(x())
    with pytest.raises(ValueError, match="num_classes is -2"):
        model.reset_classifier(-2)
    assert torch.equal(model(x()), answer)


@pytest.mark.parametrize("layout", ["NHWC", "NLC"])
def test_another_input_size_is_that_of_the_backbone(layout):
    model, inner = wrapped(layout).eval(), backbone(layout).eval()
    inner.load_state_dict(model.backbone.state_dict())
    for network in (model, inner):
        network.set_input_size(img_size=96)
    assert model.pretrained_cfg["input_size"] == (3, 96, 96)
    assert torch.equal(model(images(size=96)), inner(images(size=96)))
    assert len(model.forward_exits(images(size=96))) == 3


def test_height_and_width_of_another_input_size_may_differ():
    model = timm.create_model("dfs_efficientvit_m0", exits=2)
    model.set_input_size(img_size=(224, 288))
    assert model.pretrained_cfg["input_size"] == (3, 224, 288)
    assert len(model.eval().forward_exits(torch.zeros(1, 3, 224, 288))) == 2


def test_a_backbone_of_any_input_size_has_nothing_to_set():
    assert not hasattr(wrapped(), "set_input_size")  # as timm's networks of any size have none


def test_torchvisions_feature_extractor_needs_partitions_as_leaves(plain):
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = copy.deepcopy(plain["NCHW"])
    with pytest.raises(ValueError, match=r"leaf_modules=\[timm_dfs\.Partition\]"):
        feature_extraction.create_feature_extractor(model, ["backbone.layer1"], suppress_diff_warning=True)
    extractor = feature_extraction.create_feature_extractor(
        model,
        ["backbone.layer1"],
        tracer_kwargs=dict(leaf_modules=[timm_dfs.Partition]),
        suppress_diff_warning=True,
    ).eval()
    (feature,) = model.forward_intermediates(x(), indices=[1], intermediates_only=True)
    assert torch.equal(extractor(x())["backbone.layer1"], feature)


def test_naflex_patches_are_refused_where_exits_are_computed():
    inner = timm.create_model("naflexvit_base_patch16_gap", depth=4, embed_dim=32, num_heads=2, num_classes=CLASSES)
    model = MultiExit(inner, 3).eval()
    patches = dict(
        patches=torch.randn(2, 6, 768),
        patch_coord=torch.cartesian_prod(torch.arange(2), torch.arange(3)).expand(2, 6, 2),
        patch_valid=torch.ones(2, 6, dtype=torch.bool),
    )
    assert torch.equal(model(patches), inner(patches))  # the backbone alone
    for compute in (model.forward_exits, model.train(), lambda x: predict(model, x, ExitPolicy([0, 0, 0]))):
        with pytest.raises(ValueError, match="x is a dict"):
            compute(patches)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLC"])
def test_checkpointing_keeps_the_gradients_of_every_exit(layout):
    model = wrapped(layout).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    assert_same_gradients(gradients(other), gradients(model))


@pytest.mark.parametrize("layout", ["NCHW", "NLC"])
def test_checkpointing_goes_with_gradient_equilibrium(layout):
    model = wrapped(layout).train()
    model.train_for(Objective(gradient_equilibrium=True))
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    assert_same_gradients(gradients(other), gradients(model))


def test_checkpointing_recomputes_until_it_is_switched_off():
    model, calls = wrapped("NLC").train(), []
    model.backbone.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable, times in ((True, 2), (False, 1)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        gradients(model)
        assert len(calls) == times


def test_reentrant_checkpointing_is_refused():
    model = wrapped()
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(ValueError, match="reentrant"):
            model.set_grad_checkpointing()
        model.set_grad_checkpointing(False)
    finally:
        set_reentrant_ckpt(False)
    model.set_grad_checkpointing()
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(ValueError, match="reentrant"):
            model.train()(x())
    finally:
        set_reentrant_ckpt(False)


@pytest.mark.parametrize("coarse", [False, True])
def test_every_parameter_has_its_group_and_heads_are_in_the_last(layout, coarse):
    model = wrapped(layout)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
    group_of = {name: index for index, names in groups.items() for name in names}
    assert set(group_of) == {name for name, _ in model.named_parameters()}
    heads = {index for name, index in group_of.items() if name.startswith("heads.")}
    assert heads == {max(group_of.values())}
    bare = timm.models.group_parameters(model.backbone, model.backbone.group_matcher(coarse=coarse))
    ours = {name: index for name, index in group_of.items() if not name.startswith("heads.")}
    assert len(set(ours.values())) == len(bare) > 2


def test_under_layer_decay_deeper_layers_learn_faster_and_heads_at_full_rate(layout):
    model = wrapped(layout)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, layer_decay=0.7, weight_decay=0.1)
    scale_of = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scale_of) == len(list(model.parameters()))
    scales = {name: scale_of[id(p)] for name, p in model.named_parameters()}
    assert all(scale == 1 for name, scale in scales.items() if name.startswith("heads."))
    assert all(scale_of[id(p)] == 1 for fc in model.get_classifier() for p in fc.parameters())
    assert min(scales.values()) == scales[next(iter(scales))] < 1


def test_what_the_backbone_wants_without_weight_decay_gets_none():
    model = wrapped("NLC")
    assert model.no_weight_decay() == {f"backbone.{name}" for name in model.backbone.no_weight_decay()} != set()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1)
    free = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert id(model.backbone.pos_embed) in free
    assert wrapped("NCHW").no_weight_decay() == set()


# Copies.


def assert_same_logits(ours, theirs):
    for mine, its in zip(ours.forward_exits(x()), theirs.forward_exits(x()), strict=True):
        assert torch.equal(mine, its)


def test_a_deep_copy_gives_the_same_logits_and_has_its_own_taps(layout, plain):
    model = plain[layout]
    other = copy.deepcopy(model)
    assert_same_logits(other, model)
    assert other.forward_state is not model.forward_state
    before = model.forward_exits(x())
    for parameter in other.heads.parameters():
        nn.init.zeros_(parameter)
    seen = []
    other.walk(x(), lambda k, answer: seen.append(answer))
    assert len(seen) == 3 and not seen[0].any() and not seen[1].any()
    assert all(torch.equal(now, then) for now, then in zip(model.forward_exits(x()), before, strict=True))


def test_a_deep_copy_checkpoints_with_its_own_heads():
    model = wrapped("NLC").train()
    model.set_grad_checkpointing()
    other = copy.deepcopy(model)
    gradients(other)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pickled_model_gives_the_same_logits(layout, plain):
    model = plain[layout]
    assert_same_logits(pickle.loads(pickle.dumps(model)), model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same_logits(torch.load(file, weights_only=False), model)


def test_a_state_dict_gives_another_model_the_same_logits(layout, plain):
    model = plain[layout]
    assert_same_logits(same_weights(model, wrapped(layout)), model)
    assert all(key.startswith(("backbone.", "heads.")) or key == "exit_points" for key in model.state_dict())


# Compilation, formats, types.


@pytest.mark.parametrize("layout", COMPILED)
def test_a_compiled_model_trains_alike_and_is_compiled_once(layout):
    torch._dynamo.reset()
    model = wrapped(layout).train()
    other = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, backend=counter, fullgraph=True)
    for seed in range(2):
        for network in (model, compiled):
            network.zero_grad()
            sum(answer.square().mean() for answer in network(x(seed=seed))).backward()
        assert_same_gradients(
            {name: p.grad for name, p in other.named_parameters()},
            {name: p.grad for name, p in model.named_parameters()},
            atol=1e-5,
        )
    assert counter.frame_count == 1


def test_after_compiling_eager_mode_works(plain):
    torch._dynamo.reset()
    model = copy.deepcopy(plain["NCHW"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x()), plain["NCHW"](x()), atol=1e-5)
    assert_same_logits(model, plain["NCHW"])


def test_checkpointing_in_compiled_code_is_refused_with_the_remedy():
    model = wrapped("NLC").train()
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match=r"train without --torchcompile, or without --grad-checkpointing"):
        torch.compile(model, backend="eager")(x())


def test_a_compiled_model_predicts(plain):
    torch._dynamo.reset()
    model, batch = plain["NCHW"], x(8)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    policy = middling(model, batch)
    assert torch.equal(predict(compiled, batch, policy).exit_index, predict(model, batch, policy).exit_index)


@pytest.mark.parametrize("compiled, missed", [((0,), 0), ((1,), 1), ((0, 1), 0)])
@torch.no_grad()
def test_exit_points_that_were_compiled_on_their_own_are_not_skipped_silently(compiled, missed):
    torch._dynamo.reset()
    model = MultiExit(backbone("NLC"), ("blocks.0", "blocks.1")).eval()
    expected = model(x())
    for k in compiled:
        model.backbone.blocks[k].compile(backend="eager")
    assert torch.equal(model(x()), expected)  # the backbone alone
    for compute in (model.forward_exits, lambda x: predict(model, x, ExitPolicy([None, 0.0, 0.0]))):
        with pytest.raises(ValueError, match=rf"backbone\.blocks\.{missed} .*compile the whole network"):
            compute(x())


@pytest.mark.parametrize(
    "replaced", [lambda model: convert_splitbn_model(model, 2), convert_sync_batchnorm], ids=["split", "sync"]
)
def test_an_exit_point_that_was_replaced_says_so(replaced):
    backbone = ConvMixer(dim=8, depth=2)  # each block ends with a batch norm
    backbone.pretrained_cfg = dict(input_size=(3, 32, 32))
    model = replaced(MultiExit(backbone, ("blocks.0",))).train()
    with pytest.raises(ValueError, match=r"backbone\.blocks\.0 .*BatchNorm\w* was put in after the exit was attached"):
        model(x())


def test_modules_without_exit_points_may_be_compiled_on_their_own(plain):
    torch._dynamo.reset()
    model = copy.deepcopy(plain["NLC"])
    model.backbone.blocks[0].compile(backend="eager")
    for ours, theirs in zip(model.forward_exits(x()), plain["NLC"].forward_exits(x()), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


class AllExits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.forward_exits(batch)


@pytest.mark.parametrize("layout", COMPILED)
def test_all_exits_can_be_exported(layout, plain):
    program = torch.export.export(AllExits(plain[layout]), (x(),))
    for ours, theirs in zip(program.module()(x()), plain[layout].forward_exits(x()), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_channels_last_images_get_the_same_logits(plain):
    model = copy.deepcopy(plain["NCHW"]).to(memory_format=torch.channels_last)
    for ours, theirs in zip(
        model.forward_exits(x().to(memory_format=torch.channels_last)), plain["NCHW"].forward_exits(x()), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_autocast_trains_every_parameter(layout):
    model = wrapped(layout).train()
    with torch.autocast("cpu", torch.bfloat16):
        answers = model(x())
        assert answers[0].dtype == torch.bfloat16
        loss = sum(nn.functional.cross_entropy(answer.float(), TARGETS) for answer in answers)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.heads.parameters())


def test_inference_mode_gives_the_same_logits(layout, plain):
    with torch.inference_mode():
        answers = plain[layout].forward_exits(x())
    for ours, theirs in zip(answers, plain[layout].forward_exits(x()), strict=True):
        assert torch.equal(ours, theirs)


def test_another_type_reaches_the_heads():
    model = MultiExit(backbone(dtype=torch.float64), 3)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.eval()(x().double()).dtype == torch.float64


# Training.


def loss_of(model, **settings):
    model.train_for(Objective(**settings))
    model.train()
    task = ClassificationTask(model=model, criterion=nn.CrossEntropyLoss(), verbose=False)
    return task(x(), TARGETS)["loss"]


def test_timms_task_trains_every_exit(layout):
    model = wrapped(layout)
    loss_of(model).backward()
    assert all(any(p.grad.any() for p in fc.parameters()) for fc in model.get_classifier())


@pytest.mark.parametrize(
    "settings",
    [
        dict(loss_weights=[1, 0.5, 2]),
        dict(distill_weight=0.5),
        dict(distill_feature_weight=0.1),
        dict(gradient_equilibrium=True),
        dict(train_backbone=False),
    ],
    ids=str,
)
def test_every_setting_of_training_trains(layout, settings):
    model = wrapped(layout)
    loss_of(model, **settings).backward()
    assert all(any(p.grad.any() for p in fc.parameters()) for fc in model.get_classifier())


@pytest.mark.parametrize("aggregator", ["PCGrad", "MGDA"])
def test_gradients_can_be_aggregated(aggregator):
    assert aggregator in AGGREGATORS
    model = wrapped(beta=None)
    loss_of(model, aggregator=aggregator).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weighted_losses_weigh():
    model = wrapped(beta=None).eval()
    model.train_for(Objective(loss_weights=[0, 0, 1]))
    loss = ClassificationTask(model=model, criterion=nn.CrossEntropyLoss(), verbose=False).criterion
    answers = model.forward_exits(x())
    assert torch.allclose(loss(answers, TARGETS), nn.functional.cross_entropy(answers[-1], TARGETS))


def test_heads_alone_are_every_classifier_and_nothing_else_changes(layout):
    model = wrapped(layout)
    loss_of(model, train_backbone=False)
    classifiers = {id(p) for fc in model.get_classifier() for p in fc.parameters()}
    heads = {id(p) for p in model.heads.parameters()} | classifiers
    assert {id(p) for p in model.parameters() if p.requires_grad} == heads
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss_of(model, train_backbone=False).backward()
    optimizer.step()
    own = model.backbone.get_classifier()
    mine = {name for name, module in model.named_modules() if module is own}
    changed = {
        key.rpartition(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert mine <= changed
    assert all(name in mine or name.startswith("heads.") for name in changed)
    model.train_for(Objective())
    assert all(p.requires_grad for p in model.parameters())


def test_distances_are_from_the_last_exits_pooled_feature(layout):
    model = wrapped(layout)
    model.train_for(Objective(distill_feature_weight=0.1))
    model.eval()
    *answers, distances = model.forward_distances(x())
    for ours, theirs in zip(answers, model.forward_exits(x()), strict=True):
        assert torch.equal(ours, theirs)
    teacher = model.forward_head(model.forward_features(x()), pre_logits=True)
    head = model.heads[0]
    student = model.adapters[0](head.pool_and_classify(head.body(_feature(model, 0)), pre_logits=True))
    assert torch.allclose(distances[0], torch.linalg.vector_norm(student - teacher), rtol=1e-4)


def _feature(model, k):
    seen = []
    handle = model.partitions[k].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.forward_exits(x())
    handle.remove()
    return seen[0]


def test_gradient_conflict_can_be_measured():
    model = wrapped(beta=None)
    assert timm_dfs.gradient_conflict(model, [(x(), TARGETS)]) is not None
