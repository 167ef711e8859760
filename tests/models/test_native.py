"""The native networks keep the contract of a network with exits, and timm's own."""

import copy
import io
import math
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from helpers import (
    CLASSES,
    ROOT,
    TINY,
    cells,
    images,
    recorded_batches,
    recorded_heads,
    same_weights,
    settled,
    tiny_msdnet,
    tiny_resnet,
    tiny_vgg,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import nn

from timm_dfs.models import ExitResNetCifar, ExitVGG, MSDNet

DEFAULT_REFERENCING = {"msdnet": "one_sided", "resnet": "two_sided", "vgg": "two_sided"}


@pytest.fixture(params=TINY)
def make(request):
    return TINY[request.param]


# Outputs of forward.


def test_in_training_forward_gives_every_exits_logits(make):
    model = make().train()
    logits = model(images(4))
    assert isinstance(logits, tuple) and len(logits) == model.num_exits == 3
    assert all(exit_logits.shape == (4, CLASSES) for exit_logits in logits)


def test_in_evaluation_forward_gives_the_last_exits_logits(make):
    model = settled(make())
    assert torch.equal(model(images()), model.forward_exits(images())[-1])


def test_in_evaluation_forward_computes_no_other_head(make):
    model = settled(make())
    with recorded_batches(dict(model.named_modules())) as calls:
        model(images())
    heads = {name.split(".")[1] for name in calls if name.startswith("heads.")}
    assert heads == {"2"}  # forward calls the parts of the last head, not the head


def test_forward_exits_computes_every_head_once_in_either_mode(make):
    for mode in (True, False):
        model = make().train(mode)
        with recorded_heads(model) as calls:
            model.forward_exits(images())
        assert calls == {0: [4], 1: [4], 2: [4]}


def test_forward_is_head_after_features(make):
    model = settled(make())
    features = model.forward_features(images())
    assert features.ndim == 4 and features.shape[1] == model.num_features
    assert torch.equal(model.forward_head(features), model(images()))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (4, model.head_hidden_size)
    assert torch.equal(model.get_classifier()[-1](pooled), model(images()))


# The walk.


def test_a_walk_visits_only_the_named_exits_and_goes_no_deeper(make):
    model = settled(make())
    visited = []
    with recorded_heads(model) as calls:
        model.walk(images(), lambda k, logits: visited.append(k), exits=(0, 1))
    assert visited == [0, 1] and set(calls) == {0, 1}


def test_a_walk_goes_on_with_the_rows_that_the_visitor_returns_in_that_order(make):
    model = settled(make())
    expected = torch.stack(model.forward_exits(images()))
    seen = {}

    def visit(k, logits):
        seen[k] = logits
        return torch.tensor([3, 1]) if k == 0 else None

    model.walk(images(), visit)
    assert torch.allclose(seen[1], expected[1, [3, 1]], atol=1e-5)
    assert torch.allclose(seen[2], expected[2, [3, 1]], atol=1e-5)


def test_a_walk_stops_when_no_rows_go_on(make):
    model = settled(make())
    visited = []
    model.walk(images(), lambda k, _: visited.append(k) or torch.empty(0, dtype=torch.int64))
    assert visited == [0]


@pytest.mark.parametrize("exits", [(3,), (-1,), (0, 7)])
def test_a_walk_to_an_exit_that_does_not_exist_is_refused(exits):
    with pytest.raises(ValueError, match="numbered 0 to 2") as error:
        tiny_vgg().walk(images(), lambda *_: None, exits=exits)
    assert str(exits) in str(error.value)


# Effects of the partition.


@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("referencing", ["two_sided", "one_sided"])
@pytest.mark.parametrize("mode", [True, False])
def test_with_referencing_every_logit_is_the_unpartitioned_networks(make, beta, referencing, mode):
    joint = make(beta="joint", drop_rate=0.0).train(mode)
    partitioned = same_weights(joint, make(beta=beta, referencing=referencing, drop_rate=0.0))
    for ours, theirs in zip(partitioned.forward_exits(images()), joint.forward_exits(images())):
        assert torch.equal(ours, theirs)


def test_without_referencing_logits_differ_from_the_unpartitioned_networks(make):
    joint = settled(make(beta="joint"))
    off = same_weights(joint, make(beta=0.5, referencing="off"))
    assert not torch.allclose(off(images()), joint(images()), atol=1e-3)


def exit_feature_gradients(model):
    """For each exit k, the gradients of every exit's loss at the feature of exit k: {(k, of): (C,) or None}."""
    features = []
    handles = [
        partition.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        for partition in model.partitions
    ]
    logits = model(images())
    for handle in handles:
        handle.remove()
    found = {}
    for of, exit_logits in enumerate(logits):
        loss = nn.functional.cross_entropy(exit_logits, torch.arange(4))
        for k, gradient in enumerate(torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)):
            found[k, of] = None if gradient is None else gradient.abs().sum((0, 2, 3))
    return found


