"""The official repository's networks (GongCheng1919/dfs), from a checkout of it, to run beside ours."""

import contextlib
import importlib
import io
import sys
from pathlib import Path

import torch
from torch import nn


class LogitsOnly(nn.Module):
    """An official network without the features that it puts out beside its logits."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.network(x)[0])


def official_networks(folder: str, name: str) -> dict[str, nn.Module]:
    """The official counterparts of one of our models, joint and with DFS at 0.5. Its MSDNet needs ``easydict``."""
    sys.path.insert(0, str(Path(folder) / "src"))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
            if name == "dfs_vgg7_cifar100":
                make = importlib.import_module("models.dns_vgg").vgg7_64_cifar100
                settings = (
                    dict(use_dns=False, distill_feature=False),
                    dict(use_dns=True, use_fr=True, distill_feature=False),
                )
            elif name == "dfs_msdnet_cifar100":
                make = importlib.import_module("models.dns_msdnet").msdnet_cifar100
                settings = dict(use_dns=False), dict(use_dns=True)
            else:
                return {}
            return {
                f"official {method}": LogitsOnly(make(**kwargs))
                for method, kwargs in zip(("joint", "DFS 0.5"), settings, strict=True)
            }
    finally:
        sys.path.pop(0)
