"""Exit points are found in the backbone; an impossible one is refused with possible ones."""

import math

import pytest
import timm
import torch
from helpers import BACKBONES, CLASSES, backbone, wrapped
from torch import nn

from timm_dfs import MultiExit
from timm_dfs.wrapped.exit_points import choose, probe, spread, stages
from timm_dfs.wrapped.families import FAMILIES, family_name, family_of


def short(model):
    return tuple(point.removeprefix("backbone.") for point in model.exit_points)


# Which.


@pytest.mark.parametrize("count, expected", [(2, [1]), (3, [1, 2]), (4, [0, 1, 2])])
def test_exits_are_spread_evenly_over_the_stages_and_the_last_stage_is_the_last_exits(count, expected):
    assert spread(range(4), count) == expected


@pytest.mark.parametrize("stage_count", range(2, 30))
def test_spread_points_are_distinct_and_rise(stage_count):
    for exits in range(2, stage_count + 1):
        points = spread(range(stage_count), exits)
        assert points == sorted(set(points)) and len(points) == exits - 1 and points[-1] < stage_count - 1


def test_a_number_of_exits_takes_stages():
    assert short(wrapped(exits=4)) == ("layer1", "layer2", "layer3")
    assert short(wrapped("NLC", exits=3)) == ("blocks.1", "blocks.2")


@pytest.mark.parametrize("name, exits", [("test_resnet", 4), ("crossvit_tiny_240", 3), ("efficientvim_m1", 3)])
def test_by_default_there_are_4_exits_or_as_many_as_stages(name, exits):
    model = MultiExit(timm.create_model(name, device="meta"))
    assert model.num_exits == exits == timm.create_model(f"dfs_{name}", device="meta").num_exits


def test_names_say_where_exits_go():
    model = wrapped(exits=("layer1.0", "layer3"))
    assert short(model) == ("layer1.0", "layer3") and model.num_exits == 3
    assert short(wrapped(exits=["layer2"])) == ("layer2",)


@pytest.mark.parametrize("count", [1, 0, -1])
def test_fewer_than_two_exits_are_refused(count):
    with pytest.raises(ValueError, match=f"exits is {count}; give at least 2"):
        wrapped(exits=count)


def test_more_exits_than_stages_are_refused_with_their_names():
    with pytest.raises(ValueError, match="exits is 6, but ResNet has 5 stages") as error:
        wrapped(exits=6)
    for name in ("act1", "layer1", "layer2", "layer3", "layer4"):
        assert name in str(error.value)


@pytest.mark.parametrize("name", ["layer9", "", "backbone.layer1", "Layer1"])
def test_a_name_of_no_module_is_refused_with_names_of_modules(name):
    with pytest.raises(ValueError, match="has no module") as error:
        wrapped(exits=("layer1", name))
    for valid in ("layer1", "layer2", "layer3", "layer4", "conv1"):
        assert valid in str(error.value)


def test_a_module_twice_is_refused():
    with pytest.raises(ValueError, match="every module once"):
        wrapped(exits=("layer1", "layer1"))


def test_the_same_place_by_two_names_is_refused():
    with pytest.raises(ValueError, match="one exit point twice"):
        wrapped(exits=("layer1.0", "layer1"))  # the only block of its stage


def test_modules_out_of_order_are_refused_with_the_right_order():
    with pytest.raises(ValueError, match=r"order \('layer1', 'layer3'\)"):
        wrapped(exits=("layer3", "layer1"))


@pytest.mark.parametrize("value", ["layer1", {"layer1"}, 2.5, True, [1, 2], b"layer1", [None]])
def test_exits_that_are_neither_a_number_nor_names_are_refused_by_value(value):
    with pytest.raises(ValueError, match="exits is"):
        wrapped(exits=value)


def test_an_empty_list_of_names_is_refused():
    with pytest.raises(ValueError, match="exits is empty"):
        wrapped(exits=())


