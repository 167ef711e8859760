"""Feature partitioning and referencing: who may train which channels of an exit's feature."""

from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

JOINT = "joint"
"""The ``beta`` of joint training, without partition. Classes take ``None`` for the same, but timm drops None."""

REFERENCING = ("two_sided", "one_sided", "off")


def check_beta(beta: float | str | None) -> float | str:
    """The partition ratio: a number in [0, 1], or :data:`JOINT`, also for ``None``.

    Raises:
        ValueError: If it is neither.
    """
    if beta is None or (isinstance(beta, str) and beta == JOINT):
        return JOINT
    if isinstance(beta, bool) or not isinstance(beta, Real) or not 0 <= beta <= 1:
        raise ValueError(
            f"beta is {beta!r}; give a number in [0, 1] (the share of channels deeper layers may train) "
            f"or {JOINT!r} for joint training without partition."
        )
    return beta  # type: ignore[return-value]


def check_referencing(referencing: str) -> None:
    """Raise ``ValueError`` unless ``referencing`` is one of :data:`REFERENCING`."""
    if referencing not in REFERENCING:
        raise ValueError(f"referencing is {referencing!r}; choose one of {', '.join(map(repr, REFERENCING))}.")


MOST_SHARED_IN_PARTS = 0.75
"""Above this share, little is saved of a convolution's input gradient, and cutting its weight costs more. Chosen
between 0.5, where cutting paid on VGG7, and 0.9, where it was a wash."""


@dataclass(frozen=True)
class PartlyTrained:
    """A feature whose first channels pass gradients and whose others do not.

    A layer that takes it computes no gradient for those others, which autograd would compute and drop.

    Attributes:
        trained: The first channels, which pass gradients.
        values: All channels, detached.
    """

    trained: torch.Tensor
    values: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __getitem__(self, rows: torch.Tensor) -> "PartlyTrained":
        return PartlyTrained(self.trained[rows], self.values[rows])


Onward = torch.Tensor | PartlyTrained


class _Cut(torch.autograd.Function):
    """A feature for the deeper layers and for its exit, with the gradients of both joined in one pass.

    Costs nothing forward. Concatenating with a detached part would copy the feature, and its gradient would lose
    the memory format. The exit's average is taken here because its gradient, one number per map, then never becomes
    a tensor of the feature's size.
    """

    @staticmethod
    def forward(ctx, feature, dim, shared, two_sided, in_parts, averaged):
        ctx.dim, ctx.shared, ctx.two_sided, ctx.in_parts, ctx.averaged = dim, shared, two_sided, in_parts, averaged
        ctx.save_for_backward(feature)
        ctx.set_materialize_grads(False)
        onward = feature.narrow(dim, 0, shared) if in_parts else feature.view_as(feature)
        return onward, feature.mean((2, 3), keepdim=True) if averaged else feature.view_as(feature)

    @staticmethod
    def backward(ctx, onward_grad, exit_grad):
        _refuse_second_derivatives()
        (feature,) = ctx.saved_tensors
        own = feature.shape[ctx.dim] - ctx.shared
        shared_grad = onward_grad if ctx.in_parts or onward_grad is None else onward_grad.narrow(ctx.dim, 0, ctx.shared)
        if ctx.averaged and exit_grad is not None:
            exit_grad = (exit_grad / feature.shape[2:].numel()).expand_as(feature)
        gradient = torch.empty_like(feature)
        head, tail = gradient.narrow(ctx.dim, 0, ctx.shared), gradient.narrow(ctx.dim, ctx.shared, own)
        if exit_grad is None:
            tail.zero_()
        else:
            tail.copy_(exit_grad.narrow(ctx.dim, ctx.shared, own))
        if shared_grad is None:
            head.zero_()
        else:
            head.copy_(shared_grad)
        if exit_grad is not None and not ctx.two_sided:
            head.add_(exit_grad.narrow(ctx.dim, 0, ctx.shared))
        return gradient, None, None, None, None, None


