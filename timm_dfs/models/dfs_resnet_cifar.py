"""ResNet for CIFAR with an exit after every stage.

`Be Your Own Teacher` (Zhang et al., ICCV 2019, arXiv 1905.08094) gives ResNet's early exits an attention
gate and separable convolutions; `Deep Feature Surgery` (Gong et al., ECCV 2024, arXiv 2407.13986, section
4.2) partitions the features they read.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from ..base.heads import ExitHead
from ..base.model import MultiExitModel
from ..base.partition import Betas
from ..data.cifar100 import PRETRAINED_CFG as CIFAR100
from ._builder import build_model, pretrained_cfgs

__all__ = ["ExitResNetCifar"]


class SeparableDown(nn.Sequential):
    """Two separable 3x3 convolutions, the first of stride 2: (B, channels, H, W) to (B, width, H/2, W/2)."""

    def __init__(self, channels: int, width: int, **dd):
        layers: list[nn.Module] = []
        for out, stride in ((channels, 2), (width, 1)):
            layers.append(nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False, **dd))
            layers.append(ConvNormAct(channels, out, 1, **dd))
        super().__init__(*layers)


class AttentionGate(nn.Module):
    """Weighs a feature by a mask in (0, 1) computed from it at half resolution."""

    def __init__(self, channels: int, **dd):
        super().__init__()
        self.down = SeparableDown(channels, channels, **dd)
        self.bn = nn.BatchNorm2d(channels, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = F.relu(self.bn(self.down(x)))
        mask = F.interpolate(mask, size=x.shape[-2:], mode="bilinear").sigmoid()
        return mask * x


class ExitResNetCifar(MultiExitModel):
    """ResNet of basic blocks with a 3x3 stem, and partitioned exits after every stage.

    Args:
        num_classes: Classes; 0 for pooled features.
        in_chans: Image channels.
        global_pool: timm's global pooling type.
        drop_rate: Dropout before each classifier.
        beta: Partition ratio in [0, 1], or a sequence with one for each early exit; ``"joint"`` for joint training.
        referencing: ``"two_sided"`` (official), ``"one_sided"`` or ``"off"``.
        layers: Blocks in each stage.
        channels: Width of each stage.
        presets: Named operating points fitted to these weights.
        chain: Share in [0, 1] of the previous exit's logits that an exit adds to its own (BoostNet); 0: none.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If an argument is not among the values above.
    """

    def __init__(
        self,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        beta: Betas | None = 0.5,
        referencing: str = "two_sided",
        layers: Sequence[int] = (2, 2, 2, 2),
        channels: Sequence[int] = (64, 128, 256, 512),
        presets: dict[str, dict] | None = None,
        chain: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_classes, in_chans, drop_rate, beta, referencing, presets, chain)
        if len(layers) != len(channels) or min(layers, default=0) < 1 or min(channels, default=0) < 1:
            raise ValueError(
                f"layers {tuple(layers)} and channels {tuple(channels)} must hold one positive number per stage."
            )
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        block: Any = BasicBlock  # timm annotates an instance where it takes the class
        backbone = ResNet(block, tuple(layers), num_classes=0, channels=tuple(channels), zero_init_last=False, **dd)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False, **dd)
        self.bn1 = backbone.bn1
        self.act1 = backbone.act1
        self.stages = nn.ModuleList(getattr(backbone, f"layer{k + 1}") for k in range(len(layers)))
        self.feature_info = [
            dict(num_chs=width, reduction=2**k, module=f"stages.{k}") for k, width in enumerate(channels)
        ]
        heads = []
        for k, width in enumerate(channels):
            downs = [SeparableDown(channels[i], channels[i + 1], **dd) for i in range(k, len(channels) - 1)]
            body = nn.Sequential(AttentionGate(width, **dd), *downs) if downs else None
            heads.append(ExitHead(channels[-1], num_classes, body, global_pool, drop_rate, **dd))
        self.attach_exits(heads)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def start(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.act1(self.bn1(self.conv1(x)))]

    def advance(self, state: list[torch.Tensor], exit_index: int) -> list[torch.Tensor]:
        return [self.run(self.stages[exit_index], *state)]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r"^conv1|^bn1", blocks=r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)")


# Names of the official checkpoints, part by part. A separable convolution's layers are numbered
# depthwise, pointwise, norm, ReLU, twice over.
_SEPARABLE = {"0": "0", "1": "1.conv", "2": "1.bn", "4": "2", "5": "3.conv", "6": "3.bn"}
_OFFICIAL_STAGE = re.compile(r"layer(\d+)\.(.+)")
_OFFICIAL_DOWN = re.compile(r"scala(\d+)\.(\d+)\.op\.(\d)\.(.+)")
_OFFICIAL_GATE = re.compile(r"attention(\d+)\.0\.op\.(\d)\.(.+)")
_OFFICIAL_GATE_NORM = re.compile(r"attention(\d+)\.1\.(.+)")
_OFFICIAL_CLASSIFIER = re.compile(r"fc(\d+)\.(.+)")


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: ExitResNetCifar) -> dict[str, torch.Tensor]:
    """Rename the keys of an official checkpoint to this package's; other state dicts pass unchanged.

    The official adaptation layers serve feature distillation only and are left out.
    """
    if not any(key.startswith("scala") for key in state_dict):
        return state_dict

    def rename(key: str) -> str:
        if match := _OFFICIAL_STAGE.fullmatch(key):
            return f"stages.{int(match[1]) - 1}.{match[2]}"
        if match := _OFFICIAL_DOWN.fullmatch(key):
            return f"heads.{int(match[1]) - 1}.body.{int(match[2]) + 1}.{_SEPARABLE[match[3]]}.{match[4]}"
        if match := _OFFICIAL_GATE.fullmatch(key):
            return f"heads.{int(match[1]) - 1}.body.0.down.{_SEPARABLE[match[2]]}.{match[3]}"
        if match := _OFFICIAL_GATE_NORM.fullmatch(key):
            return f"heads.{int(match[1]) - 1}.body.0.bn.{match[2]}"
        if match := _OFFICIAL_CLASSIFIER.fullmatch(key):
            return f"heads.{int(match[1]) - 1}.fc.{match[2]}"
        return key

    return {rename(key): value for key, value in state_dict.items() if not key.startswith("adaptation_layer")}


default_cfgs = pretrained_cfgs(
    {
        "dfs_resnet18_cifar100": dict(
            CIFAR100,
            pool_size=(4, 4),
            first_conv="conv1",
            classifier=tuple(f"heads.{k}.fc" for k in range(4)),
        ),
    }
)


@register_model
def dfs_resnet18_cifar100(pretrained: bool = False, **kwargs) -> ExitResNetCifar:
    """ResNet-18 for CIFAR-100: 4 exits (DFS, table 2)."""
    return build_model(
        ExitResNetCifar,
        "dfs_resnet18_cifar100",
        pretrained,
        checkpoint_filter_fn,
        lambda args: len(args.get("layers", (2, 2, 2, 2))),
        **kwargs,
    )
