"""Computing in a network's own precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def own_precision(model: nn.Module) -> AbstractContextManager:
    """A context in which autocast is off on the model's device, whatever the caller has turned on."""
    device = next(model.parameters()).device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
