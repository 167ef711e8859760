"""Early exit per sample inside a batch."""

import warnings
from typing import NamedTuple

import torch

from .multi_exit import MultiExitModel, as_images, evaluating, require_exits
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
    rows = torch.arange(x.shape[0], device=x.device)
    broken = torch.zeros_like(rows, dtype=torch.bool)
    answers: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # exit, rows, logits
    decision = policy.begin()

    def visit(k: int, logits: torch.Tensor) -> torch.Tensor | None:
        nonlocal rows
        leaving, nan = decision.leaves(k, logits)
        broken[rows] |= nan
        if k == last:
            answers.append((k, rows, logits))
            return None
        leaving &= ~broken[rows]
        staying = (~leaving).nonzero()[:, 0]
        if len(staying) == len(rows):
            return None
        answers.append((k, rows[leaving], logits[leaving]))
        rows = rows[staying]
        decision.go_on(staying)
        return staying

    with evaluating(model), torch.inference_mode():
        model.walk(x, visit, policy.answering)
    prediction = _in_order(answers)  # outside of inference mode: ordinary tensors
    if broken.any():
        warnings.warn(
            f"The logits of samples {broken.nonzero()[:, 0].tolist()} hold NaN; they went to the last exit.",
            stacklevel=2,
        )
    return prediction


def _in_order(answers: list[tuple[int, torch.Tensor, torch.Tensor]]) -> Prediction:
    """The answers of all exits, each sample in its row."""
    rows = torch.cat([rows for _, rows, _ in answers])
    logits = torch.cat([logits for *_, logits in answers])
    exits = torch.cat([torch.full_like(rows, k) for k, rows, _ in answers])
    order = rows.argsort()
    return Prediction(logits[order], exits[order])
