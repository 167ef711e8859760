"""A classifier for timm's encoders, which have none."""

import re
from typing import Any

import torch
from torch import nn

from ..base.heads import ExitHead


def is_encoder(backbone: nn.Module) -> bool:
    """Whether the backbone is a timm model without a classifier, such as the image encoder of another model."""
    return hasattr(backbone, "pretrained_cfg") and not hasattr(backbone, "get_classifier")


class WithClassifier(nn.Module):
    """A timm encoder with a classifier on the average of its features.

    Args:
        encoder: A timm model without a classifier, such as ``gemma4_vit_167m_enc``.
        num_classes: Classes; 0 for the pooled features.
        drop_rate: Dropout rate before the classifier.
    """

    def __init__(self, encoder: nn.Module, num_classes: int = 0, drop_rate: float = 0.0):
        super().__init__()
        traits: Any = encoder
        like = next(encoder.parameters())
        self.encoder = traits
        self.head = ExitHead(
            traits.num_features, num_classes, drop_rate=drop_rate, device=like.device, dtype=like.dtype
        )
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = traits.num_features
        self.output_fmt = getattr(encoder, "output_fmt", "NCHW")
        self.in_chans = getattr(encoder, "in_chans", None) or traits.pretrained_cfg["input_size"][0]
        self.pretrained_cfg = traits.pretrained_cfg
        self.feature_info = [{**info, "module": f"encoder.{info['module']}"} for info in traits.feature_info]

    encoder: Any

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits (B, num_classes) from tokens (B, N, C) or a map."""
        if x.ndim == 3:
            x = x.transpose(1, 2).unsqueeze(-1)
        elif self.output_fmt == "NHWC":
            x = x.permute(0, 3, 1, 2)
        return self.head.pool_and_classify(x, pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.encoder.forward_intermediates(x, *args, **kwargs)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool is {global_pool!r}; an encoder's classifier supports only 'avg'.")
        like = next(self.parameters())
        self.head.reset(num_classes, device=like.device, dtype=like.dtype)
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.encoder.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return {f"encoder.{name}" for name in getattr(self.encoder, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The encoder's parameter groups, with the classifier in the last one.

        Raises:
            ValueError: If timm defines no groups for this encoder.
        """
        if not hasattr(self.encoder, "group_matcher"):
            raise ValueError(
                f"timm defines no layer groups for {type(self.encoder).__name__}; train without --layer-decay."
            )
        return below("encoder", self.encoder.group_matcher(coarse=coarse))


def below(name: str, groups: dict[str, Any]) -> dict[str, Any]:
    """Parameter groups, in timm's form, of a module as groups of the network that has it as attribute ``name``."""
    return {group: _pattern_below(name, pattern) for group, pattern in groups.items()}


def _pattern_below(name: str, pattern: Any) -> Any:
    if isinstance(pattern, str):  # timm matches from the start of a parameter's name, with or without ^
        return rf"^{name}\.(?:" + re.sub(r"(?<!\[)\^", "", pattern) + ")"
    return [(_pattern_below(name, first), *rest) for first, *rest in pattern]
