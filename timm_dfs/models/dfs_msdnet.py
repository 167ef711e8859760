"""MSDNet with feature partitioning.

`Multi-Scale Dense Networks for Resource Efficient Image Classification` (Huang et al., ICLR 2018,
arXiv 1703.09844), with the exits partitioned as in `Deep Feature Surgery` (Gong et al., ECCV 2024,
arXiv 2407.13986, section 4.1).

The network is a grid of cells: depth along one axis, scale along the other. A cell reads the cell before it
at its own scale and, where there is one, the one before it at the next finer scale; exits read the coarsest
scale only. So the grid is computed along its diagonals: when the coarsest scale has reached layer L, the
scale j steps finer has reached layer L - j, which is all that an exit at L needs. Cells that only deeper exits
need are computed when samples continue to those.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ConvNormAct
from timm.models import register_model
from torch import nn

from ..base.heads import ExitHead
from ..base.model import MultiExitModel
from ..base.partition import Betas
from ..data.cifar100 import PRETRAINED_CFG as CIFAR100
from ._builder import build_model, pretrained_cfgs

__all__ = ["MSDNet"]


def _transform(channels: int, width: int, stride: int, bottleneck_factor: int | None, **dd) -> nn.Sequential:
    """3x3 convolution to ``width`` channels behind an optional 1x1 bottleneck of ``factor * width``."""
    layers = []
    if bottleneck_factor is not None:
        inner = min(channels, bottleneck_factor * width)
        layers.append(ConvNormAct(channels, inner, 1, **dd))
        channels = inner
    layers.append(ConvNormAct(channels, width, 3, stride=stride, **dd))
    return nn.Sequential(*layers)


class Cell(nn.Module):
    """One layer at one scale: its input, concatenated with channels derived from it and from the finer scale.

    Args:
        channels: Channels of the layer before, at this scale.
        width: Channels to add.
        bottleneck_factor: Width of the 1x1 bottleneck in units of the 3x3 convolution's width; ``None``: none.
        finer_channels: Channels of the layer before at the next finer scale; ``None`` at the finest.
        finer_bottleneck_factor: As ``bottleneck_factor``, for the path from the finer scale.
        reduced: Channels after the 1x1 transition that follows; ``None``: no transition.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        bottleneck_factor: int | None,
        finer_channels: int | None,
        finer_bottleneck_factor: int | None,
        reduced: int | None,
        **dd,
    ):
        super().__init__()
        if finer_channels is None:
            self.down = None
            self.same = _transform(channels, width, 1, bottleneck_factor, **dd)
        else:
            half = width // 2
            self.down = _transform(finer_channels, half, 2, finer_bottleneck_factor, **dd)
            self.same = _transform(channels, half, 1, bottleneck_factor, **dd)
        self.transition = nn.Identity() if reduced is None else ConvNormAct(channels + width, reduced, 1, **dd)

    def forward(self, x: torch.Tensor, finer: torch.Tensor | None = None) -> torch.Tensor:
        derived = (self.same(x),) if self.down is None else (self.down(finer), self.same(x))
        return self.transition(torch.cat((x, *derived), 1))


