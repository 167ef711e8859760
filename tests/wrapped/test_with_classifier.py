"""Encoders without a classifier get one, and exits."""

import warnings

import pytest
import timm
import torch
from helpers import images
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

from timm_dfs import ExitPolicy, MultiExit, predict
from timm_dfs.wrapped.with_classifier import WithClassifier, below, is_encoder

SIZE = 112  # of patches of 14 and 16

ENCODERS = ("qwen3_vit_88m_enc", "deepseek_vit_412m_enc")


@pytest.fixture(params=ENCODERS)
def name(request):
    return request.param


def settings():
    return dict(depth=4, embed_dim=32, num_heads=2, img_size=SIZE)


def x(batch=3):
    return images(batch, size=SIZE)


def test_only_what_has_no_classifier_is_an_encoder():
    assert is_encoder(timm.create_model("gemma4_vit_167m_enc", device="meta"))
    assert not is_encoder(timm.create_model("test_vit")) and not is_encoder(nn.Linear(1, 1))


def test_the_classifier_reads_the_average_of_the_encoders_features(name):
    encoder = timm.create_model(name, **settings()).eval()
    model = WithClassifier(encoder, 5).eval()
    average = encoder.forward_features(x()).flatten(1, -2).mean(1)
    assert torch.allclose(model.forward_head(model.forward_features(x()), pre_logits=True), average, atol=1e-5)
    assert torch.allclose(model(x()), model.get_classifier()(average), atol=1e-5)


@torch.no_grad()
def test_an_encoders_twin_has_the_requested_classes(name):
    model = timm.create_model(f"dfs_{name}", num_classes=5, exits=3, **settings()).eval()
    assert [answer.shape for answer in model.forward_exits(x())] == [(3, 5)] * 3
    assert torch.equal(model(x()), model.forward_exits(x())[-1])
    model.reset_classifier(7)
    assert [answer.shape for answer in model.forward_exits(x())] == [(3, 7)] * 3
    features = timm.create_model(f"dfs_{name}", exits=3, **settings()).eval()
    assert [answer.shape[1] for answer in features.forward_exits(x())] == features.pooled_widths()


def test_encoders_that_take_no_dropout_get_it_before_their_classifiers():
    small = dict(depth=2, embed_dim=32, num_heads=2, exits=2, num_classes=5, in_chans=3)
    model = timm.create_model("dfs_gemma4_vit_167m_enc", drop_rate=0.5, img_size=96, **small)
    assert model.heads[0].drop.p == model.backbone.head.drop.p == 0.5
    again = timm.create_model(
        "dfs_gemma4_vit_167m_enc",
        pretrained=True,
        drop_rate=0.0,
        img_size=96,
        pretrained_cfg_overlay=dict(state_dict=model.state_dict()),
        **small,
    )
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fewer = timm.create_model(
            "dfs_gemma4_vit_167m_enc",
            pretrained=True,
            img_size=96,
            pretrained_cfg_overlay=dict(state_dict=model.state_dict()),
            **dict(small, num_classes=3),
        )
    assert [answer.shape[1] for answer in fewer.forward_exits(torch.zeros(1, 3, 96, 96))] == [3, 3]


def test_an_encoders_twin_takes_the_dropout_that_train_py_gives_every_model(name):
    model = timm.create_model(f"dfs_{name}", num_classes=5, exits=3, drop_rate=0.5, **settings())
    assert [head.drop.p for head in model.heads] + [model.backbone.head.drop.p] == [0.5] * 3


@torch.no_grad()
def test_an_encoders_batch_is_predicted_as_its_samples_are(name):
    torch.manual_seed(0)
    model = timm.create_model(f"dfs_{name}", num_classes=5, exits=3, **settings()).eval()
    first = model.forward_exits(x(6))[0].softmax(-1).amax(-1)
    policy = ExitPolicy([first.median().item(), 2.0, 0.0])
    together = predict(model, x(6), policy)
    assert model.shrinks and set(together.exit_index.tolist()) == {0, 2}
    for row in range(6):
        alone = predict(model, x(6)[row : row + 1], policy)
        assert torch.allclose(alone.logits[0], together.logits[row], atol=1e-5)


def test_an_encoder_trains_with_layer_decay(name):
    model = timm.create_model(f"dfs_{name}", num_classes=5, exits=3, **settings()).train()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(model.backbone.head.fc.weight)] == scale[id(model.heads[0].fc.weight)] == 1
    assert scale[id(model.backbone.encoder.patch_embed.proj.weight)] == min(scale.values()) < 0.1
    sum(answer.square().mean() for answer in model(x())).backward()
    optimizer.step()


def test_an_encoder_without_layer_groups_is_refused_with_the_remedy():
    model = WithClassifier(timm.create_model("mobilenetv5_300m_enc", device="meta"))
    with pytest.raises(ValueError, match="no layer groups for MobileNetV5Encoder"):
        model.group_matcher()


def test_another_pooling_is_refused(name):
    model = timm.create_model(f"dfs_{name}", num_classes=5, exits=3, **settings())
    with pytest.raises(ValueError, match="'max'"):
        model.reset_classifier(5, "max")


@pytest.mark.parametrize("architecture", ["test_vit", "resnet18", "swin_tiny_patch4_window7_224", "coat_tiny"])
def test_layers_are_grouped_as_the_backbones_are(architecture):
    plain = timm.create_model(architecture, device="meta")
    model = MultiExit(plain, 3)
    whole = group_parameters(model, model.group_matcher(), reverse=True)
    for name, group in group_parameters(plain, plain.group_matcher(), reverse=True).items():
        assert whole[f"backbone.{name}"] == group, name
    assert all(whole[name] == max(whole.values()) for name, _ in model.named_parameters() if name.startswith("heads."))


def test_patterns_keep_their_groups():
    assert below("a", dict(stem=r"^x|y", rest=[(r"^z\.(\d+)|[^q]$", None)])) == dict(
        stem=r"^a\.(?:x|y)", rest=[(r"^a\.(?:z\.(\d+)|[^q]$)", None)]
    )
