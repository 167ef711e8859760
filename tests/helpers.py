"""Small networks with exits, and ways to observe what they compute."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

import timm_dfs
from timm_dfs.evaluation.flops import last_exit_flops
from timm_dfs.hub import card
from timm_dfs.hub import folder as hub
from timm_dfs.models.dfs_twins import BASES

ROOT = Path(__file__).parent.parent
"""The checkout."""

GOLDEN_DATA = Path(__file__).parent / "golden"
"""Recorded outputs and published figures."""

CLASSES = 5


def tiny_msdnet(name="dfs_msdnet_cifar100", **kwargs):
    """An MSDNet with exits after layers 3, 4 and 5 and three scales, of which the last layer has only the coarsest."""
    settings = dict(exits=3, base=3, step=1, stem_width=4, growth_rate=4, head_width=8, num_classes=CLASSES)
    return timm.create_model(name, **dict(settings, **kwargs))


def tiny_resnet(**kwargs):
    settings = dict(layers=(1, 1, 2), channels=(8, 12, 16), num_classes=CLASSES)
    return timm.create_model("dfs_resnet18_cifar100", **dict(settings, **kwargs))


def tiny_vgg(**kwargs):
    settings = dict(depths=(1, 2), widths=(6, 8), num_classes=CLASSES)
    return timm.create_model("dfs_vgg7_cifar100", **dict(settings, **kwargs))


NATIVE = {name for name in timm.list_models("dfs_*") if name.removeprefix("dfs_") not in BASES}

TINY = {"msdnet": tiny_msdnet, "resnet": tiny_resnet, "vgg": tiny_vgg}


def images(batch=4, size=16, channels=3, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def settled(model, seed=1):
    """The model in eval mode, with batch norm statistics that make channels and samples differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
        for head in model.heads:
            head.fc.weight.mul_(8)
    return model.eval()


def same_weights(model, other):
    """``other`` with the weights of ``model``."""
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


@contextmanager
def recorded_batches(modules):
    """Batch sizes with which each module is called, by its name; modules that are never called are absent."""
    calls = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: calls.setdefault(name, []).append(inputs[0].shape[0])
        )
        for name, module in modules.items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def recorded_heads(model):
    return recorded_batches(dict(enumerate(model.heads)))


def cells(model):
    """MSDNet's cells by (layer, from 1; scale, from the coarsest)."""
    return {(layer, j): cell for layer, row in enumerate(model.layers, 1) for j, cell in enumerate(row)}


def module_modes(model):
    return {name: module.training for name, module in model.named_modules()}


# Small timm backbones by the layout of their features.
SMALL_SWIN = dict(img_size=64, window_size=2, embed_dim=16, depths=(1, 1, 2), num_heads=(1, 1, 2))
SMALL_TNT = dict(img_size=64, depth=4, embed_dim=48, inner_dim=12, num_heads_outer=4)
BACKBONES = {
    "NCHW": ("test_resnet", {}),
    "NHWC": ("swin_tiny_patch4_window7_224", SMALL_SWIN),
    "NLC": ("test_vit", dict(img_size=64, depth=4)),
    "pair": ("tnt_s_patch16_224", SMALL_TNT),  # a block returns pixels, several rows for each sample, and patches
}


def backbone(layout="NCHW", **kwargs):
    name, settings = BACKBONES[layout]
    return timm.create_model(name, **dict(settings, num_classes=CLASSES, **kwargs))


def wrapped(layout="NCHW", exits=3, **kwargs):
    return timm_dfs.MultiExit(backbone(layout), exits, **kwargs)


def twin(layout="NCHW", **kwargs):
    name, settings = BACKBONES[layout]
    return timm.create_model(f"dfs_{name}", **{**settings, "num_classes": CLASSES, "exits": 3, **kwargs})


PRESETS = dict(fast=dict(thresholds=[0.5, None, 0.0], confidence="max_prob"))


def published(folder, model=None, **results):
    """A complete published folder of a tiny network, with made-up accuracies."""
    if model is None:
        model = settled(tiny_vgg(presets=PRESETS))
    hub.write_weights(model, folder)
    shipped = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    made_up = [10.0 * (k + 1) for k in range(model.num_exits)]
    measured = dict(
        model=model.pretrained_cfg["architecture"],
        dataset="made/up",
        flops=timm_dfs.exit_flops(model),
        flops_lazy=timm_dfs.exit_flops(model, lazy=True),
        last_exit_flops=last_exit_flops(model),
        golden_logits=hub.golden_logits(shipped),
        test=dict(split="test", samples=7, top1=made_up, top5=made_up, ece=[0.1] * model.num_exits),
    )
    (folder / hub.RESULTS_FILE).write_text(json.dumps(dict(measured, **results)))
    card.write_card(folder)
    return folder


def routed_in_a_shell(folder, images, without):
    """Classes and exits that an exported folder's ``router.py`` prints in a process that lacks these packages."""
    np.save(folder.parent / "images.npy", images.numpy())
    script = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({list(without)})); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, folder / "router.py", folder.parent / "images.npy"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
