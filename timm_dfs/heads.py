"""The classifier of one exit: an optional body that condenses the feature, then pool, dropout, linear."""

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn


class ExitHead(nn.Module):
    """Answers at one exit.

    Args:
        in_features: Channels C that ``body`` puts out (the feature's own channels without a body).
        num_classes: Classes; 0 removes the classifier, the head then puts out pooled features.
        body: Layers between the exit's feature and the pooling, NCHW to NCHW.
        pool_type: One of timm's global pooling types; ``""`` keeps the map (only with ``num_classes=0``).
        drop_rate: Dropout before the classifier.
        bias: Whether the classifier has a bias.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        body: nn.Module | None = None,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.bias = bias
        self.body = nn.Identity() if body is None else body
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, device=device, dtype=dtype)

    @property
    def num_features(self) -> int:
        """Width of the pooled feature that the classifier reads."""
        return self.in_features * self.pool.feat_mult()

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Put in a fresh classifier for ``num_classes`` (0: none) and, if given, another pooling.

        Raises:
            ValueError: If ``num_classes`` is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; give 0 for features or a positive number of classes.")
        if pool_type is not None:
            self.pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.fc: nn.Module = (
            nn.Linear(self.num_features, num_classes, bias=self.bias, device=device, dtype=dtype)
            if num_classes > 0
            else nn.Identity()
        )
        if num_classes > 0 and self.bias:
            nn.init.zeros_(self.fc.get_parameter("bias"))
        self.pool.train(self.training)
        self.fc.train(self.training)

    def pool_and_classify(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """From the body's output (B, C, H, W) to logits (B, num_classes), or to (B, num_features) before them.

        Raises:
            ValueError: If there is a classifier but no pooling.
        """
        if self.pool.is_identity() and isinstance(self.fc, nn.Linear):
            raise ValueError(
                "The classifier needs pooled features; give a global_pool, or num_classes=0 to go without."
            )
        x = self.drop(self.pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """From the exit's feature (B, C, H, W) to logits (B, num_classes)."""
        return self.pool_and_classify(self.body(feature))
