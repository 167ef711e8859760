"""Head of one exit: optional layers that process the feature, then pooling, dropout and a linear classifier."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn
from torch.nn.modules.conv import _ConvNd


def check_num_classes(num_classes: int) -> None:
    """Raise ``ValueError`` if the number of classes is negative."""
    if num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}; give 0 for features or a positive number of classes.")


class Classifiers(tuple[nn.Module, ...]):
    """The classifiers of all exits, with a ``weight`` and a ``bias`` whose in-place operations apply to all of them.

    timm's ``train.py`` treats the classifier as one layer: ``--head-init-scale`` calls ``weight.mul_``,
    ``--head-init-bias`` calls ``nn.init.constant_(bias)``.
    """

    @property
    def weight(self) -> "_InPlace":
        return _InPlace("weight", (layer.weight for classifier in self for layer in _last_layers(classifier)))

    @property
    def bias(self) -> "_InPlace":
        return _InPlace("bias", (layer.bias for classifier in self for layer in _last_layers(classifier)))


def _last_layers(classifier: nn.Module) -> list[Any]:
    """The linear layers of a classifier that put out logits: one, or several side by side, whose logits are averaged.

    Raises:
        ValueError: If there is none, but the classifier has parameters.
    """
    layers: list[Any] = [part for part in classifier.modules() if isinstance(part, (nn.Linear, _ConvNd))]
    if not layers and any(True for _ in classifier.parameters()):
        raise ValueError(f"The classifier {type(classifier).__name__} has no linear layer to scale or set.")
    return [layer for layer in layers if _outputs(layer) == _outputs(layers[-1])]


def _outputs(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


class _InPlace:
    """In-place operations that apply to several tensors."""

    def __init__(self, name: str, tensors: Iterable[torch.Tensor | None]):
        self._name = name
        self._tensors = [tensor for tensor in tensors if tensor is not None]

    def __getattr__(self, operation: str) -> Callable:
        if not operation.endswith("_") or operation.endswith("__"):
            raise AttributeError(
                f"There is one {self._name} for each exit; select an exit's to read its {operation!r}."
            )

        def on_all(*args: Any, **kwargs: Any) -> "_InPlace":
            if not self._tensors and operation != "mul_":  # scaling an absent tensor is harmless, setting it is not
                raise ValueError(f"This network's classifiers have no {self._name} to set.")
            for tensor in self._tensors:
                getattr(tensor, operation)(*args, **kwargs)
            return self

        return on_all


class ExitHead(nn.Module):
    """Head of one exit: body, pooling, dropout, linear classifier.

    Args:
        in_features: Number C of output channels of ``body`` (of the feature, without a body).
        num_classes: Classes; 0 removes the classifier, and the head returns pooled features.
        body: Layers between the exit's feature and the pooling, NCHW to NCHW.
        pool_type: One of timm's global pooling types; ``""`` keeps the map (only with ``num_classes=0``).
        drop_rate: Dropout rate before the classifier.
        bias: Whether the classifier has a bias.
        device: Device of the parameters.
        dtype: Data type of the parameters.
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

    @property
    def averages(self) -> bool:
        """Whether the classifier reads only the average of each of the feature's channels."""
        return isinstance(self.body, nn.Identity) and self.pool.pool_type == "avg"

    def reset(
        self,
        num_classes: int,
        pool_type: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Replace the classifier by a new one for ``num_classes`` (0: none) and, if given, the pooling.

        Args:
            num_classes: Classes; 0 for pooled features.
            pool_type: One of timm's global pooling types; ``None`` keeps the pooling.
            device: Device of the classifier's parameters.
            dtype: Data type of the classifier's parameters.

        Raises:
            ValueError: If ``num_classes`` is negative.
        """
        check_num_classes(num_classes)
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
        """Logits (B, num_classes) from the body's output.

        Args:
            x: Output of the body (B, C, H, W).
            pre_logits: Return the pooled feature (B, num_features) that the classifier reads.

        Raises:
            ValueError: If there is a classifier but no pooling.
        """
        if self.pool.is_identity() and isinstance(self.fc, nn.Linear):
            raise ValueError(
                "The classifier needs pooled features; give a global_pool, or num_classes=0 for no classifier."
            )
        x = self.drop(self.pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) from the exit's feature (B, C, H, W)."""
        return self.pool_and_classify(self.body(feature))
