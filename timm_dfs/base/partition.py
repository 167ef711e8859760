"""Feature partitioning and referencing: which losses train which channels of an exit's feature."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

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
    if not _is_share(beta):
        raise ValueError(
            f"beta is {beta!r}; give a number in [0, 1] (the share of channels deeper layers may train) "
            f"or {JOINT!r} for joint training without partition."
        )
    return beta  # type: ignore[return-value]


Betas = float | str | Sequence[float]
"""Partition ratios of a network: one for all early exits, or a sequence with one for each of them, shallow to deep."""


def check_betas(beta: Betas | None) -> float | str | tuple[float, ...]:
    """The partition ratios of a network: as :func:`check_beta` has one for all exits, or a tuple with one for each.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(beta, (str, bytes)) or not isinstance(beta, Sequence):
        return check_beta(beta)
    if not all(map(_is_share, beta)):
        raise ValueError(
            f"beta is {beta!r}; give one number in [0, 1] for each early exit (the share of channels deeper layers may "
            f"train), one number for all of them, or {JOINT!r} for joint training without partition."
        )
    return tuple(map(float, beta))


def beta_of_each(beta: float | str | tuple[float, ...], early_exits: int) -> list[float | str]:
    """The partition ratio of each early exit, shallow to deep, from what :func:`check_betas` returns.

    Raises:
        ValueError: If there are ratios for another number of exits.
    """
    if not isinstance(beta, tuple):
        return [beta] * early_exits
    if len(beta) != early_exits:
        raise ValueError(
            f"beta is {list(beta)}, {len(beta)} numbers; give one for each of this network's {early_exits} early exits "
            "(the last exit has none), or one number for all of them."
        )
    return list(beta)


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1


def changes_values(referencing: str | None, beta: Any) -> bool:
    """Whether a partition decides values, and so logits, instead of gradients alone: it does without referencing."""
    return referencing == "off" and beta not in (JOINT, None)


def check_referencing(referencing: Any) -> None:
    """Raise ``ValueError`` unless ``referencing`` is one of :data:`REFERENCING`."""
    if referencing is False:  # YAML's reading of a bare off
        raise ValueError(
            "referencing is False; in a recipe write 'off' in quotation marks, which YAML reads as a word."
        )
    if referencing not in REFERENCING:
        raise ValueError(f"referencing is {referencing!r}; choose one of {', '.join(map(repr, REFERENCING))}.")


MOST_SHARED_IN_PARTS = 0.75
"""Largest shared part for which a convolution's input gradient is computed in parts. Above it, slicing the weight costs
more than it saves. Chosen between 0.5, which was faster on VGG7, and 0.9, which made no difference."""


