"""Feature extraction with ``features_only=True``."""

import torch
from timm.models import FeatureHookNet


class ExitFeatures(FeatureHookNet):
    """timm's network of feature maps, for a model whose forward pass in training mode returns several tensors."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor] | dict[str, torch.Tensor]:
        """The features at the exits, shallow to deep, for images (B, in_chans, H, W)."""
        self.body.forward_features(x)
        out = self.hooks.get_output(x.device)
        return out if self.return_dict else list(out.values())
