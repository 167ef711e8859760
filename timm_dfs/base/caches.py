"""What timm's layers keep of their weights in eval mode: LeViT, TinyViT and others look attention biases up once.

Such a layer forgets what it keeps when :meth:`~torch.nn.Module.train` is called on it, as ``model.train()`` and
``model.eval()`` do, but not when a mode is set in another way or when weights are loaded.
"""

from typing import Any

from torch import nn


def forget(model: nn.Module) -> None:
    """Make every layer forget what it keeps of its weights; each stays in the mode it is in."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        if type(module).train is not nn.Module.train and not hasattr(module, "forward_exits"):
            module.train(False)
    for module, mode in modes.items():
        module.training = mode


def forget_after_loading(model: nn.Module, _: Any) -> None:
    """:func:`forget`, as a hook of ``load_state_dict``."""
    forget(model)