def _refuse_second_derivatives() -> None:
    """What is filled in place below has none, and torch would take them for zero."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "A partition has no second derivatives (create_graph=True, as AdaHessian wants): take another optimizer, "
            "or beta='joint'."
        )


class PartitionedConv2d(nn.Conv2d):
    """A convolution that computes of its input's gradient only what somebody will use.

    The same weight, state dict and values as ``nn.Conv2d``; only a :class:`PartlyTrained` input is treated
    differently, and only in the backward pass. Groups are not supported.
    """

    def forward(self, x: Onward) -> torch.Tensor:
        if not isinstance(x, PartlyTrained):
            return super().forward(x)
        tensors: tuple[torch.Tensor | None, ...] = (x.trained, x.values, self.weight, self.bias)
        device = self.weight.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # Cast before the function below, so that what it saves is what it computes with.
            tensors = tuple(t if t is None else t.to(torch.get_autocast_dtype(device)) for t in tensors)
        return _PartlyTrainedConv2d.apply(*tensors, self.stride, self.padding, self.dilation)


class _PartlyTrainedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, trained, values, weight, bias, stride, padding, dilation):
        ctx.save_for_backward(values, weight)
        ctx.trained, ctx.bias = trained.shape[1], bias is not None
        ctx.settings = stride, padding, dilation
        return F.conv2d(values, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx, gradient):
        _refuse_second_derivatives()
        values, weight = ctx.saved_tensors
        trained_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            trained_grad = _input_gradient(ctx, gradient, values, weight)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            mask = [False, ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
            _, weight_grad, bias_grad = _convolution_backward(ctx, gradient, values, weight, mask)
        return trained_grad, None, weight_grad, bias_grad, None, None, None


def _input_gradient(ctx, gradient: torch.Tensor, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gradient of the trained channels alone: a transposed convolution with their part of the weight."""
    shape = (values.shape[0], ctx.trained, *values.shape[2:])
    if ctx.trained == 0:
        return gradient.new_zeros(shape)
    channels_last = gradient.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    part = weight[:, : ctx.trained].contiguous(memory_format=memory_format)
    # Only its shape is read, but in another format all of it would be copied first.
    like = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=memory_format)
    return _convolution_backward(ctx, gradient, like, part, [True, False, False])[0]


def _convolution_backward(ctx, gradient, x, weight, mask: list[bool]) -> tuple[torch.Tensor, ...]:
    stride, padding, dilation = ctx.settings
    biases = [weight.shape[0]] if ctx.bias else None
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, biases, stride, padding, dilation, False, [0, 0], 1, mask
    )


class Partition(nn.Module):
    """Splits a feature between the deeper layers and the exit that reads it (DFS, sections 3.2 and 3.3).

    The first ``round(beta * channels)`` channels are the shared part f⁺, which deeper layers may train; the
    rest, f⁻, belongs to the exit. Referencing decides what either side sees of the other's part:

    ===============  ======================  ====================
    referencing      to the deeper layers    to the exit's head
    ===============  ======================  ====================
    ``"two_sided"``  [f⁺, sg(f⁻)]            [sg(f⁺), f⁻]
    ``"one_sided"``  [f⁺, sg(f⁻)]            [f⁺, f⁻]
    ``"off"``        [f⁺, 0]                 [0, f⁻]
    ===============  ======================  ====================

    with sg the stop-gradient. Unless referencing is off, values pass unchanged: only gradients differ from
    joint training.

    Args:
        channels: Size C of the feature along ``dim``.
        beta: Partition ratio in [0, 1]; ``"joint"`` leaves the feature whole for both sides.
        referencing: One of the values above.
        dim: Channel axis of the feature: 1 for NCHW, -1 for NHWC and token layouts.
        in_parts: Give the deeper layers a :class:`PartlyTrained` while gradients are recorded. For networks whose next
            layer takes one; ignored where it saves too little.

    Raises:
        ValueError: If ``beta`` or ``referencing`` is not among the values above.
    """

    def __init__(
        self,
        channels: int,
        beta: float | str | None,
        referencing: str = "two_sided",
        dim: int = 1,
        in_parts: bool = False,
    ):
        super().__init__()
        self.beta = check_beta(beta)
        check_referencing(referencing)
        self.referencing = referencing
        self.dim = dim
        self.channels = channels
        self.shared = channels if isinstance(self.beta, str) else round(self.beta * channels)
        self.in_parts = in_parts and self.shared <= MOST_SHARED_IN_PARTS * channels

    def forward(self, feature: torch.Tensor, averaged: bool = False) -> tuple[Onward, torch.Tensor]:
        """Return ``(to the deeper layers, to the exit's head)``, both with the values of ``feature`` unless off.

        Args:
            feature: Anything with the channels along ``dim``.
            averaged: The head only averages the maps of an NCHW feature. It may then get them averaged already, as
                maps of one value, which is the cheaper way to train.
        """
        if feature.shape[self.dim] != self.channels:
            raise ValueError(
                f"This partition was built for {self.channels} channels on axis {self.dim}, "
                f"but the feature's shape is {tuple(feature.shape)}."
            )
        if self.beta == JOINT:
            return feature, feature
        if self.referencing == "off":
            shared, own = torch.split(feature, [self.shared, self.channels - self.shared], self.dim)
            zeros = [torch.zeros_like(part) for part in (shared, own)]
            return torch.cat((shared, zeros[1]), self.dim), torch.cat((zeros[0], own), self.dim)
        if not torch.is_grad_enabled():  # only gradients would differ
            return feature, feature
        onward, exit_feature = _Cut.apply(
            feature, self.dim, self.shared, self.referencing == "two_sided", self.in_parts, averaged
        )
        if self.in_parts:
            onward = PartlyTrained(onward, feature.detach())
        return onward, exit_feature

    def extra_repr(self) -> str:
        return f"{self.channels}, beta={self.beta}, referencing={self.referencing!r}, dim={self.dim}"
