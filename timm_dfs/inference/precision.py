"""Computing in a network's own precision, and decisions in no less than float32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def own_precision(model: nn.Module) -> AbstractContextManager:
    """A context in which autocast is off on the model's device, whatever the caller has turned on."""
    device = next(model.parameters()).device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Logits in float32 if they are in half precision, as calibration has them: rounded to less, a quotient or a mean
    can be on the other side of a threshold."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
