"""Training objective: settings that ``train.py`` passes to a model with ``--model-kwargs``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

AGGREGATORS = ("PCGrad", "CAGrad", "NashMTL", "MGDA", "AlignedMTL", "UPGrad")
"""Gradient aggregators, by their names in torchjd."""


TEACHER_LOSSES = ("kl", "dkd")
"""Losses by which another network teaches: timm's divergence, and decoupled knowledge distillation."""


@dataclass(frozen=True)
class Objective:
    """Settings that combine the exits' losses, or their gradients, into one gradient.

    Attributes:
        loss_weights: Weight of each exit's loss, shallow to deep; ``None``: 1 for each (DFS, equation 1).
        distill_weight: Share in [0, 1] of an early exit's loss that is the soft cross-entropy with the last exit as
            teacher; no gradient flows to the teacher (BYOT; Zhang et al., ICCV 2019, arXiv 1905.08094, equation 3).
        distill_temperature: Temperature of both sides of that soft cross-entropy. The loss is not multiplied by its
            square, as in the official DFS code.
        distill_feature_weight: Weight of the L2 distance, over the whole batch, between each early exit's pooled
            feature and the last exit's. A linear adapter maps the early feature to the last one's width (BYOT,
            equation 4).
        gradient_equilibrium: Scale the gradients of an exit's head and of the deeper layers at each exit point, so that
            every exit has the same weight there (GE; Li et al., ICCV 2019, arXiv 1908.06294, section 3.2).
        train_backbone: ``False`` freezes the backbone's parameters and normalisation statistics; only heads train, and
            of these only those of exits whose loss has a weight. So ``loss_weights=[1, 1, 0]`` keeps the last exit of a
            pretrained network as it is, also from weight decay.
        aggregator: One of :data:`AGGREGATORS`, or ``None`` for the sum of the exits' gradients.
        teacher_loss: How another network, timm's ``--kd-model-name``, teaches each exit: ``"kl"``, the divergence as
            timm has it, or ``"dkd"``, decoupled knowledge distillation (Zhao et al., CVPR 2022, arXiv 2203.08679).
        teacher_size: Height and width in pixels at which that network sees the images; ``None``: those of training.

    Raises:
        ValueError: If a value is not one of those listed above, or would change nothing beside the others.

    Example:
        >>> import timm, timm_dfs
        >>> timm_dfs.Objective(distill_weight=0.3, gradient_equilibrium=True).distill_temperature
        3.0

        A model takes these settings as keyword arguments:

        >>> model = timm.create_model("dfs_vgg7_cifar100", distill_weight=0.3)
        >>> model.objective.distill_weight
        0.3
    """

    loss_weights: Sequence[float] | None = None
    distill_weight: float = 0.0
    distill_temperature: float = 3.0
    distill_feature_weight: float = 0.0
    gradient_equilibrium: bool = False
    train_backbone: bool = True
    aggregator: str | None = None
    teacher_loss: str = "kl"
    teacher_size: int | None = None

    def __post_init__(self) -> None:
        weights = self.loss_weights
        if weights is not None and not _are_weights(weights):
            raise ValueError(f"loss_weights is {weights!r}; give one number of at least 0 per exit, not all of them 0.")
        if not _is_number(self.distill_weight) or not 0 <= self.distill_weight <= 1:
            raise ValueError(f"distill_weight is {self.distill_weight!r}; give a share in [0, 1].")
        if not _is_number(self.distill_temperature) or self.distill_temperature <= 0:
            raise ValueError(f"distill_temperature is {self.distill_temperature!r}; give a positive number.")
        if not _is_number(self.distill_feature_weight) or self.distill_feature_weight < 0:
            raise ValueError(f"distill_feature_weight is {self.distill_feature_weight!r}; give a number of at least 0.")
        for name in ("gradient_equilibrium", "train_backbone"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give True or False.")
        if self.aggregator is not None and self.aggregator not in AGGREGATORS:
            raise ValueError(
                f"aggregator is {self.aggregator!r}; choose one of {', '.join(map(repr, AGGREGATORS))}, or None."
            )
        if self.teacher_loss not in TEACHER_LOSSES:
            raise ValueError(f"teacher_loss is {self.teacher_loss!r}; choose {' or '.join(map(repr, TEACHER_LOSSES))}.")
        size = self.teacher_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"teacher_size is {size!r}; give a number of pixels, or None for those of training.")

        self._check_effect()
        for name in ("distill_weight", "distill_temperature", "distill_feature_weight"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if weights is not None:
            object.__setattr__(self, "loss_weights", tuple(map(float, weights)))  # a copy: the caller's list may change

    def _check_effect(self) -> None:
        """Raise ``ValueError`` if a setting would change nothing."""
        if self.distill_temperature != Objective.distill_temperature and not self.distill_weight:
            raise ValueError(
                f"distill_temperature is {self.distill_temperature!r}, but distill_weight is 0, so that it has no "
                "effect; give a weight, or leave the temperature out."
            )
        for name in ("distill_weight", "distill_feature_weight"):
            if getattr(self, name) and self.loss_weights is not None and not any(list(self.loss_weights)[:-1]):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but loss_weights gives the early exits, which it teaches, no "
                    "weight; leave one out."
                )

    @property
    def frozen_exits(self) -> frozenset[int]:
        """Exits whose heads are frozen with the backbone, because their loss has no weight."""
        if self.train_backbone or self.loss_weights is None:
            return frozenset()
        return frozenset(k for k, weight in enumerate(self.loss_weights) if weight == 0)

    @property
    def freezes_last_exit(self) -> bool:
        """Whether the last exit is among :attr:`frozen_exits`."""
        return self.loss_weights is not None and len(self.loss_weights) - 1 in self.frozen_exits

    def check_exits(self, num_exits: int) -> None:
        """Raise ``ValueError`` unless these settings fit a network with ``num_exits`` exits."""
        if self.loss_weights is not None and len(self.loss_weights) != num_exits:
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} entries; give one for each of this network's "
                f"{num_exits} exits."
            )
        if num_exits < 2:
            for name in ("distill_weight", "distill_feature_weight", "gradient_equilibrium", "aggregator"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs at least two exits, and this network has one; leave it out.")


SETTINGS = tuple(field.name for field in fields(Objective))
"""Names of the settings, which are keyword arguments of every model."""


def take_settings(kwargs: dict[str, Any]) -> tuple[Objective, dict[str, Any]]:
    """Split a model's keyword arguments into its objective and the rest.

    Raises:
        ValueError: If a setting has a value that :class:`Objective` refuses.
    """
    ours = {name: value for name, value in kwargs.items() if name in SETTINGS}
    return Objective(**ours), {name: value for name, value in kwargs.items() if name not in SETTINGS}


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def _are_weights(weights: Any) -> bool:
    return (
        isinstance(weights, Sequence)
        and not isinstance(weights, (str, bytes, bytearray))
        and all(_is_number(weight) and weight >= 0 for weight in weights)
        and sum(weights) > 0
    )