@pytest.mark.parametrize("referencing", ["two_sided", "one_sided", "off"])
def test_losses_reach_the_channels_of_an_exit_feature_as_the_design_says(make, referencing):
    model = make(beta=0.5, referencing=referencing).train()
    for (k, of), gradient in exit_feature_gradients(model).items():
        shared = model.partitions[k].shared
        assert 0 < shared < model.partitions[k].channels
        if of < k:
            assert gradient is None
        elif of == k:
            assert (gradient[:shared].any()) == (referencing == "one_sided")
            assert gradient[shared:].any()
        else:
            assert gradient[:shared].any()
            assert not gradient[shared:].any()


@pytest.mark.parametrize("betas", [[0.25, 0.75], (1, 0), [0.5, 1.0]], ids=str)
def test_every_exit_can_have_a_beta_of_its_own(make, betas):
    model = make(beta=betas, referencing="one_sided").train()
    assert model.beta == tuple(betas)
    assert [partition.beta for partition in model.partitions] == list(betas)
    for (k, of), gradient in exit_feature_gradients(model).items():
        shared = round(betas[k] * model.feature_info[k]["num_chs"])
        if of < k:
            assert gradient is None
        elif of == k:
            assert gradient[:shared].any() == (betas[k] > 0) and gradient[shared:].any() == (betas[k] < 1)
        else:  # a deeper exit's gradient passes every exit point between
            passes = all(beta > 0 for beta in betas[k:of])
            assert (gradient is not None and bool(gradient[:shared].any())) == passes
            assert gradient is None or not gradient[shared:].any()


def test_shared_channels_get_no_gradient_from_an_early_exit_when_two_sided():
    model = tiny_vgg(beta=0.5, referencing="two_sided").train()
    model(images())[1].sum().backward()
    stage, shared = model.stages[1], model.partitions[1].shared
    for parameter in (stage.conv.weight, stage.bn.weight, stage.bn.bias):
        assert not parameter.grad[:shared].any()
        assert parameter.grad[shared:].any()


def test_channels_of_an_exits_own_get_no_gradient_from_deeper_exits(make):
    model = make(beta=0.5, drop_rate=0.0).train()
    model(images())[2].square().sum().backward()
    last_norm = {
        ExitVGG: lambda: model.stages[1].bn,
        ExitResNetCifar: lambda: model.stages[1][-1].bn2,
        MSDNet: lambda: model.layers[2][0].transition.bn,
    }[type(model)]()
    k = 0 if isinstance(model, MSDNet) else 1
    shared = model.partitions[k].shared
    assert not last_norm.bias.grad[shared:].any()
    assert last_norm.bias.grad[:shared].any()