def test_a_module_that_is_never_called_is_refused():
    inner = backbone()
    inner.spare = nn.Identity()
    with pytest.raises(ValueError, match=r"spare \(0 times\)"):
        MultiExit(inner, ("layer1", "spare"))


def test_a_module_that_is_called_twice_is_refused():
    inner = backbone()
    inner.layer1[0].act1 = inner.layer1[0].act2 = nn.ReLU()
    with pytest.raises(ValueError, match=r"layer1.0.act1 \(2 times\)"):
        MultiExit(inner, ("layer1.0.act1",))


def test_modules_of_the_head_are_refused():
    with pytest.raises(ValueError, match=r"fc \(0 times\)"):
        wrapped(exits=("layer1", "fc"))


def test_a_module_without_a_map_or_tokens_is_refused():
    with pytest.raises(ValueError, match="neither a map nor tokens"):
        MultiExit(_with_vector(), ("layer1", "vector"))


def _with_vector():
    inner = backbone()
    inner.vector = nn.Identity()
    forward = inner.forward_features
    inner.forward_features = lambda x: forward(x) + inner.vector(x.new_zeros(len(x), 1))[..., None, None]
    return inner


def test_a_failed_attempt_leaves_no_hooks_and_keeps_the_mode():
    inner = backbone().train()
    for exits in (("layer3", "layer1"), ("layer1", "fc"), 9):
        with pytest.raises(ValueError):
            MultiExit(inner, exits)
    assert all(module.training for module in inner.modules())
    assert not any(module._forward_hooks for module in inner.modules())
    assert MultiExit(inner, 4).num_exits == 4


# What is found there.


@pytest.mark.parametrize("layout", BACKBONES)
def test_layout_channels_and_reduction_are_those_of_the_feature(layout):
    inner = backbone(layout).eval()
    names = choose(inner, 3)
    points = probe(inner, names, (3, 64, 64))
    element, seen = family_of(inner).element, {}
    for name in names:
        inner.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output))
    inner(torch.randn(2, 3, 64, 64))
    for point in points:
        feature = seen[point.module]
        feature = feature if isinstance(feature, torch.Tensor) else feature[element]
        assert feature.shape[point.dim] == point.channels
        assert point.layout == {"pair": "NLC"}.get(layout, layout)
        if point.reduction:
            height = feature.shape[{"NCHW": 2, "NHWC": 1}[point.layout]]
            assert height == 64 // point.reduction
        assert bool(point.reduction) == (feature.ndim == 4)


LATE_CLASS_TOKEN = {
    "cait": ("cait_xxs24_224", dict(depth=4, embed_dim=32), 4),
    "xcit": ("xcit_nano_12_p16_224", dict(depth=4, embed_dim=32), 4),
    "convit": ("convit_tiny", dict(depth=4, embed_dim=8, local_up_to_layer=2), 2),
}
"""Small networks whose class token joins the patches after this many blocks."""


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("family", LATE_CLASS_TOKEN)
def test_exits_before_the_class_token_joins_average_all_patches_and_later_ones_pool_as_the_backbone(family, pool):
    name, settings, joins_after = LATE_CLASS_TOKEN[family]
    inner = timm.create_model(name, **settings, img_size=64, num_classes=CLASSES, global_pool=pool)
    model = MultiExit(inner, [f"blocks.{k}" for k in range(3)], beta="joint").eval()
    features = _features(model, torch.randn(2, 3, 64, 64))
    for k, (head, tokens) in enumerate(zip(model.heads, features, strict=True)):
        joined = k >= joins_after
        assert tokens.shape[1] == 16 + joined
        assert _tokens_read(head, tokens) == ([pool == "token"] + 16 * [pool == "avg"] if joined else 16 * [True])


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("name", ["coat_lite_tiny", "crossvit_tiny_240"])
def test_exits_of_backbones_that_do_not_count_their_class_tokens_pool_as_the_backbone(name, pool):
    model = MultiExit(timm.create_model(name, num_classes=CLASSES, global_pool=pool), 3, beta="joint").eval()
    size = model.pretrained_cfg["input_size"]
    for head, tokens in zip(model.heads, _features(model, torch.randn(1, *size)), strict=True):
        patches = tokens.shape[1] - 1
        assert patches == math.isqrt(patches) ** 2
        assert _tokens_read(head, tokens) == [pool == "token"] + patches * [pool == "avg"]


