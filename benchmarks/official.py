"""Networks of the official repository (GongCheng1919/dfs), from a checkout, for comparison with ours."""

import contextlib
import importlib
import io
import sys
import types
from pathlib import Path

import torch
from torch import nn


class LogitsOnly(nn.Module):
    """An official network that returns only its logits, without features."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.network(x)[0])


def official_networks(folder: str, name: str) -> dict[str, nn.Module]:
    """The official counterparts of one of our models, joint and DFS with beta 0.5; empty if there are none.

    Args:
        folder: Checkout of the official repository.
        name: Name of our model.
    """
    sys.path.insert(0, str(Path(folder) / "src"))
    # A substitute for easydict, of which the official code uses only this class.
    sys.modules.setdefault("easydict", types.SimpleNamespace(EasyDict=types.SimpleNamespace))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the official code prints its layers
            makers = {
                "dfs_vgg7_cifar100": ("models.dns_vgg", _vgg7),
                "dfs_msdnet_cifar100": ("models.dns_msdnet", _msdnet),
            }
            if name not in makers:
                return {}
            module, make = makers[name]
            joint, split = make(importlib.import_module(module))
            return {"official joint": LogitsOnly(joint), "official DFS 0.5": LogitsOnly(split)}
    finally:
        sys.path.pop(0)


def _vgg7(official: types.ModuleType) -> tuple[nn.Module, nn.Module]:
    return official.vgg64_7_plane_mtl(), official.vgg7_64_cifar100(True, True, 0.5, distill_feature=False)


def _msdnet(official: types.ModuleType) -> tuple[nn.Module, nn.Module]:
    return official.msdnet_cifar100(0.5, use_dns=False), official.msdnet_cifar100(0.5)
