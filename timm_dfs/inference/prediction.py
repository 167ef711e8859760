"""Early exit per sample inside a batch."""

import warnings
from typing import NamedTuple

import torch

from ..base.evaluating import as_images, evaluating, require_exits
from ..base.model import MultiExitModel
from .policy import ExitPolicy


class Prediction(NamedTuple):
    """What early-exit inference answers.

    Attributes:
        logits: Logits (B, C) of the exit that answered each sample.
        exit_index: That exit (B,), int64, on the logits' device.
    """

    logits: torch.Tensor
    exit_index: torch.Tensor


def resolve_policy(model: MultiExitModel, policy: ExitPolicy | str) -> ExitPolicy:
    """A policy as given, or the model's preset of that name.

    Raises:
        ValueError: If there is no such preset, or it has not one threshold per exit.
    """
    if isinstance(policy, str):
        if policy not in model.presets:
            known = ", ".join(map(repr, model.presets)) or "none"
            raise ValueError(f"There is no preset {policy!r}; this model has {known}. Or give an ExitPolicy.")
        policy = ExitPolicy.from_preset(model.presets[policy])
    if not isinstance(policy, ExitPolicy):
        raise ValueError(f"policy is {policy!r}; give an ExitPolicy or the name of a preset.")
    policy.check_exits(model.num_exits)
    return policy


def predict(model: MultiExitModel, x: torch.Tensor, policy: ExitPolicy | str) -> Prediction:
    """Classify a batch; each sample leaves at its own exit and the rest of the batch goes on smaller.

    Nothing deeper is computed once nobody is left, and no head of an exit that cannot answer. The model is
    evaluated in eval mode and left in the mode it was in; in eval mode, threads may share it.

    Args:
        model: A network with exits.
        x: Images (B, in_chans, H, W), normalised as the model's ``pretrained_cfg`` says.
        policy: Thresholds, or the name of one of the model's presets.

    Returns:
        Logits and exit of each sample, in the batch's order.

    Raises:
        ValueError: If the policy does not fit the model or ``x`` is not a batch of images.
    """
    require_exits(model)
    policy = resolve_policy(model, policy)
    x = as_images(model, x)
    if x.shape[0] == 0:
        return Prediction(x.new_empty(0, model.num_classes), torch.empty(0, dtype=torch.int64, device=x.device))
    last = model.num_exits - 1
    rows = list(range(len(x)))  # on the way; small enough for lists, whose operations cost less than a tensor's
    broken: set[int] = set()
    answers: list[tuple[int, list[int], torch.Tensor]] = []  # exit, rows, logits
    decision = policy.begin()

    def visit(k: int, logits: torch.Tensor) -> torch.Tensor | None:
        nonlocal rows
        leaving, nan = torch.stack(decision.leaves(k, logits)).tolist()  # from the device at once
        if any(nan):
            broken.update(row for row, is_nan in zip(rows, nan) if is_nan)
        if k == last:
            answers.append((k, rows, logits))
            return None
        if broken:
            leaving = [leaves and row not in broken for row, leaves in zip(rows, leaving)]
        if not any(leaving):
            return None
        staying = [i for i, leaves in enumerate(leaving) if not leaves]
        index = torch.tensor(staying, dtype=torch.int64, device=logits.device)
        if not staying:
            answers.append((k, rows, logits))
        else:
            gone = [i for i, leaves in enumerate(leaving) if leaves]
            answers.append((k, [rows[i] for i in gone], logits[torch.tensor(gone, device=logits.device)]))
            rows = [rows[i] for i in staying]
            decision.go_on(index)
        return index

    with evaluating(model), torch.inference_mode():
        model.walk(x, visit, policy.answering)
    if broken:
        warnings.warn(
            f"The logits of samples {sorted(broken)} hold NaN; they went to the last exit.",
            stacklevel=2,
        )
    return _in_order(answers, len(x))


def _in_order(answers: list[tuple[int, list[int], torch.Tensor]], batch: int) -> Prediction:
    """The answers of all exits, each sample in its row; ordinary tensors, made outside of inference mode."""
    _, _, some = answers[0]
    logits = torch.empty(batch, *some.shape[1:], dtype=some.dtype, device=some.device)
    exit_index = torch.empty(batch, dtype=torch.int64)
    for k, rows, of_rows in answers:
        index = torch.tensor(rows)
        exit_index[index] = k
        logits[index.to(some.device)] = of_rows
    return Prediction(logits, exit_index.to(some.device))