@pytest.mark.parametrize("name, point", [("coat_lite_tiny", "patch_embed2"), ("crossvit_tiny_240", "patch_embed.1")])
def test_an_exit_before_the_class_token_of_such_a_backbone_has_none(name, point):
    inner = timm.create_model(name, device="meta")
    (found,) = probe(inner, [point], inner.pretrained_cfg["input_size"])
    assert found.prefix_tokens == 0


def _tokens_read(head, tokens):
    """Whether the head's logits depend on each token."""
    tokens = torch.randn_like(tokens).requires_grad_()
    head(tokens).sum().backward()
    return (tokens.grad.abs().sum((0, 2)) > 0).tolist()


def _features(model, x):
    seen = []
    handles = [
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach())) for part in model.partitions
    ]
    model.forward_exits(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("point, prefix_tokens", [("patch_embed", 0), ("blocks.0", 1)])
def test_prefix_tokens_are_those_in_the_feature(point, prefix_tokens):
    (found,) = probe(backbone("NLC", dynamic_img_size=False), [point], (3, 64, 64))
    assert found.prefix_tokens == prefix_tokens


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (160, 96)])
def test_a_map_in_the_shape_of_the_image_has_its_channels_on_the_other_axis(size):
    (found,) = probe(backbone("NLC", dynamic_img_size=True), ["patch_embed"], (3, *size))
    assert (found.layout, found.channels, found.reduction) == ("NHWC", 64, 16)


def test_probing_computes_no_data_and_leaves_the_weights_alone():
    inner = timm.create_model("test_resnet", device="meta")
    points = probe(inner, ["layer1", "layer2"], (3, 64, 64))
    assert [point.channels for point in points] == [32, 48]
    real = backbone().train()
    before = {key: value.clone() for key, value in real.state_dict().items()}
    probe(real, ["layer1"], (3, 64, 64))
    assert all(torch.equal(before[key], value) for key, value in real.state_dict().items())


def test_a_model_without_stages_takes_names_only():
    inner = backbone()
    inner.feature_info = []
    with pytest.raises(ValueError, match="give the names of modules"):
        MultiExit(inner, 2)
    assert MultiExit(inner, ("layer1",)).num_exits == 2


# Families that need an adapter: one small network of each, on no data.

ADAPTED = {
    "coat": ("coat_lite_tiny", ("serial_blocks1.1", "serial_blocks2.1", "serial_blocks3.1")),
    "crossvit": ("crossvit_tiny_240", ("blocks.0", "blocks.1")),
    "hrnet": ("hrnet_w18_small", ("layer1", "stage2", "stage3")),
    "mvitv2": ("mvitv2_tiny", ("stages.0", "stages.1", "stages.2")),
    "nasnet": ("nasnetalarge", ("cell_stem_1", "cell_5", "cell_11")),
    "pnasnet": ("pnasnet5large", ("cell_stem_1", "cell_3", "cell_7")),
    "tnt": ("tnt_s_patch16_224", ("blocks.2", "blocks.5", "blocks.8")),
    "twins": ("twins_pcpvt_small", ("blocks.0.2", "blocks.1.3", "blocks.2.5")),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_families_with_a_record_have_the_expected_exit_points(name):
    architecture, expected = ADAPTED[name]
    inner = timm.create_model(architecture, device="meta")
    assert family_name(inner) == name and name in FAMILIES
    model = MultiExit(inner, min(4, len(stages(inner))))
    assert short(model) == expected
