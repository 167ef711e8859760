"""Early exit per sample inside a batch."""

import functools
import warnings
from typing import NamedTuple

import torch

from ..base.evaluating import as_images, evaluating, require_classes, require_exits
from ..base.model import MultiExitModel
from .policy import ExitPolicy


class Prediction(NamedTuple):
    """Result of early-exit inference.

    Attributes:
        logits: Logits (B, C) of the exit at which each sample left, or of the policy's ensemble at it.
        exit_index: That exit (B,), int64, on the logits' device.

    Example:
        >>> import torch
        >>> from timm_dfs import Prediction
        >>> logits, exit_index = Prediction(torch.tensor([[2.0, 0.5]]), torch.tensor([0]))
        >>> logits.argmax(-1), exit_index
        (tensor([0]), tensor([0]))
    """

    logits: torch.Tensor
    exit_index: torch.Tensor


def resolve_policy(model: MultiExitModel, policy: ExitPolicy | str) -> ExitPolicy:
    """The policy itself, or that of the model's preset of that name.

    Raises:
        ValueError: If there is no such preset, or it does not have one threshold per exit.
    """
    if isinstance(policy, str):
        presets = model.presets  # compares weights
        if policy not in presets:
            known = ", ".join(map(repr, presets)) or "none"
            raise ValueError(f"There is no preset {policy!r}; this model has {known}. Or give an ExitPolicy.")
        policy = ExitPolicy.from_preset(presets[policy])
    if not isinstance(policy, ExitPolicy):
        raise ValueError(f"policy is {policy!r}; give an ExitPolicy or the name of a preset.")
    policy.check_exits(model.num_exits)
    return policy


def predict(model: MultiExitModel, x: torch.Tensor, policy: ExitPolicy | str) -> Prediction:
    """Classify a batch with early exit: each sample leaves at its own exit, and the active samples go on.

    Nothing deeper is computed once no sample is active, and no head of an exit that is switched off, unless exits are
    chained. The model is evaluated in eval mode and returned to the mode it was in; threads may share a model that is
    in eval mode.

    Args:
        model: A network with exits.
        x: Images (B, in_chans, H, W), normalised as the model's ``pretrained_cfg`` says.
        policy: Thresholds, or the name of one of the model's presets.

    Returns:
        Logits and exit of each sample, in the batch's order.

    Raises:
        ValueError: If the policy does not fit the model, ``x`` is not a batch of images, or the model has one logit.

    Example:
        >>> import timm, torch, timm_dfs
        >>> model = timm.create_model("dfs_vgg7_cifar100", depths=(1, 1), widths=(8, 16), num_classes=10)
        >>> prediction = timm_dfs.predict(model, torch.zeros(4, 3, 32, 32), timm_dfs.ExitPolicy([0.0, 0.0]))
        >>> prediction.logits.shape, prediction.exit_index
        (torch.Size([4, 10]), tensor([0, 0, 0, 0]))
    """
    require_exits(model)
    require_classes(model)
    policy = resolve_policy(model, policy)
    x = as_images(model, x)
    if x.shape[0] == 0:
        return Prediction(x.new_empty(0, model.num_classes), torch.empty(0, dtype=torch.int64, device=x.device))
    last = model.num_exits - 1
    rows = list(range(len(x)))  # active samples: few, so that operations on a list cost less than on a tensor
    broken: set[int] = set()
    left: list[tuple[int, list[int], torch.Tensor]] = []  # exit, rows, logits
    decision = policy.begin()

    def visit(k: int, logits: torch.Tensor) -> torch.Tensor | None:
        nonlocal rows
        dtype, logits = logits.dtype, decision.predicted(k, logits)
        leaving, nan = torch.stack(decision.leaves(k, logits)).tolist()  # one transfer from the device
        logits = logits.to(dtype)
        if any(nan):
            broken.update(row for row, is_nan in zip(rows, nan) if is_nan)
        if k == last:
            left.append((k, rows, logits))
            return None
        if broken:
            leaving = [leaves and row not in broken for row, leaves in zip(rows, leaving)]
        if not any(leaving):
            return None
        staying = [i for i, leaves in enumerate(leaving) if not leaves]
        index = torch.tensor(staying, dtype=torch.int64, device=logits.device)
        if not staying:
            left.append((k, rows, logits))
        else:
            gone = [i for i, leaves in enumerate(leaving) if leaves]
            left.append((k, [rows[i] for i in gone], logits[torch.tensor(gone, device=logits.device)]))
            rows = [rows[i] for i in staying]
            decision.go_on(index)
        return index

    with evaluating(model), torch.inference_mode():
        model.walk(x, visit, policy.answering)
    if broken:
        warnings.warn(
            f"The logits of samples {sorted(broken)} contain NaN; these samples left at the last exit"
            f"{', where an ensemble makes their logits NaN as well' if policy.ensemble is not None else ''}.",
            stacklevel=2,
        )
    return _in_order(left, len(x))


def _in_order(left: list[tuple[int, list[int], torch.Tensor]], batch: int) -> Prediction:
    """Results of all exits, each sample in its own row: ordinary tensors, made outside inference mode."""
    _, _, some = left[0]
    dtype = functools.reduce(torch.promote_types, (of_rows.dtype for _, _, of_rows in left))
    logits = torch.empty(batch, *some.shape[1:], dtype=dtype, device=some.device)
    exit_index = torch.empty(batch, dtype=torch.int64)
    for k, rows, of_rows in left:
        index = torch.tensor(rows)
        exit_index[index] = k
        logits[index.to(some.device)] = of_rows.to(dtype)
    return Prediction(logits, exit_index.to(some.device))
