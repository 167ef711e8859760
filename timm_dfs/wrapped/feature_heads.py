"""Exit heads for the features of timm backbones: shallow maps of a pyramid, deep maps, tokens."""

import math
from typing import Any

import torch
from timm.layers import ConvNormAct, LayerNorm
from torch import nn

from ..base.heads import ExitHead
from .exit_points import ExitPoint

KINDS = ("auto", "linear", "conv", "wide")

DEEPEST = 32
"""Stride of the last stage's map in a pyramid, to which a head reduces a shallow map."""

WIDE = 192
"""Channels from which a head mixes channels only once, at its coarsest map: at a finer map, mixing would cost up to a
sixth of the backbone up to the exit (ECA-ResNet-light, MobileOne-S4)."""

READABLE = 640
"""Channels that a wide head's classifier reads at least. A mobile network's early features have 24 to 112, too few to
separate many classes linearly."""


def feature_head(
    kind: str,
    point: ExitPoint,
    num_classes: int,
    pool_type: str,
    drop_rate: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ExitHead:
    """A head for the feature at an exit point.

    Args:
        kind: ``"linear"`` pools and classifies; tokens and channels-last maps pass a layer norm first. ``"conv"`` first
            reduces a map by separable convolutions of stride 2 to about the stride of a pyramid's last stage, because
            shallow features are too local to be classified directly (MSDNet, section 4). ``"wide"`` does so with more
            channels, :data:`READABLE` at the end, for the narrow features of mobile networks. ``"auto"``: as ``"conv"``
            for shallow maps, else as ``"linear"``.
        point: Exit point of the head.
        num_classes: Classes; 0 for pooled features.
        pool_type: The backbone's pooling. ``"token"``: classify the first prefix token where there is one; otherwise
            the average of the image's tokens.
        drop_rate: Dropout rate before the classifier.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ValueError: If ``kind`` is not one of these or does not fit the feature.
    """
    if kind not in KINDS:
        raise ValueError(f"head is {kind!r}; choose one of {', '.join(map(repr, KINDS))}.")
    dd: dict[str, Any] = dict(device=device, dtype=dtype)
    body: list[nn.Module] = []
    if kind in ("conv", "wide") and point.layout in ("NLC", "NCL"):
        raise ValueError(f"head is {kind!r}, but {point.module} returns tokens; give 'linear' or 'auto'.")
    if point.layout == "NLC":
        body = [LayerNorm(point.channels, **dd), PoolTokens(point.prefix_tokens, pool_type)]
    elif point.layout == "NCL":
        body = [nn.Unflatten(2, (-1, 1))]
    elif point.layout == "NHWC":
        body = [LayerNorm(point.channels, **dd), ToChannelsFirst()]
    width = point.channels
    is_map = point.layout in ("NCHW", "NHWC")
    shallow = 0 < point.reduction < DEEPEST
    steps = min(2, round(math.log2(DEEPEST / point.reduction))) if is_map and shallow else 0
    if kind == "wide" and is_map:
        body.append(_widen(width, steps, **dd))
        width = max(width, READABLE)
    elif kind != "linear":
        body += [Condense(width, mix=step == steps or width < WIDE, **dd) for step in range(1, steps + 1)]
    return ExitHead(width, num_classes, nn.Sequential(*body) if body else None, "avg", drop_rate, **dd)


def _widen(channels: int, steps: int, **dd) -> nn.Sequential:
    """Convolutions from (B, C, H, W) to (B, max(C, READABLE), H/2^steps, W/2^steps).

    Channels grow by the same factor at every step, and triple before the first where they are few. Three such heads
    add a tenth to the multiply-adds of EfficientNet-Lite0.
    """
    layers: list[nn.Module] = []
    last, wide = max(channels, READABLE), channels
    if steps and channels < WIDE:
        wide = 3 * channels
        layers.append(ConvNormAct(channels, wide, 1, **dd))
    for step in range(1, steps + 1):
        after = last if step == steps else round(channels * (last / channels) ** (step / steps) / 8) * 8
        layers += [ConvNormAct(wide, wide, 5, stride=2, groups=wide, **dd), ConvNormAct(wide, after, 1, **dd)]
        wide = after
    if wide < last:
        layers.append(ConvNormAct(wide, last, 1, **dd))
    return nn.Sequential(*layers)


class PoolTokens(nn.Module):
    """Pooling from tokens (B, L, C) to (B, C, 1, 1): the first token, or the average of the image's tokens."""

    def __init__(self, prefix_tokens: int, pool_type: str):
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.follow(pool_type)

    def follow(self, pool_type: str) -> None:
        """Pool as the backbone does with this ``pool_type``."""
        self.first = pool_type == "token" and self.prefix_tokens > 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        pooled = tokens[:, 0] if self.first else tokens[:, self.prefix_tokens :].mean(1)
        return pooled[..., None, None]


class ToChannelsFirst(nn.Module):
    """Permutation of a map (B, H, W, C) to (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)


class Condense(nn.Sequential):
    """Separable convolution of stride 2, batch norm and ReLU, from (B, C, H, W) to (B, C, H/2, W/2).

    Args:
        channels: Number of channels C.
        mix: Whether a 1x1 convolution across channels follows the depthwise convolution.
    """

    def __init__(self, channels: int, mix: bool = True, **dd):
        across = [nn.Conv2d(channels, channels, 1, bias=False, **dd)] if mix else []
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False, **dd),
            *across,
            nn.BatchNorm2d(channels, **dd),
            nn.ReLU(inplace=True),
        )