def test_beta_zero_leaves_the_shallow_part_to_its_own_exit(make):
    model = make(beta=0, drop_rate=0.0).train()
    logits = model(images())
    first = next(model.parameters())
    (from_deeper,) = torch.autograd.grad(logits[1].sum() + logits[2].sum(), first, retain_graph=True)
    (from_own,) = torch.autograd.grad(logits[0].square().sum(), first)
    if not isinstance(model, MSDNet):  # its finer scales are never partitioned
        assert not from_deeper.any()
    assert from_own.any()


def test_msdnet_partitions_only_the_coarsest_scale():
    model = tiny_msdnet(beta=0, drop_rate=0.0).train()
    model(images())[2].square().sum().backward()
    coarsest, finer = (model.layers[1][j].same[-1].conv.weight.grad for j in (0, 1))
    assert not coarsest.any()
    assert finer.any()


@pytest.mark.parametrize("name", TINY)
def test_the_default_is_half_partitioned_with_the_official_referencing(name):
    model = TINY[name]()
    assert (model.beta, model.referencing) == (0.5, DEFAULT_REFERENCING[name])
    assert [p.shared for p in model.partitions] == [round(info["num_chs"] / 2) for info in model.feature_info[:-1]]
    assert len(model.partitions) == model.num_exits - 1  # the last exit is never partitioned


# Joint training through timm.


def test_joint_training_is_beta_joint(make):
    model = make(beta="joint")
    assert model.beta == "joint"
    assert all(partition.beta == "joint" for partition in model.partitions)
    assert make(beta=model.beta).beta == "joint"


def test_none_means_the_default_beta_as_timm_has_it(make):
    assert make(beta=None).beta == make().beta == 0.5