@dataclass(frozen=True)
class PartlyTrained:
    """A feature whose first channels pass gradients and whose other channels do not.

    A layer that supports it skips the gradient of the other channels, which autograd would compute and discard.

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


def records_gradients(module: nn.Module) -> bool:
    """Whether the gradients of a forward pass of ``module`` can be needed: not in ``torch.jit.trace`` in eval mode.

    Traces are made with and without gradients, and must not differ.
    """
    return torch.is_grad_enabled() and (module.training or not torch.jit.is_tracing())


class _Cut(torch.autograd.Function):
    """Views of a feature for the deeper layers and for its exit; the backward pass joins the gradients of both.

    The forward pass copies nothing. Concatenation with a detached part would copy the feature, and its gradient would
    lose the memory format. The exit's average is computed here so that its gradient, one number per map, is never
    expanded to a separate tensor of the feature's size.
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
    """Raise ``RuntimeError`` where second derivatives are asked for, which the functions here would return as zero."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "A partition has no second derivatives (create_graph=True, which AdaHessian needs); use another optimizer, "
            "or joint training (beta='joint')."
        )


class PartitionedConv2d(nn.Conv2d):
    """A convolution that computes its input's gradient only for the channels that need it.

    It has the weight, state dict and values of ``nn.Conv2d``. Only the backward pass for a :class:`PartlyTrained` input
    differs. Groups are not supported, and for such an input neither padding by name nor with other values than zeros.
    """

    def forward(self, x: Onward) -> torch.Tensor:
        if not isinstance(x, PartlyTrained):
            return super().forward(x)
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or self.groups != 1:
            raise ValueError(
                f"A PartitionedConv2d with padding={self.padding!r}, padding_mode={self.padding_mode!r} and "
                f"groups={self.groups} takes no PartlyTrained input; give numbers, 'zeros' and 1."
            )
        tensors: tuple[torch.Tensor | None, ...] = (x.trained, x.values, self.weight, self.bias)
        device = self.weight.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # Cast here, so that the function below saves the tensors that it computes with.
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
    """Gradient of the trained channels only: a transposed convolution with their part of the weight."""
    shape = (values.shape[0], ctx.trained, *values.shape[2:])
    if ctx.trained == 0:
        return gradient.new_zeros(shape)
    channels_last = gradient.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    part = weight[:, : ctx.trained].contiguous(memory_format=memory_format)
    # Only its shape is read, but a tensor in another memory format would be copied first.
    like = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=memory_format)
    return _convolution_backward(ctx, gradient, like, part, [True, False, False])[0]


def _convolution_backward(ctx, gradient, x, weight, mask: list[bool]) -> tuple[torch.Tensor, ...]:
    stride, padding, dilation = ctx.settings
    biases = [weight.shape[0]] if ctx.bias else None
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, biases, stride, padding, dilation, False, [0, 0], 1, mask
    )


class Partition(nn.Module):
    """Partition of a feature between the deeper layers and an exit (DFS, arXiv 2407.13986, sections 3.2 and 3.3).

    The first ``round(beta * channels)`` channels are the shared part f⁺, which the losses of deeper exits train; the
    rest, f⁻, is trained by this exit's loss. Referencing determines what each side reads:

    ===============  ======================  ====================
    referencing      to the deeper layers    to the exit's head
    ===============  ======================  ====================
    ``"two_sided"``  [f⁺, sg(f⁻)]            [sg(f⁺), f⁻]
    ``"one_sided"``  [f⁺, sg(f⁻)]            [f⁺, f⁻]
    ``"off"``        [f⁺, 0]                 [0, f⁻]
    ===============  ======================  ====================

    where sg is the stop-gradient. Unless referencing is off, values pass unchanged, and only gradients differ from
    joint training.

    Args:
        channels: Size C of the feature along ``dim``.
        beta: Partition ratio in [0, 1]; ``"joint"`` for joint training, without a partition.
        referencing: One of the values above.
        dim: Channel axis of the feature: 1 for NCHW, -1 for NHWC and token layouts.
        in_parts: Give the deeper layers a :class:`PartlyTrained` while gradients are recorded. For networks whose next
            layer supports it; ignored where it saves too little.

    Raises:
        ValueError: If ``beta`` or ``referencing`` is not one of the values above.

    Example:
        >>> import torch, timm_dfs
        >>> partition = timm_dfs.Partition(channels=4, beta=0.5)
        >>> feature = torch.ones(1, 4, requires_grad=True)
        >>> onward, exit_feature = partition(feature)
        >>> onward.sum().backward()  # the deeper layers train the first two channels
        >>> feature.grad
        tensor([[1., 1., 0., 0.]])
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
        """Return the feature for the deeper layers and the feature for the exit's head.

        Args:
            feature: Feature of any shape with the channels along ``dim``.
            averaged: Whether the head only averages the maps of an NCHW feature. It may then receive their averages
                (B, C, 1, 1), which makes training cheaper.

        Raises:
            ValueError: If the feature has another number of channels, or is symbolic (``torch.fx``).
        """
        if isinstance(feature, torch.fx.Proxy):
            raise ValueError(
                "torch.fx cannot trace through a Partition, which depends on the gradient mode. Use "
                "timm.models.create_feature_extractor, or give torchvision's tracer_kwargs=dict(leaf_modules="
                "[timm_dfs.Partition])."
            )
        if feature.shape[self.dim] != self.channels:
            raise ValueError(
                f"This partition was built for {self.channels} channels on axis {self.dim}, "
                f"but the feature has shape {tuple(feature.shape)}."
            )
        if self.beta == JOINT:
            return feature, feature
        if self.referencing == "off":
            shared, own = torch.split(feature, [self.shared, self.channels - self.shared], self.dim)
            zeros = [torch.zeros_like(part) for part in (shared, own)]
            return torch.cat((shared, zeros[1]), self.dim), torch.cat((zeros[0], own), self.dim)
        if not records_gradients(self):  # only gradients would differ
            return feature, feature
        onward, exit_feature = _Cut.apply(
            feature, self.dim, self.shared, self.referencing == "two_sided", self.in_parts, averaged
        )
        if self.in_parts:
            onward = PartlyTrained(onward, feature.detach())
        return onward, exit_feature

    def extra_repr(self) -> str:
        return f"{self.channels}, beta={self.beta}, referencing={self.referencing!r}, dim={self.dim}"
