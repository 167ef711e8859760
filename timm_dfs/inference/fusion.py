"""Folding batch norms into convolutions for faster inference."""

import copy
import math
from typing import Any, TypeVar

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..base.caches import forget
from ..base.evaluating import evaluating, require_exits, without_data
from ..base.model import MultiExitModel
from ..base.partition import PartitionedConv2d
from .precision import own_precision

Model = TypeVar("Model", bound=MultiExitModel)


def fuse(model: Model) -> Model:
    """A copy of a network for inference: batch norms folded into the convolutions before them, channels last.

    Its logits are the model's except for rounding, at every exit. It cannot be trained, or saved in place of the model.

    Args:
        model: A network with exits; it is not changed.

    Returns:
        The copy, in eval mode, on the model's device.

    Raises:
        ValueError: If ``model`` has no exits or its logits are not finite, something besides a norm reads a
            convolution's output, or a folded weight does not fit into the model's data type.

    Example:
        >>> import timm, torch, timm_dfs
        >>> model = timm.create_model("dfs_resnet18_cifar100", layers=(1, 1), channels=(8, 16), num_classes=10).eval()
        >>> fused, images = timm_dfs.fuse(model), torch.ones(1, 3, 32, 32)
        >>> torch.allclose(fused(images), model(images), atol=1e-4)
        True
    """
    require_exits(model)
    forget(model)  # what layers keep cannot be copied with its gradients
    dtype = next(model.parameters()).dtype
    if dtype in (torch.float16, torch.bfloat16):  # folded and compared with less rounding
        fused = fuse(copy.deepcopy(model).float()).to(dtype)
        if not all(value.isfinite().all() for value in fused.state_dict().values()):
            raise ValueError(
                f"{type(model).__name__} cannot be fused in {dtype}: a folded weight does not fit into it."
            )
        return fused
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    size = (fused.in_chans, *fused.pretrained_cfg["input_size"][1:])
    for conv, norm in _pairs(fused, size):
        parts: Any = fused.get_submodule(conv), fused.get_submodule(norm)
        fused.set_submodule(conv, fuse_conv_bn_eval(*parts))
        fused.set_submodule(norm, _after(fused.get_submodule(norm)))
    fused = fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _check(fused, model, size)
    fused.is_fused = True
    return fused


def _check(fused: MultiExitModel, model: MultiExitModel, input_size: tuple[int, ...]) -> None:
    like = next(model.parameters())
    images = torch.linspace(-1, 1, 2 * math.prod(input_size), device=like.device, dtype=like.dtype)
    with evaluating(model), own_precision(model), torch.inference_mode():
        ours, theirs = (torch.stack(network.forward_exits(images.view(2, *input_size))) for network in (fused, model))
    if not theirs.isfinite().all():
        raise ValueError(f"{type(model).__name__} cannot be fused: its own logits are not finite.")
    for k, (distance, scale) in enumerate(zip((ours - theirs).flatten(1).norm(dim=1), theirs.flatten(1).norm(dim=1))):
        if not distance <= 1e-3 * scale + 1e-6:
            raise ValueError(
                f"{type(model).__name__} cannot be fused: the logits of exit {k} change by {distance / scale:.1%}, "
                "because something besides a norm reads a convolution's output. Use the model without fusing it."
            )


def _pairs(model: MultiExitModel, input_size: tuple[int, ...]) -> list[tuple[str, str]]:
    """Names of convolutions and the norms that read their outputs, each called once in a forward pass."""
    made: dict[
        tuple[int, int], str
    ] = {}  # convolution by its output's identity and version, which in-place changes raise
    kept: list[torch.Tensor] = []  # outputs, kept alive so that no two have the same identity
    calls: dict[str, int] = {}
    pairs: list[tuple[str, str]] = []

    def watch(name: str, module: nn.Module):
        def hook(_: nn.Module, args: Any, output: torch.Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, nn.Conv2d):
                made[id(output), output._version] = name
                kept.append(output)
            elif maker := made.get((id(args[0]), args[0]._version)):
                pairs.append((maker, name))

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in model.named_modules() if _may_fold(module)]
    try:
        with without_data(model, input_size) as images:
            model.forward_exits(images)
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if all(calls[name] == 1 for name in pair)]


def _may_fold(module: nn.Module) -> bool:
    """Whether it is a plain convolution, or a batch norm with statistics, without forward hooks."""
    plain = type(module).forward in _PLAIN
    return plain and not module._forward_hooks and getattr(module, "track_running_stats", True)


_PLAIN = (nn.Conv2d.forward, PartitionedConv2d.forward, nn.BatchNorm2d.forward, BatchNormAct2d.forward)


def _after(norm: nn.Module) -> nn.Module:
    """Layers that timm's norm layers apply after the norm itself: dropout and activation."""
    if isinstance(norm, BatchNormAct2d):
        return nn.Sequential(norm.drop, norm.act) if not isinstance(norm.drop, nn.Identity) else norm.act
    return nn.Identity()