def test_timms_create_model_is_left_as_it_is():
    code = """
import timm
from timm.models import _factory
before, attributes = dict(vars(_factory)), dict(vars(timm.create_model))
import timm_dfs
assert vars(_factory) == before and vars(timm.create_model) == attributes
assert timm.create_model("dfs_vgg7_cifar100", beta="joint", device="meta").beta == "joint"
print("as it was")
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "as it was", run.stderr


# timm's verbs.


def test_resetting_gives_every_exit_a_fresh_classifier_and_drops_presets(make):
    model = make()
    model.presets = dict(fast=dict(thresholds=[0, 0, 0]))
    before = model.get_classifier()
    with pytest.warns(UserWarning, match="Dropped the presets fast"):
        model.reset_classifier(9)
    after = model.get_classifier()
    assert model.num_classes == 9 and model.presets == {}
    assert len(after) == 3 and not set(map(id, before)) & set(map(id, after))
    assert all(isinstance(fc, nn.Linear) and fc.out_features == 9 for fc in after)
    assert [logits.shape for logits in model.forward_exits(images())] == [(4, 9)] * 3


def test_resetting_to_no_classes_gives_pooled_features(make):
    model = settled(make())
    pooled = model.forward_head(model.forward_features(images()), pre_logits=True)
    model.reset_classifier(0)
    assert all(isinstance(fc, nn.Identity) for fc in model.get_classifier())
    assert torch.equal(model(images()), pooled)


def test_resetting_to_no_classes_and_no_pooling_gives_the_map(make):
    model = settled(make())
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), model.forward_features(images()))
    assert model(images()).ndim == 4


def test_other_poolings_work_and_widen_the_classifier_where_they_must(make):
    model = make(global_pool="catavgmax").eval()
    assert model.get_classifier()[-1].in_features == model.head_hidden_size == 2 * model.num_features
    assert model(images()).shape == (4, CLASSES)
    model.reset_classifier(7, "max")
    assert model.get_classifier()[-1].in_features == model.head_hidden_size == model.num_features
    assert model(images()).shape == (4, 7)


def test_negative_classes_are_refused_by_value():
    with pytest.raises(ValueError, match="num_classes is -1"):
        tiny_vgg(num_classes=-1)
    with pytest.raises(ValueError, match="num_classes is -2"):
        tiny_vgg().reset_classifier(-2)


def test_exit_points_name_modules_of_the_features_width_at_the_features_reduction(make):
    model = settled(make())
    modules = dict(model.named_modules())
    assert model.exit_points == tuple(info["module"] for info in model.feature_info)
    assert set(model.exit_points) <= set(modules) and len(set(model.exit_points)) == 3
    features = []
    handles = [p.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])) for p in model.partitions]
    handles.append(model.heads[-1].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])))
    model.forward_exits(images(size=32))
    for handle in handles:
        handle.remove()
    for info, feature in zip(model.feature_info, features, strict=True):
        assert feature.shape == (4, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])


def test_a_hook_on_an_exit_point_sees_the_exits_feature(make):
    model = settled(make(beta="joint"))
    modules, seen, fed = dict(model.named_modules()), {}, {}
    for k, point in enumerate(model.exit_points):
        modules[point].register_forward_hook(lambda _, __, output, k=k: seen.__setitem__(k, output))
        model.heads[k].register_forward_pre_hook(lambda _, inputs, k=k: fed.__setitem__(k, inputs[0]))
    model.forward_exits(images())
    assert set(seen) == set(fed) == {0, 1, 2}
    assert all(torch.equal(seen[k], fed[k]) for k in range(3))


def test_features_only_gives_the_exits_features(make):
    model = settled(make())
    features = make(features_only=True, out_indices=(0, 1, 2)).eval()
    assert features.feature_info.module_name() == list(model.exit_points)
    maps = features(images(size=32))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [32 // m.shape[-1] for m in maps] == [info["reduction"] for info in model.feature_info]


def test_grad_checkpointing_changes_no_gradient(make):
    plain = make(drop_rate=0.0).train()
    checkpointed = same_weights(plain, make(drop_rate=0.0))
    checkpointed.set_grad_checkpointing()
    for model in (plain, checkpointed):
        sum(logits.square().sum() for logits in model(images())).backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters()):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6), name


def test_grad_checkpointing_recomputes_the_backbone_until_it_is_switched_off(make):
    model = make(drop_rate=0.0).train()
    first = {
        ExitVGG: lambda: model.stages[0],
        ExitResNetCifar: lambda: model.stages[0][0],
        MSDNet: lambda: model.layers[0][0],
    }[type(model)]()
    for enable, times in ((True, 2), (False, 1)):
        model.set_grad_checkpointing(enable)
        with recorded_batches(dict(first=first)) as calls:
            sum(logits.sum() for logits in model(images())).backward()
        assert len(calls["first"]) == times


@pytest.mark.parametrize("coarse", [False, True])
def test_every_parameter_has_its_group_and_groups_go_from_stem_to_heads(make, coarse):
    model = make()
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=coarse))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    group_of = {name: index for index, group in groups.items() for name in group}
    first, heads = next(iter(group_of)), [index for name, index in group_of.items() if name.startswith("heads.")]
    backbone = [index for name, index in group_of.items() if not name.startswith("heads.")]
    assert group_of[first] == 0 == min(backbone)
    assert min(heads) > max(backbone) >= 2  # stem, and more than one block


def test_deeper_layers_learn_faster_under_layer_decay(make):
    model = make()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, layer_decay=0.7)
    scale_of = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scale_of) == len(list(model.parameters()))
    scales = {name: scale_of[id(p)] for name, p in model.named_parameters()}
    backbone = [scale for name, scale in scales.items() if not name.startswith("heads.")]
    assert max(backbone) < scales["heads.2.fc.weight"] == 1
    assert next(iter(scales.values())) == min(backbone) < max(backbone)


def test_grey_images_work(make):
    model = make(in_chans=1).train()
    assert [logits.shape for logits in model(images(channels=1))] == [(4, CLASSES)] * 3
    with pytest.raises(ValueError, match="in_chans is 0"):
        make(in_chans=0)


# Copies.


def test_a_deep_copy_predicts_alike_and_shares_no_parameter(make):
    model = settled(make())
    twin = copy.deepcopy(model)
    assert torch.equal(torch.stack(twin.forward_exits(images())), torch.stack(model.forward_exits(images())))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    before = model(images())
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(model(images()), before)


def test_a_state_dict_makes_another_model_predict_alike(make):
    model = settled(make())
    twin = same_weights(model, make())
    assert torch.equal(twin(images()), model(images()))


def test_a_pickled_model_predicts_alike(make):
    model = settled(make())
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), model(images()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(images()), model(images()))


def test_the_partition_adds_no_entry_to_the_state_dict(make):
    assert make(beta=0.5).state_dict().keys() == make(beta="joint").state_dict().keys()


# Building.


def test_an_unknown_keyword_is_a_type_error(make):
    with pytest.raises(TypeError, match="exist_count"):
        make(exist_count=3)


def test_models_are_made_on_the_device_and_in_the_type_asked_for(make):
    model = make(device="meta", dtype=torch.float64)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert all(tensor.is_meta and tensor.dtype == torch.float64 for tensor in tensors)
    assert model.train()(torch.empty(2, 3, 16, 16, device="meta", dtype=torch.float64))[0].shape == (2, CLASSES)


@pytest.mark.parametrize("size", [8, 20, 33, 48])
def test_images_smaller_and_larger_than_the_native_size_work(make, size):
    model = make().eval()
    assert [logits.shape for logits in model.forward_exits(images(2, size))] == [(2, CLASSES)] * 3


def test_images_need_not_be_square(make):
    assert make().eval()(images(2, 24)[..., :16]).shape == (2, CLASSES)


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("dfs_msdnet_cifar100", 7),
        ("dfs_msdnet_imagenet", 5),
        ("dfs_resnet18_cifar100", 4),
        ("dfs_vgg7_cifar100", 6),
        ("dfs_vgg16_imagenet", 13),
    ],
)
def test_registered_models_have_the_published_exits_and_a_config_that_names_their_parts(name, exits):
    model = timm.create_model(name, device="meta")
    cfg = model.pretrained_cfg
    assert model.num_exits == exits and model.num_classes == cfg["num_classes"]
    modules = dict(model.named_modules())
    assert isinstance(modules[cfg["first_conv"]], nn.Conv2d)
    assert [modules[classifier] for classifier in cfg["classifier"]] == list(model.get_classifier())
    x = torch.empty(2, *cfg["input_size"], device="meta")
    assert model.eval().forward_features(x).shape[-2:] == cfg["pool_size"]


def test_cifar_100_configs_name_its_hundred_classes_in_the_data_sets_order():
    for name in ("dfs_msdnet_cifar100", "dfs_resnet18_cifar100", "dfs_vgg7_cifar100"):
        names = timm.create_model(name, device="meta").pretrained_cfg["label_names"]
        assert len(set(names)) == 100 and list(names) == sorted(names)
        assert names[0] == "apple" and names[-1] == "worm"


# MSDNet's arguments.


@pytest.mark.parametrize(
    "knobs",
    [
        dict(step_mode="lin_grow"),
        dict(prune="min"),
        dict(prune="min", step_mode="lin_grow", step=2),
        dict(bottleneck=False),
        dict(reduction=0),
        dict(reduction=1),
        dict(stem="imagenet"),
        dict(head_width=0),
        dict(exits=1),
        dict(growth_factors=(1,), bottleneck_factors=(1,)),
        dict(growth_factors=(1, 2, 4, 4), bottleneck_factors=(1, 2, 4, 4), step=2),
    ],
    ids=str,
)
def test_msdnets_knobs_build_networks_with_the_exits_asked_for(knobs):
    model = tiny_msdnet(**knobs).train()
    logits = model(images(2, 32))
    assert len(logits) == model.num_exits == len(model.exit_points) == knobs.get("exits", 3)
    sum(exit_logits.square().sum() for exit_logits in logits).backward()
    assert next(model.parameters()).grad.any()


def test_exits_are_at_the_layers_given_by_base_and_step():
    assert tiny_msdnet(exits=4, base=4, step=2).exit_layers == [4, 6, 8, 10]
    assert tiny_msdnet(exits=4, base=4, step=2, step_mode="lin_grow").exit_layers == [4, 7, 12, 19]
    assert tiny_msdnet(exits=1, base=4).exit_points == ("layers.3.0",)


def test_arguments_that_are_switched_off_build_no_layers():
    def convolutions(**knobs):
        return sum(isinstance(m, nn.Conv2d) for m in tiny_msdnet(**knobs).modules())

    assert convolutions(bottleneck=False) < convolutions()
    assert convolutions(reduction=0) < convolutions()


@st.composite
def msdnet_knobs(draw):
    factors = draw(st.sampled_from([(1,), (1, 2), (1, 2, 4), (1, 2, 4, 4)]))
    return dict(
        exits=draw(st.integers(1, 4)),
        base=draw(st.integers(1, 4)),
        step=draw(st.integers(1, 3)),
        step_mode=draw(st.sampled_from(["even", "lin_grow"])),
        growth_factors=factors,
        bottleneck_factors=factors,
        bottleneck=draw(st.booleans()),
        prune=draw(st.sampled_from(["min", "max"])),
        reduction=draw(st.sampled_from([0, 0.5, 0.9])),
        growth_rate=4,
        head_width=4,
        beta="joint",
    )


def depth_of(knobs):
    return tiny_msdnet(**dict(knobs, growth_factors=(1,), bottleneck_factors=(1,), device="meta")).exit_layers[-1]


@settings(max_examples=25, suppress_health_check=[HealthCheck.filter_too_much])
@given(msdnet_knobs())
def test_the_diagonal_walk_gives_what_the_whole_grid_layer_by_layer_gives(knobs):
    assume(depth_of(knobs) >= len(knobs["growth_factors"]))
    model = settled(tiny_msdnet(**knobs))
    x = images(2, 8)
    with torch.no_grad():
        with recorded_batches(cells(model)) as calls:
            walked = model.forward_exits(x)
        scales, expected, y = [], [], x
        for stem in model.stem:
            y = stem(y)
            scales.insert(0, y)
        for layer, row in enumerate(model.layers, 1):
            scales = [cell(*scales[j : j + (1 if cell.down is None else 2)]) for j, cell in enumerate(row)]
            if layer in model.exit_layers:
                expected.append(model.heads[len(expected)](scales[0]))
    for ours, theirs in zip(walked, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert set(calls) == {(layer, j) for layer, j in cells(model) if layer + j <= model.exit_layers[-1]}
    assert all(sizes == [2] for sizes in calls.values())  # none computed twice


@pytest.mark.parametrize("exits", [1, 2])
def test_every_parameter_is_trained_where_layers_do_not_divide_into_scales(exits):
    model = tiny_msdnet(exits=exits, base=4 if exits == 1 else 3, drop_rate=0.0).train()  # 4 layers, 3 scales
    sum(logits.square().sum() for logits in model(images())).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("prune", ["min", "max"])
@pytest.mark.parametrize("depth", [1, 2])
def test_fewer_layers_than_scales_work_or_are_refused_with_the_remedy(prune, depth):
    try:
        model = tiny_msdnet(exits=1, base=depth, prune=prune)
    except ValueError as error:
        assert "fewer scales" in str(error)
    else:
        assert model.eval()(images()).shape == (4, CLASSES)


BAD_KNOBS = [
    dict(exits=0),
    dict(base=0),
    dict(step=-1),
    dict(stem_width=0),
    dict(growth_rate=0),
    dict(stem="tiny"),
    dict(step_mode="odd"),
    dict(prune="none"),
    dict(reduction=-0.1),
    dict(reduction=1.1),
    dict(drop_rate=1.0),
    dict(drop_rate=-0.1),
    dict(beta=1.5),
    dict(referencing="both"),
    dict(head_width=-1),
]


@pytest.mark.parametrize("knobs", BAD_KNOBS, ids=str)
def test_knobs_outside_their_range_are_refused_by_name_and_value(knobs):
    ((name, value),) = knobs.items()
    with pytest.raises(ValueError, match=f"^{name} is ") as error:
        tiny_msdnet(**knobs)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("factors", [(1, 2), (), (1, 2, 4, 4)])
def test_bottleneck_factors_for_other_scales_are_refused(factors):
    with pytest.raises(ValueError, match="one entry per scale") as error:
        tiny_msdnet(bottleneck_factors=factors)
    assert str(factors) in str(error.value)


def test_no_scales_are_refused():
    with pytest.raises(ValueError, match="one entry per scale"):
        tiny_msdnet(growth_factors=(), bottleneck_factors=())


@pytest.mark.parametrize(("growth_rate", "factors"), [(5, (1, 1)), (1, (1, 1)), (3, (1, 3))])
def test_a_growth_that_does_not_halve_is_refused_or_works(growth_rate, factors):
    """Half of a coarser scale's new channels come from the finer scale, half from its own."""
    try:
        model = tiny_msdnet(growth_rate=growth_rate, growth_factors=factors, bottleneck_factors=factors)
    except ValueError as error:
        assert "growth" in str(error)
    else:
        assert model.eval()(images()).shape == (4, CLASSES)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_resnet, dict(layers=(1, 1), channels=(8, 12, 16))),
        (tiny_resnet, dict(layers=(1, 0, 1))),
        (tiny_resnet, dict(layers=(1, 1, 1), channels=(8, 0, 16))),
        (tiny_resnet, dict(layers=(), channels=())),
        (tiny_vgg, dict(depths=(1, 2, 2), widths=(6, 8))),
        (tiny_vgg, dict(depths=(1, 0))),
        (tiny_vgg, dict(widths=(6, 0))),
        (tiny_vgg, dict(depths=(), widths=())),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # the same in every process
)
def test_stages_that_do_not_fit_are_refused_with_their_numbers(make, settings):
    with pytest.raises(ValueError, match=r"positive number|one number") as error:
        make(**settings)
    assert all(str(tuple(value)) in str(error.value) for value in settings.values())


