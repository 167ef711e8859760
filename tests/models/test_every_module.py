"""The smallest network of each timm module keeps the contract of a network with exits, on real data."""

import pytest
import timm
import torch
from helpers import CLASSES, images
from torch import nn

from timm_dfs import ExitPolicy, exit_flops, predict

SMALLEST = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "hieradet_small",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""By timm module."""

SIZES = {"byoanet": 256, "crossvit": 240, "deepseek_vit": 112, "efficientformer": 224, "inception_resnet_v2": 96}
SIZES |= {"inception_v3": 160, "inception_v4": 160}
"""Image sizes of networks that do not take :data:`SIZE`."""

SIZE = 64

SHORTER = {
    "deepseek_vit": dict(depth=4, embed_dim=64, num_heads=2),
    "gemma4_vit": dict(depth=4),
    "qwen3_vit": dict(depth=4, embed_dim=64, num_heads=2),
}

BATCH = 4


def test_every_module_of_timms_is_here():
    assert set(SMALLEST) == {module for module in timm.list_modules() if not module.startswith("dfs_")}


@pytest.fixture(params=SMALLEST, scope="module")
def module(request):
    return request.param


@pytest.fixture(scope="module")
def batch(module):
    return images(BATCH, size=SIZES.get(module, SIZE))


@pytest.fixture(scope="module")
def model(module, batch):
    """The model with normalisation statistics of these images, and early exits that distinguish them."""
    torch.manual_seed(0)
    model = made(module)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():
        known = images(4 * BATCH, size=batch.shape[-1])  # fewer make for variances so small that rounding shows
        model.train().forward_exits(known)
        model.eval()
        for head, logits in zip(model.heads, model.forward_exits(batch)):
            head.fc.weight.div_(spread := (logits - logits.mean(0)).std())
            head.fc.bias.copy_(-logits.mean(0) / spread)
    return model


def made(module):
    size = SIZES.get(module, SIZE)
    settings = dict(SHORTER.get(module, {}), num_classes=CLASSES)
    if size != timm.get_pretrained_cfg(SMALLEST[module]).input_size[-1]:
        try:
            return timm.create_model(f"dfs_{SMALLEST[module]}", img_size=size, **settings)
        except TypeError:  # of one that takes any size
            pass
    return timm.create_model(f"dfs_{SMALLEST[module]}", **settings)


@torch.no_grad()
def test_every_exit_predicts_and_the_last_as_timms_own_model_does(model, batch):
    answers = model.forward_exits(batch)
    assert len(answers) >= 3
    assert all(answer.shape == (BATCH, CLASSES) and answer.isfinite().all() for answer in answers)
    own = model.backbone(batch)
    assert torch.equal(answers[-1], own) and torch.equal(model(batch), own)


@torch.no_grad()
def test_a_batch_is_predicted_as_its_samples_are(model, batch):
    answers = torch.stack(model.forward_exits(batch))
    confidence = answers.softmax(-1).amax(-1)
    first = confidence[0].sort().values[-2:].mean().item()  # half way, so that rounding changes nobody's exit
    stay = confidence[1][confidence[0] < first].sort().values
    second = (stay[len(stay) // 2 - 1] + stay[len(stay) // 2]).item() / 2
    policy = ExitPolicy([first, second, *[2.0] * (model.num_exits - 3), 0.0])
    together = predict(model, batch, policy)
    assert model.shrinks and set(together.exit_index.tolist()) == {0, 1, model.num_exits - 1}
    for row in range(BATCH):
        alone = predict(model, batch[row : row + 1], policy)
        assert alone.exit_index.item() == together.exit_index[row]
        for same in (alone.logits[0], answers[alone.exit_index.item(), row]):  # but for the rounding of deep networks
            assert torch.allclose(same, together.logits[row], atol=1e-3, rtol=1e-3)


def test_losses_reach_the_channels_of_an_exit_feature_as_the_design_says(model, batch):
    features = []
    hooks = [p.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])) for p in model.partitions]
    answers = model.forward_exits(batch)
    for hook in hooks:
        hook.remove()
    own, deeper = answers[0], answers[-1]
    partition, targets = model.partitions[0], torch.arange(BATCH)

    def by_channel(answer):
        loss = nn.functional.cross_entropy(answer, targets)
        (gradient,) = torch.autograd.grad(loss, features[:1], retain_graph=True)
        axes = [axis for axis in range(gradient.ndim) if axis != partition.dim % gradient.ndim]
        return gradient.abs().sum(axes)

    assert partition.shared == round(0.5 * partition.channels)
    assert not by_channel(own)[: partition.shared].any() and by_channel(own)[partition.shared :].any()
    assert not by_channel(deeper)[partition.shared :].any()


def test_cost_rises_from_exit_to_exit(model, batch):
    costs = exit_flops(model, batch.shape[1:], lazy=True)
    assert costs == sorted(set(costs)) and costs[0] > 0
