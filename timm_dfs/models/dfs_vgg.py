"""VGG with an exit after every convolution.

The VGG7 and VGG16 of `Deep Feature Surgery` (Gong et al., ECCV 2024, arXiv 2407.13986, section 4.3): each
stage is convolution, ReLU, batch norm, in that order, and a max-pool at the end of each block; every exit
pools its feature and classifies it without a bias.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model
from torch import nn

from ..base.heads import ExitHead
from ..base.model import MultiExitModel
from ..base.partition import Betas, Onward, PartitionedConv2d
from ..data.cifar100 import PRETRAINED_CFG as CIFAR100
from ._builder import build_model, pretrained_cfgs

__all__ = ["ExitVGG"]


class Stage(nn.Module):
    """The layers between two exits: convolution, ReLU, batch norm, and a max-pool at the end of a block."""

    def __init__(self, channels: int, width: int, bias: bool, pool: bool, **dd):
        super().__init__()
        self.conv = PartitionedConv2d(channels, width, 3, padding=1, bias=bias, **dd)
        self.act = nn.ReLU(inplace=True)
        self.bn = nn.BatchNorm2d(width, **dd)
        # Rounding up keeps the last map of inputs smaller than the native size from vanishing.
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pool else nn.Identity()

    def forward(self, x: Onward) -> torch.Tensor:
        return self.pool(self.bn(self.act(self.conv(x))))


class ExitVGG(MultiExitModel):
    """VGG with partitioned exits after every convolution.

    Args:
        num_classes: Classes; 0 for pooled features.
        in_chans: Image channels.
        global_pool: timm's global pooling type.
        drop_rate: Dropout before each classifier.
        beta: Partition ratio in [0, 1], or a sequence with one for each early exit; ``"joint"`` for joint training.
        referencing: ``"two_sided"`` (official), ``"one_sided"`` or ``"off"``.
        depths: Convolutions in each block.
        widths: Channels of each block.
        presets: Named operating points fitted to these weights.
        chain: Share in [0, 1] of the previous exit's logits that an exit adds to its own (BoostNet); 0: none.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: If an argument is not among the values above.
    """

    takes_parts = True

    def __init__(
        self,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        beta: Betas | None = 0.5,
        referencing: str = "two_sided",
        depths: Sequence[int] = (2, 2, 2),
        widths: Sequence[int] = (64, 128, 256),
        presets: dict[str, dict] | None = None,
        chain: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_classes, in_chans, drop_rate, beta, referencing, presets, chain)
        if len(depths) != len(widths) or min(depths, default=0) < 1 or min(widths, default=0) < 1:
            raise ValueError(
                f"depths {tuple(depths)} and widths {tuple(widths)} must hold one positive number per block."
            )
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.stages = nn.ModuleList()
        self.feature_info = []
        channels, reduction = in_chans, 1
        for depth, width in zip(depths, widths):
            for i in range(depth):
                first = not self.stages
                pool = i == depth - 1 and not first  # the official first convolution, which has a bias, has no pool
                reduction *= 2 if pool else 1
                self.feature_info.append(dict(num_chs=width, reduction=reduction, module=f"stages.{len(self.stages)}"))
                self.stages.append(Stage(channels, width, bias=first, pool=pool, **dd))
                channels = width
        self.attach_exits(
            [
                ExitHead(info["num_chs"], num_classes, pool_type=global_pool, drop_rate=drop_rate, bias=False, **dd)
                for info in self.feature_info
            ]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def start(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]

    def advance(self, state: list[torch.Tensor], exit_index: int) -> list[torch.Tensor]:
        return [self.run(self.stages[exit_index], *state)]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r"^stages\.0\.", blocks=r"^stages\.(\d+)")


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: ExitVGG) -> dict[str, torch.Tensor]:
    """Rename the keys of an official checkpoint to this package's; other state dicts pass unchanged.

    The official code keeps the two parts of a convolution's input channels in two weights, ``conv_p`` for the
    shared part and ``conv_s`` for the exit's own (``fc_p`` and ``fc_s`` in the classifiers); here they are one weight.
    Its adaptation layers serve feature distillation only and are left out.
    """
    if not any(key.startswith("feature_extractors.") for key in state_dict):
        return state_dict
    out = {}
    for key, value in state_dict.items():
        kind, index, *rest = key.split(".")
        name = ".".join(rest)
        if kind == "adaptation_layers":
            continue
        if kind == "feature_extractors":
            prefix = f"stages.{index}."
            if index == "0":  # convolution, ReLU, batch norm by position
                name = {"0": "conv", "2": "bn"}[rest[0]] + "." + rest[1]
        elif kind == "classifers":
            prefix = f"heads.{index}."
        else:
            out[key] = value
            continue
        if rest[0] in ("conv_s", "fc_s"):
            continue  # joined below with its other part
        if rest[0] in ("conv_p", "fc_p"):
            name = f"{rest[0][:-2]}.weight"
            value = torch.cat((value, state_dict[key.replace("_p.", "_s.")]), 1)
        out[prefix + name] = value
    return out


def _create_vgg(variant: str, pretrained: bool, architecture: dict[str, Any], **kwargs) -> ExitVGG:
    return build_model(
        ExitVGG,
        variant,
        pretrained,
        checkpoint_filter_fn,
        lambda args: sum(args.get("depths", (2, 2, 2))),
        architecture,
        **kwargs,
    )


default_cfgs = pretrained_cfgs(
    {
        "dfs_vgg7_cifar100": dict(
            CIFAR100,
            pool_size=(4, 4),
            first_conv="stages.0.conv",
            classifier=tuple(f"heads.{k}.fc" for k in range(6)),
        ),
        "dfs_vgg16_imagenet": dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            interpolation="bilinear",
            pool_size=(7, 7),
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="stages.0.conv",
            classifier=tuple(f"heads.{k}.fc" for k in range(13)),
        ),
    }
)


@register_model
def dfs_vgg7_cifar100(pretrained: bool = False, **kwargs) -> ExitVGG:
    """VGG7 for CIFAR-100: 6 exits (DFS, section 4.3)."""
    return _create_vgg("dfs_vgg7_cifar100", pretrained, {}, **kwargs)


@register_model
def dfs_vgg16_imagenet(pretrained: bool = False, **kwargs) -> ExitVGG:
    """VGG16 for ImageNet: 13 exits (DFS, section 4.3)."""
    architecture = dict(depths=(2, 2, 3, 3, 3), widths=(64, 128, 256, 512, 512))
    return _create_vgg("dfs_vgg16_imagenet", pretrained, architecture, **kwargs)
