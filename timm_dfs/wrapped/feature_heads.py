"""Heads that suit the features of timm's backbones: maps early in a pyramid, maps late in one, tokens."""

import math
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import nn

from ..base.heads import ExitHead
from .exit_points import ExitPoint

KINDS = ("auto", "linear", "conv")

DEEPEST = 32
"""Stride of the map that a pyramid's last stage has, and that a head brings an early map to."""

WIDE = 192
"""Channels from which on a head mixes them once only, at the coarsest of its maps: at a finer one it would cost up to a
sixth of the backbone so far (ECA-ResNet-light, MobileOne-S4)."""


def feature_head(
    kind: str,
    point: ExitPoint,
    num_classes: int,
    prefix_tokens: int,
    pool_type: str,
    drop_rate: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> ExitHead:
    """A head for the feature at an exit point.

    Args:
        kind: ``"linear"`` pools and classifies, tokens after a layer norm. ``"conv"`` condenses a map first, by
            separable convolutions of stride 2 to about the stride a pyramid ends with: an early stage is too local
            to be classified as it is (MSDNet, section 4). ``"auto"`` does so for maps that are early.
        point: Where the exit is.
        num_classes: Classes; 0 for pooled features.
        prefix_tokens: Class and other tokens before those of the image.
        pool_type: ``"token"``: the first prefix tokens of the backbone answer; else the average of the image's tokens.
        drop_rate: Dropout before the classifier.
        device: Where to make the parameters.
        dtype: Their type.

    Raises:
        ValueError: If ``kind`` is none of these or does not fit the feature.
    """
    if kind not in KINDS:
        raise ValueError(f"head is {kind!r}; choose one of {', '.join(map(repr, KINDS))}.")
    dd: dict[str, Any] = dict(device=device, dtype=dtype)
    body: list[nn.Module] = []
    if point.layout == "NLC":
        if kind == "conv":
            raise ValueError(f"head is 'conv', but {point.module} puts out tokens; take 'linear' or 'auto'.")
        body = [LayerNorm(point.channels, **dd), PoolTokens(prefix_tokens, pool_type)]
    elif point.layout == "NCL":
        body = [nn.Unflatten(2, (-1, 1))]
    elif point.layout == "NHWC":
        body = [LayerNorm(point.channels, **dd), ToChannelsFirst()]
    width = point.channels
    if kind != "linear" and point.layout in ("NCHW", "NHWC") and 0 < point.reduction < DEEPEST:
        steps = min(2, round(math.log2(DEEPEST / point.reduction)))
        body += [Condense(width, mix=step == steps or width < WIDE, **dd) for step in range(1, steps + 1)]
    return ExitHead(width, num_classes, nn.Sequential(*body) if body else None, "avg", drop_rate, **dd)


class PoolTokens(nn.Module):
    """From tokens (B, L, C) to a map of one value (B, C, 1, 1): the first token, or the average of the image's."""

    def __init__(self, prefix_tokens: int, pool_type: str):
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.follow(pool_type)

    def follow(self, pool_type: str) -> None:
        """Pool as the backbone does."""
        self.first = pool_type == "token" and self.prefix_tokens > 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        pooled = tokens[:, 0] if self.first else tokens[:, self.prefix_tokens :].mean(1)
        return pooled[..., None, None]


class ToChannelsFirst(nn.Module):
    """From a map (B, H, W, C) to (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)


class Condense(nn.Sequential):
    """A separable convolution of stride 2, batch norm, ReLU, from (B, C, H, W) to (B, C, H/2, W/2).

    Args:
        channels: C.
        mix: Whether the convolution of each channel is followed by one across them.
    """

    def __init__(self, channels: int, mix: bool = True, **dd):
        across = [nn.Conv2d(channels, channels, 1, bias=False, **dd)] if mix else []
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False, **dd),
            *across,
            nn.BatchNorm2d(channels, **dd),
            nn.ReLU(inplace=True),
        )