@pytest.mark.parametrize(
    "beta", [-0.1, 1.1, math.nan, True, [0.5, 1.1], [0.5, math.nan], [0.5, True], ["0.5", "0.9"], [0.5, None]], ids=str
)
def test_a_bad_beta_is_refused_through_timm_too(make, beta):
    with pytest.raises(ValueError, match="beta is ") as error:
        make(beta=beta)
    assert repr(beta) in str(error.value)


@pytest.mark.parametrize("beta", [[], [0.5], [0.5, 0.5, 0.5]], ids=str)
def test_betas_for_another_number_of_exits_are_refused_by_both_numbers(make, beta):
    with pytest.raises(ValueError, match=r"beta is .*give one for each of this network's 2 early exits") as error:
        make(beta=beta)
    assert repr(beta) in str(error.value) and f"{len(beta)} numbers" in str(error.value)


class AllExits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.forward_exits(x)


def test_all_exits_can_be_exported(make):
    model = settled(make())
    exported = torch.export.export(AllExits(model), (images(),)).module()
    for ours, theirs in zip(model.forward_exits(images()), exported(images()), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_training_is_one_graph_without_breaks(make):
    explanation = torch._dynamo.explain(make().train())(images())
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


def test_a_compiled_network_s_gradients_are_the_plain_one_s(make):
    plain = make(drop_rate=0.0).train()
    twin = same_weights(plain, make(drop_rate=0.0))
    for model in (plain, torch.compile(twin, backend="aot_eager")):
        sum(logits.square().sum() for logits in model(images())).backward()
    for ours, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