class MSDNet(MultiExitModel):
    """Multi-scale dense network with partitioned exits.

    Arguments are described in the terms of the MSDNet paper; the official code's option is in brackets.

    Args:
        num_classes: Classes; 0 for pooled features.
        in_chans: Image channels.
        global_pool: timm's global pooling type.
        drop_rate: Dropout before each classifier (0.5 in the official DFS code).
        beta: Partition ratio in [0, 1], or a sequence with one for each early exit; ``"joint"`` for joint training.
        referencing: ``"one_sided"`` (official), ``"two_sided"`` or ``"off"``.
        exits: Number of exits [nBlocks].
        base: Layers before the first exit [base].
        step: Layers between exits [step].
        step_mode: ``"even"``: ``step`` layers between any two exits; ``"lin_grow"``: ``step * k + 1`` before
            exit k [stepmode].
        stem: ``"cifar"``: a 3x3 convolution; ``"imagenet"``: a 7x7 one of stride 2 and a max-pool.
        stem_width: Channels of the stem's finest scale [nChannels].
        growth_rate: Channels a cell adds at the finest scale [growthRate].
        growth_factors: Width of each scale, finest first, in units of the finest; its length is the number of
            scales [grFactor].
        bottleneck: Whether the 3x3 convolutions sit behind 1x1 bottlenecks [bottleneck].
        bottleneck_factors: Width of each scale's bottlenecks in units of the 3x3 convolution's [bnFactor].
        prune: ``"max"`` drops a scale after each of S equal parts of the depth, ``"min"`` only when there is no
            depth left to carry it to an exit [prune].
        reduction: Share of channels that a transition keeps; 0 for no transitions [reduction].
        head_width: Width of the heads' convolutions; 0 for the feature's own.
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
        drop_rate: float = 0.5,
        beta: Betas | None = 0.5,
        referencing: str = "one_sided",
        exits: int = 7,
        base: int = 4,
        step: int = 2,
        step_mode: str = "even",
        stem: str = "cifar",
        stem_width: int = 16,
        growth_rate: int = 16,
        growth_factors: Sequence[int] = (1, 2, 4),
        bottleneck: bool = True,
        bottleneck_factors: Sequence[int] = (1, 2, 4),
        prune: str = "max",
        reduction: float = 0.5,
        head_width: int = 128,
        presets: dict[str, dict] | None = None,
        chain: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_classes, in_chans, drop_rate, beta, referencing, presets, chain)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        _check_choice("stem", stem, _STEMS)
        _check_choice("step_mode", step_mode, ("even", "lin_grow"))
        _check_choice("prune", prune, ("max", "min"))
        for name, value in dict(
            exits=exits, base=base, step=step, stem_width=stem_width, growth_rate=growth_rate
        ).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; give at least 1.")
        scales = len(growth_factors)
        if scales < 1 or len(bottleneck_factors) != scales:
            raise ValueError(
                f"growth_factors {tuple(growth_factors)} and bottleneck_factors {tuple(bottleneck_factors)} "
                "must have one entry per scale."
            )
        if growth_factors[0] < 1 or min(bottleneck_factors) < 1:
            raise ValueError(
                f"growth_factors {tuple(growth_factors)} and bottleneck_factors {tuple(bottleneck_factors)} "
                "must be positive."
            )
        for factor in growth_factors[1:]:
            if growth_rate * factor % 2 or factor < 1:
                raise ValueError(
                    f"growth_rate {growth_rate} times the factor {factor} of growth_factors is not an even positive "
                    "number: a coarser scale takes half of its new channels from the finer one."
                )
        if head_width < 0:
            raise ValueError(f"head_width is {head_width}; give a width, or 0 for the feature's own.")
        if not 0 <= reduction <= 1:
            raise ValueError(f"reduction is {reduction}; give a share in [0, 1], 0 for no transitions.")

        self.exit_layers = [base]
        for k in range(1, exits):
            self.exit_layers.append(self.exit_layers[-1] + (step if step_mode == "even" else step * k + 1))
        depth = self.exit_layers[-1]
        self.scales_after = [scales] + [_scales_after(layer, depth, scales, prune) for layer in range(1, depth + 1)]
        # Near the end, finer scales no longer reach an exit, however many the pruning keeps.
        self.scales_computed = [min(after, depth - layer + 1) for layer, after in enumerate(self.scales_after)]

        # From here on, scales are counted from the coarsest, 0, to the finest.
        growth = tuple(growth_factors)[::-1]
        factors = tuple(bottleneck_factors)[::-1] if bottleneck else (None,) * scales
        self.stem = nn.ModuleList([_STEMS[stem](in_chans, stem_width * growth_factors[0], **dd)])
        for finer, coarser in pairwise(growth_factors):
            self.stem.append(ConvNormAct(stem_width * finer, stem_width * coarser, 3, stride=2, **dd))

        width = stem_width  # channels of a scale in units of its growth factor
        widths = []
        self.layers = nn.ModuleList()
        for layer in range(1, depth + 1):
            before, after = self.scales_after[layer - 1], self.scales_after[layer]
            grown = width + growth_rate
            reduces = reduction > 0 and (
                before > after if prune == "max" else layer in (math.floor(depth / 3), math.floor(2 * depth / 3))
            )
            kept = math.floor(reduction * grown) if reduces else grown
            if kept < 1:
                raise ValueError(f"reduction {reduction} leaves nothing of {grown} channels; raise it.")
            self.layers.append(
                nn.ModuleList(
                    Cell(
                        width * growth[j],
                        growth_rate * growth[j],
                        factors[j],
                        width * growth[j + 1] if j + 1 < before else None,
                        factors[j + 1] if j + 1 < before else None,
                        kept * growth[j] if reduces else None,
                        **dd,
                    )
                    for j in range(self.scales_computed[layer])
                )
            )
            width = kept
            widths.append(width * growth[0])

        reduction_to_exits = _STEM_STRIDE[stem] * 2 ** (scales - 1)
        self.feature_info = [
            dict(num_chs=widths[layer - 1], reduction=reduction_to_exits, module=f"layers.{layer - 1}.0")
            for layer in self.exit_layers
        ]
        self.attach_exits(
            [
                ExitHead(
                    head_width or info["num_chs"],
                    num_classes,
                    body=nn.Sequential(
                        ConvNormAct(info["num_chs"], head_width or info["num_chs"], 3, stride=2, **dd),
                        ConvNormAct(head_width or info["num_chs"], head_width or info["num_chs"], 3, stride=2, **dd),
                    ),
                    pool_type=global_pool,
                    drop_rate=drop_rate,
                    **dd,
                )
                for info in self.feature_info
            ]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def start(self, x: torch.Tensor) -> list[torch.Tensor]:
        state: list[torch.Tensor] = []
        for layer in self.stem:
            x = layer(x)
            state.insert(0, x)
        return state

    def advance(self, state: list[torch.Tensor], exit_index: int) -> list[torch.Tensor]:
        reached = self.exit_layers[exit_index - 1] if exit_index > 0 else 0
        state = list(state)
        for diagonal in range(reached + 1, self.exit_layers[exit_index] + 1):
            self._compute_diagonal(state, diagonal, deepest=diagonal)
            while self._is_finished(len(state) - 1, diagonal):
                state.pop()
        return state

    def settle(self, state: list[torch.Tensor], exit_index: int) -> list[torch.Tensor]:
        reached = self.exit_layers[exit_index]
        state = list(state)
        for diagonal in range(reached + 1, reached + len(state)):
            self._compute_diagonal(state, diagonal, deepest=reached)
        return state

    def _compute_diagonal(self, state: list[torch.Tensor], diagonal: int, deepest: int) -> None:
        """Bring scale j from layer ``diagonal - j - 1`` to the next one, finest first, none beyond ``deepest``."""
        for j in reversed(range(len(state))):
            layer = diagonal - j
            if not 1 <= layer <= deepest or j >= self.scales_computed[layer]:
                continue
            inputs = state[j : j + 2] if j + 1 < self.scales_after[layer - 1] else state[j : j + 1]
            state[j] = self.run(self.layers[layer - 1][j], *inputs)

    def _is_finished(self, scale: int, diagonal: int) -> bool:
        """Whether no cell after ``diagonal`` reads the finest remaining scale."""
        next_layer = diagonal - scale + 1
        return scale > 0 and next_layer >= 1 and scale >= self.scales_computed[next_layer]

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        blocks: str | list[tuple[str, tuple[int]]] = r"^layers\.(\d+)"
        if coarse:  # one group for the layers between two exits
            starts = [0, *self.exit_layers[:-1]]
            blocks = [
                (r"^layers\.(?:" + "|".join(map(str, range(first, end))) + r")\.", (k,))
                for k, (first, end) in enumerate(zip(starts, self.exit_layers))
            ]
        return dict(stem=r"^stem", blocks=blocks)


def _check_choice(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, choices))}.")


def _scales_after(layer: int, depth: int, scales: int, prune: str) -> int:
    """Number of scales that layer ``layer`` (from 1) of ``depth`` outputs."""
    if prune == "min":
        return min(scales, depth - layer + 1)
    return scales - (layer - 1) // math.ceil(depth / scales)


def _imagenet_stem(in_chans: int, width: int, **dd) -> nn.Sequential:
    return nn.Sequential(ConvNormAct(in_chans, width, 7, stride=2, bias=True, **dd), nn.MaxPool2d(3, 2, 1))


def _cifar_stem(in_chans: int, width: int, **dd) -> nn.Sequential:
    return nn.Sequential(ConvNormAct(in_chans, width, 3, **dd))


_STEMS = {"cifar": _cifar_stem, "imagenet": _imagenet_stem}
_STEM_STRIDE = {"cifar": 1, "imagenet": 4}


# Names of the official checkpoints, part by part.
_CONV_NORM = {"0": "conv", "1": "bn"}
_OFFICIAL_STEM = re.compile(r"blocks\.0\.0\.layers\.(\d+)\.(?:net\.)?([01])\.(.+)")
_OFFICIAL_CELL = re.compile(r"blocks\.(\d+)\.(\d+)\.layers\.(\d+)\.conv_(down|normal)\.net\.(\d+)\.(.+)")
_OFFICIAL_TRANSITION = re.compile(r"blocks\.(\d+)\.(\d+)\.m\.(\d+)\.net\.([01])\.(.+)")
_OFFICIAL_HEAD = re.compile(r"classifier\.(\d+)\.m\.([01])\.net\.([01])\.(.+)")
# The official classifier follows its dropout; the one of kalviny/MSDNet-PyTorch, the code it is based on, has none.
_OFFICIAL_CLASSIFIER = re.compile(r"classifier\.(\d+)\.linear\.(?:1\.)?(weight|bias)")


def checkpoint_filter_fn(state_dict: dict[str, torch.Tensor], model: MSDNet) -> dict[str, torch.Tensor]:
    """Rename the keys of an official checkpoint to this package's; other state dicts pass unchanged.

    Checkpoints of kalviny/MSDNet-PyTorch, whose network is the same without dropout, are renamed as well.

    Cells that no exit reads, which the official network has where its layers do not divide into its scales, are
    left out.
    """
    if not any(key.startswith("blocks.0.0.layers.") for key in state_dict):
        return state_dict
    # A block is a list of layers, each followed by a transition where scales are dropped; the first also
    # holds the stem. Here layers are numbered across blocks.
    cells = filter(None, map(_OFFICIAL_CELL.fullmatch, state_dict))
    layer_of = {position: layer for layer, position in enumerate(sorted({(int(m[1]), int(m[2])) for m in cells}))}

    def cell(block: str, position: int, index: str) -> str:
        layer = layer_of[int(block), position]
        if layer >= len(model.layers):
            return "deeper_than_this_network"
        j = model.scales_after[layer + 1] - 1 - int(index)  # official scales count from the finest that is left
        return f"layers.{layer}.{j}" if j < model.scales_computed[layer + 1] else ""

    def rename(key: str) -> str:
        if match := _OFFICIAL_STEM.fullmatch(key):
            scale, part, rest = int(match[1]), _CONV_NORM[match[2]], match[3]
            return f"stem.{scale}.{'0.' if scale == 0 else ''}{part}.{rest}"
        if match := _OFFICIAL_CELL.fullmatch(key):
            prefix = cell(match[1], int(match[2]), match[3])
            path = "down" if match[4] == "down" else "same"
            unit, place = divmod(int(match[5]), 3)  # convolution, norm, ReLU
            return prefix and f"{prefix}.{path}.{unit}.{_CONV_NORM[str(place)]}.{match[6]}"
        if match := _OFFICIAL_TRANSITION.fullmatch(key):
            prefix = cell(match[1], int(match[2]) - 1, match[3])
            return prefix and f"{prefix}.transition.{_CONV_NORM[match[4]]}.{match[5]}"
        if match := _OFFICIAL_HEAD.fullmatch(key):
            return f"heads.{match[1]}.body.{match[2]}.{_CONV_NORM[match[3]]}.{match[4]}"
        if match := _OFFICIAL_CLASSIFIER.fullmatch(key):
            return f"heads.{match[1]}.fc.{match[2]}"
        return key

    return {name: value for key, value in state_dict.items() if (name := rename(key))}


def _create_msdnet(variant: str, pretrained: bool, architecture: dict[str, Any], **kwargs) -> MSDNet:
    return build_model(
        MSDNet, variant, pretrained, checkpoint_filter_fn, lambda args: args.get("exits", 7), architecture, **kwargs
    )


default_cfgs = pretrained_cfgs(
    {
        "dfs_msdnet_cifar100": dict(
            CIFAR100,
            pool_size=(2, 2),
            first_conv="stem.0.0.conv",
            classifier=tuple(f"heads.{k}.fc" for k in range(7)),
        ),
        "dfs_msdnet_imagenet": dict(
            num_classes=1000,
            input_size=(3, 224, 224),
            interpolation="bilinear",
            pool_size=(2, 2),
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="stem.0.0.conv",
            classifier=tuple(f"heads.{k}.fc" for k in range(5)),
        ),
    }
)


@register_model
def dfs_msdnet_cifar100(pretrained: bool = False, **kwargs) -> MSDNet:
    """MSDNet for CIFAR-100: 7 exits, 3 scales, 16 layers (DFS, table 1)."""
    return _create_msdnet("dfs_msdnet_cifar100", pretrained, {}, **kwargs)


@register_model
def dfs_msdnet_imagenet(pretrained: bool = False, **kwargs) -> MSDNet:
    """MSDNet for ImageNet: 5 exits, 4 scales, 20 layers (DFS, table 3)."""
    architecture = dict(
        exits=5,
        base=4,
        step=4,
        stem="imagenet",
        stem_width=32,
        growth_factors=(1, 2, 4, 4),
        bottleneck_factors=(1, 2, 4, 4),
        head_width=0,
    )
    return _create_msdnet("dfs_msdnet_imagenet", pretrained, architecture, **kwargs)
