"""Base class of networks with exits: one walk from shallow to deep that calls a visitor at each exit."""

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import is_scriptable, use_reentrant_ckpt
from timm.models import checkpoint, register_notrace_module
from torch import nn

from .arguments import check_names
from .caches import forget_after_loading
from .chain import ChainedVisitor, check_chain, compare_chain, note_chain
from .equilibrium import balance
from .heads import Classifiers, ExitHead
from .objective import SETTINGS, Objective
from .partition import (
    Betas,
    Onward,
    Partition,
    PartitionedConv2d,
    beta_of_each,
    check_betas,
    check_referencing,
    records_gradients,
)
from .presets import classifier_biases, presets_as_json, were_trained
from .recorded_betas import compare_betas, note_betas
from .rows import take

if TYPE_CHECKING:
    from typing_extensions import Self

# Leaves for timm's FX feature extraction: they depend on the gradient mode, which FX cannot trace.
register_notrace_module(Partition)
register_notrace_module(PartitionedConv2d)

NO_TORCHSCRIPT = (
    "TorchScript (torch.jit.script, scriptable=True, train.py's --torchscript) does not support networks with exits; "
    "use torch.compile (--torchcompile) or torch.export."
)

Reader = Callable[[int, torch.Tensor], torch.Tensor]
"""Called as ``read(exit_index, feature)`` with an exit's feature; returns its logits."""

Visitor = Callable[[int, torch.Tensor], "torch.Tensor | None"]
"""Called as ``visit(exit_index, logits)`` at an exit. Returns the rows of the batch (int64 indices) that remain active:
``None`` for all of them, an empty tensor to stop."""


class MultiExitModel(nn.Module):
    """Base class of networks with exits.

    Training, evaluation, early-exit inference and cost counting all run :meth:`walk`, with different visitors. A
    subclass defines the first layers (:meth:`start`) and the layers from one exit point to the next (:meth:`advance`).
    The state between exit points is a list of batch-first tensors: the feature at the exit point, then tensors that
    only deeper layers read.

    A subclass builds its layers, sets ``feature_info`` (one entry per exit) and then calls :meth:`attach_exits`.

    Args:
        num_classes: Classes; 0 for pooled features.
        in_chans: Image channels.
        drop_rate: Dropout rate before each classifier.
        beta: Partition ratio in [0, 1], or a sequence with one for each early exit, shallow to deep; ``"joint"`` for
            joint training.
        referencing: ``"two_sided"``, ``"one_sided"`` or ``"off"``, see :class:`timm_dfs.Partition`.
        presets: Named operating points fitted to the weights.
        chain: Share in [0, 1] of the previous exit's logits that an exit adds to its own, in training and in eval mode
            (BoostNet, arXiv 2211.16726), so that exits correct those before them; 0: every exit is on its own. See
            :mod:`timm_dfs.base.chain`.

    Raises:
        ValueError: If a value is not one of those listed above, or timm's TorchScript mode is on.

    Example:
        >>> import timm, torch, timm_dfs
        >>> model = timm.create_model("dfs_vgg7_cifar100")
        >>> isinstance(model, timm_dfs.MultiExitModel), model.num_exits
        (True, 6)
        >>> images = torch.zeros(2, 3, 32, 32)
        >>> [tuple(logits.shape) for logits in model.forward_exits(images)]
        [(2, 100), (2, 100), (2, 100), (2, 100), (2, 100), (2, 100)]
        >>> tuple(model.eval()(images).shape)  # the last exit alone
        (2, 100)
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "Self":
        check_names(cls.__name__, kwargs, (*inspect.signature(cls.__init__).parameters, *SETTINGS))
        return super().__new__(cls)

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        drop_rate: float,
        beta: Betas | None,
        referencing: str,
        presets: dict[str, dict] | None,
        chain: float = 0.0,
    ):
        super().__init__()
        if is_scriptable():
            raise ValueError(NO_TORCHSCRIPT)
        self.beta = check_betas(beta)
        check_referencing(referencing)
        self.chain = check_chain(chain)
        if in_chans < 1:
            raise ValueError(f"in_chans is {in_chans}; give at least 1.")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}; give a number in [0, 1).")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.referencing = referencing
        self.presets = dict(presets or {})
        self.grad_checkpointing = False
        self.objective = Objective()
        self.adapters: nn.ModuleList | None = None
        self._given_args: dict = {}
        self._presets_of_weights: dict[str, dict] = {}
        self._biases_of_presets = torch.empty(0)
        self.register_load_state_dict_pre_hook(_without_strange_adapters)
        self.register_load_state_dict_pre_hook(_without_presets_of_other_weights)
        self.register_load_state_dict_pre_hook(compare_chain)
        self.register_state_dict_post_hook(note_chain)
        self.register_load_state_dict_pre_hook(compare_betas)
        self.register_state_dict_post_hook(note_betas)
        self.register_load_state_dict_post_hook(forget_after_loading)

    def __prepare_scriptable__(self) -> None:
        raise ValueError(NO_TORCHSCRIPT)

    def attach_exits(self, heads: list[ExitHead]) -> None:
        """Set the heads, shallow to deep, and a partition for each early exit, of the sizes in ``feature_info``."""
        if self.chain and len(heads) < 2:
            raise ValueError(f"chain is {self.chain} but needs at least two exits, and this network has one.")
        self.heads = nn.ModuleList(heads)
        self.partitions = nn.ModuleList(
            Partition(info["num_chs"], beta, self.referencing, in_parts=self.takes_parts)
            for info, beta in zip(self.feature_info, beta_of_each(self.beta, len(heads) - 1))
        )
        self.num_features = heads[-1].in_features
        self.head_hidden_size = heads[-1].num_features

    def train_for(self, objective: Objective) -> None:
        """Prepare the model for training with ``objective``: freeze the backbone, create adapters, balance gradients.

        Raises:
            ValueError: If the objective does not fit the number of exits, or freezes an exit that is chained to exits
                that are trained.
        """
        objective.check_exits(self.num_exits)
        self._check_chained_exits(objective)
        self._warn_of_untrained_channels(objective)
        before, self.objective = self.objective, objective
        if objective.train_backbone != before.train_backbone or objective.frozen_exits != before.frozen_exits:
            for parameter in self.parameters():
                parameter.requires_grad = objective.train_backbone
            for k in range(self.num_exits):
                for parameter in self.head_parameters(k):
                    parameter.requires_grad = k not in objective.frozen_exits
        self._fit_adapters()
        if self.adapters is not None:
            self.adapters.requires_grad_(True)
        self.train(self.training)

    def _check_chained_exits(self, objective: Objective) -> None:
        trained = set(range(self.num_exits)) - objective.frozen_exits
        changing = [k for k in sorted(objective.frozen_exits) if k > min(trained)]
        if changing and self.is_chained:
            raise ValueError(
                f"These settings freeze exit {changing[0]}, but exits are chained (chain={self.chain:g}), so that its "
                "logits change with those of the exits before it; give chain=0, or that exit a weight in loss_weights."
            )

    def _warn_of_untrained_channels(self, objective: Objective) -> None:
        if not objective.train_backbone or objective.loss_weights is None:
            return
        weights = objective.loss_weights[: len(self.partitions)]
        untrained = [
            str(k)
            for k, (weight, partition) in enumerate(zip(weights, self.partitions))
            if weight == 0 and partition.shared < partition.channels
        ]
        if untrained:
            warnings.warn(
                f"loss_weights gives {'exits' if untrained[1:] else 'exit'} {', '.join(untrained)} no weight, and with "
                f"beta={self.beta} no other loss trains the channels that belong to an exit, so that they stay as they "
                "are. Give beta='joint', or a sequence that is 1 there.",
                stacklevel=3,
            )
        of_deeper = [
            str(k)
            for k, partition in enumerate(self.partitions)
            if 0 < partition.shared < partition.channels and weights[k] and not any(objective.loss_weights[k + 1 :])
        ]
        if of_deeper and self.referencing != "one_sided":
            warnings.warn(
                f"loss_weights gives no exit after exit {of_deeper[0]} a weight, and with beta={self.beta} and "
                f"referencing={self.referencing!r} no other loss trains the channels of its feature that belong to "
                "these, so that they stay as they are. Give beta='joint', or a sequence that is 0 there.",
                stacklevel=3,
            )

    def _fit_adapters(self) -> None:
        """Create the adapters that the objective needs; existing ones of the right sizes are kept."""
        if self.objective.distill_feature_weight == 0:
            self.adapters = None
            return
        widths = self.pooled_widths()
        if self.adapters is None or [(a.in_features, a.out_features) for a in self.adapters] != [
            (width, widths[-1]) for width in widths[:-1]
        ]:
            like = next(self.parameters())
            self.adapters = nn.ModuleList(
                nn.Linear(width, widths[-1], device=like.device, dtype=like.dtype)  # type: ignore[arg-type]
                for width in widths[:-1]
            )

    def train(self, mode: bool = True) -> "MultiExitModel":
        super().train(mode)
        if not self.objective.train_backbone:
            for name, module in self.named_children():
                if name not in ("heads", "adapters"):
                    module.eval()
            for k in self.objective.frozen_exits & set(range(len(self.heads))):
                self.heads[k].eval()
        return self

    # Provided by subclasses.

    takes_parts = False
    """Whether a :class:`PartitionedConv2d` is the only layer that reads the feature passed on from an exit point."""

    feature_info: list[dict]
    head_hidden_size: int
    num_features: int
    num_classes: int
    is_fused: bool = False
    """Whether this is a copy for inference, see :func:`timm_dfs.fuse`."""
    pretrained_cfg: dict

    def start(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The state before the first exit, from images (B, in_chans, H, W)."""
        raise NotImplementedError

    def advance(self, state: list[torch.Tensor], exit_index: int) -> list[torch.Tensor]:
        """The state at exit ``exit_index``, from the state after exit ``exit_index - 1``.

        Computes only what this exit reads; layers that only deeper exits read run when a deeper exit is reached.
        """
        raise NotImplementedError

    def settle(self, state: list[torch.Tensor], exit_index: int) -> list[torch.Tensor]:
        """The state with all layers up to ``exit_index`` computed, including those that :meth:`advance` postponed."""
        return state

    # The walk.

    @property
    def pool_type(self) -> str | None:
        """The heads' pooling, by timm's name; ``None`` where it is not an argument."""
        return str(self.heads[-1].pool.pool_type)

    @property
    def built_for(self) -> tuple[tuple[int, int], ...]:
        """Image sizes (height, width) that timm built the network for; none where any size will do."""
        return ()

    @property
    def num_exits(self) -> int:
        """Number of exits, the last included."""
        return len(self.heads)

    @property
    def exit_points(self) -> tuple[str, ...]:
        """Names of the modules after which the exits are attached, shallow to deep."""
        return tuple(info["module"] for info in self.feature_info)

    def walk(
        self,
        x: torch.Tensor,
        visit: Visitor,
        exits: Collection[int] | None = None,
        read: Reader | None = None,
    ) -> list[torch.Tensor]:
        """Run the network shallow to deep and call ``visit(exit_index, logits)`` at each exit.

        Args:
            x: Images (B, in_chans, H, W).
            visit: The visitor. The batch continues with the rows it returns; an empty tensor ends the walk.
            exits: Exits to visit (all by default). No layer beyond the deepest of them is computed, and no other head
                unless exits are chained. If empty, the backbone runs to its end.
            read: Computes an exit's own logits from its feature; :meth:`answer` by default.

        Returns:
            The state where the walk ended.

        Raises:
            ValueError: If ``exits`` names an exit that the network does not have.
        """
        visit, exits, deepest = self.visits(visit, exits)
        last = self.num_exits - 1
        read = read or self.answer
        state = self.start(x)
        for k in range(deepest + 1):
            state = self.advance(state, k)
            onward, feature = self.split(k, state[0]) if k < last else (state[0], state[0])
            state = [onward, *state[1:]]  # type: ignore[list-item]  # PartlyTrained only if takes_parts
            if k in exits:
                rows = visit(k, read(k, feature))
                if rows is not None:
                    if rows.numel() == 0:
                        break
                    state = [take(tensor, rows) for tensor in state]
        return state

    def split(self, exit_index: int, feature: torch.Tensor) -> tuple[Onward, torch.Tensor]:
        """Split an early exit's feature: ``(for the deeper layers, for the exit's head)``."""
        onward, exit_feature = self.partitions[exit_index](feature, self.heads[exit_index].averages)
        if self.objective.gradient_equilibrium and records_gradients(self):
            onward, exit_feature = balance(onward, exit_feature, self.num_exits - exit_index)
        return onward, exit_feature

    @property
    def is_chained(self) -> bool:
        """Whether exits add a share of the previous exit's logits to their own; pooled features are not chained."""
        return self.chain > 0 and self.num_classes > 0

    def visits(self, visit: Visitor, exits: Collection[int] | None) -> tuple[Visitor, Collection[int], int]:
        """The visitor that a walk calls, the exits at which it does, and the deepest exit point that the walk reaches.

        Chained logits need the head of every exit up to the deepest one, so that all of these are visited.

        Raises:
            ValueError: If ``exits`` names an exit that the network does not have.
        """
        last = self.num_exits - 1
        exits = range(self.num_exits) if exits is None else exits
        deepest = max(exits, default=last)
        if deepest > last or min(exits, default=0) < 0:
            raise ValueError(f"exits is {tuple(exits)}; this network's exits are numbered 0 to {last}.")
        if self.is_chained and exits:
            return ChainedVisitor(visit, exits, self.chain), range(deepest + 1), deepest
        return visit, exits, deepest

    def answer(self, exit_index: int, feature: torch.Tensor) -> torch.Tensor:
        """An exit's own logits (B, num_classes), without those before it, from its partitioned feature."""
        return self.heads[exit_index](feature)

    def pool_and_answer(self, exit_index: int, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pooled feature (B, width) that an exit's classifier reads, and its own logits (B, num_classes)."""
        head = self.heads[exit_index]
        pooled = head.pool_and_classify(head.body(feature), pre_logits=True)
        return pooled, head.fc(pooled)

    def pooled_widths(self) -> list[int]:
        """Width of the pooled feature that each exit's classifier reads, shallow to deep."""
        return [head.num_features for head in self.heads]  # type: ignore[misc]

    def head_parameters(self, exit_index: int) -> Iterator[nn.Parameter]:
        """The parameters of an exit's head, which ``train_backbone=False`` goes on training."""
        return self.heads[exit_index].parameters()

    def forward_exits(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of all E exits for images (B, in_chans, H, W): E tensors (B, num_classes), shallow to deep."""
        logits: list[torch.Tensor] = []
        self.walk(x, lambda _, exit_logits: logits.append(exit_logits))
        return tuple(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Logits: of all exits in training mode, of the last exit in eval mode.

        A new model is in training mode; call ``model.eval()`` for one tensor of logits. For early exit per sample, use
        :func:`timm_dfs.predict`; for all exits' logits in either mode, :meth:`forward_exits`.

        Args:
            x: Images (B, in_chans, H, W).

        Returns:
            In training mode, a tuple of E tensors (B, num_classes), shallow to deep; with feature distillation, one
            more tensor (E - 1,), see :meth:`forward_distances`. In eval mode, one tensor (B, num_classes); no early
            exit's head is computed, unless exits are chained.
        """
        if not self.training:
            return self._forward_chained(x) if self.is_chained else self.forward_head(self.forward_features(x))
        return self.forward_exits(x) if self.adapters is None else self.forward_distances(x)

    def _forward_chained(self, x: torch.Tensor) -> torch.Tensor:
        logits: list[torch.Tensor] = []
        self.walk(x, lambda _, last: logits.append(last), exits=(self.num_exits - 1,))
        return logits[0]

    def forward_distances(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All exits' logits, then each early exit's distance from the last exit's feature (E - 1,).

        The distance is the L2 distance over the whole batch between pooled features. An adapter maps the early exit's
        feature to the width of the last one's (BYOT, arXiv 1905.08094, equation 4). No gradient flows to the last
        exit's feature.

        Raises:
            ValueError: If the model has no adapters.
        """
        if self.adapters is None:
            raise ValueError("This model has no adapters; create it with distill_feature_weight above 0.")
        features: list[torch.Tensor] = []
        logits: list[torch.Tensor] = []

        def read(exit_index: int, feature: torch.Tensor) -> torch.Tensor:
            pooled, exit_logits = self.pool_and_answer(exit_index, feature)
            features.append(pooled)
            return exit_logits

        self.walk(x, lambda _, exit_logits: logits.append(exit_logits), read=read)
        teacher = features.pop().detach().float()
        distances = [
            torch.linalg.vector_norm(adapter(feature).float() - teacher)
            for adapter, feature in zip(self.adapters, features, strict=True)
        ]
        return *logits, torch.stack(distances)

    # timm's model interface.

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last exit's unpooled feature (B, num_features, H', W'), after the body of its head."""
        state = self.walk(x, lambda *_: None, exits=())
        return self.heads[-1].body(state[0])

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last exit's logits (B, num_classes) from the output of :meth:`forward_features`.

        Raises:
            ValueError: If exits are chained, unless ``pre_logits``: the last exit's logits need those before it.
        """
        self._check_forward_head(pre_logits)
        return self.heads[-1].pool_and_classify(x, pre_logits=pre_logits)

    def _check_forward_head(self, pre_logits: bool) -> None:
        if self.is_chained and not pre_logits:
            raise ValueError(
                f"This network's exits are chained (chain={self.chain:g}), so that the last exit's logits need those "
                "of the exits before it, which forward_features does not give; call the model or forward_exits."
            )

    def get_classifier(self) -> Classifiers:
        """The classifiers of all exits, a tuple, shallow to deep."""
        return Classifiers(head.get_submodule("fc") for head in self.heads)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give every exit a new classifier. Presets, which were fitted to the old ones, are dropped with a warning.

        So are the names of the old classes, without one.

        Raises:
            ValueError: If an exit is frozen: nothing would train its new classifier.
        """
        self._check_every_exit_is_trained()
        reference = next(self.parameters())
        for head in self.heads:
            head.reset(num_classes, global_pool, device=reference.device, dtype=reference.dtype)
        self.head_hidden_size = self.pooled_widths()[-1]
        self.num_classes = num_classes
        if global_pool is not None:
            self._given_args["global_pool"] = global_pool
        for names in ("label_names", "label_descriptions"):
            getattr(self, "pretrained_cfg", {}).pop(names, None)
        self._fit_adapters()
        self.drop_presets(self.presets, "the classifiers they were fitted to were replaced")

    def _check_every_exit_is_trained(self) -> None:
        if frozen := sorted(self.objective.frozen_exits):
            last = frozen[-1] == self.num_exits - 1
            raise ValueError(
                f"The settings of training freeze {'the last exit' if last else f'exit {frozen[0]}'}, so a new "
                "classifier would stay random; first call train_for(timm_dfs.Objective()), or another in which every "
                "exit's loss has a weight."
            )

    @property
    def presets(self) -> dict[str, dict]:
        """Named operating points fitted to the weights. Those that came with weights go once these are trained."""
        came = self._presets_that_came()
        if came and were_trained(classifier_biases(self), self._biases_of_presets):
            self._presets_of_weights = {}
            self.drop_presets(came, "the weights they were fitted to were trained further; fit_presets fits new ones")
        return self._presets

    @presets.setter
    def presets(self, presets: dict[str, dict]) -> None:
        self._presets = presets

    def presets_belong_to_weights(self) -> None:
        """Note that the presets came with the weights that the model has now."""
        self._presets_of_weights, self._biases_of_presets = dict(self._presets), classifier_biases(self)

    def _presets_that_came(self) -> list[str]:
        return [name for name, preset in self._presets.items() if self._presets_of_weights.get(name) is preset]

    def drop_presets(self, names: Collection[str], reason: str) -> None:
        """Drop presets that are no longer valid, with a warning that gives the reason."""
        if names:
            warnings.warn(f"Dropped the presets {', '.join(names)}: {reason}.", stacklevel=3)
            self.presets = {name: preset for name, preset in self.presets.items() if name not in names}

    @property
    def _model_args(self) -> dict:
        """Arguments that timm writes into ``config.json`` to rebuild this model: the caller's and those kept here."""
        ours = dict(beta=self.beta, referencing=self.referencing, **({"chain": self.chain} if self.chain else {}))
        return dict(self._given_args, **ours, **({"presets": presets_as_json(self.presets)} if self.presets else {}))

    @_model_args.setter
    def _model_args(self, args: dict) -> None:
        self._given_args = {key: value for key, value in args.items() if key not in ("presets", *SETTINGS)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def recomputed_buffers(self) -> list[torch.Tensor]:
        """Buffers that a backward pass may change: gradient checkpointing updates the statistics of norms again."""
        return list(self.buffers()) if self.grad_checkpointing else []

    def run(self, module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """Call one of the backbone's modules, with gradient checkpointing where it is enabled."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            refuse_reentrant()
            return checkpoint(module, *inputs)
        return module(*inputs)


def refuse_reentrant() -> None:
    """Raise ``ValueError`` if timm is set to reentrant gradient checkpointing, which loses gradients."""
    if use_reentrant_ckpt():
        raise ValueError(
            "timm is set to reentrant gradient checkpointing, which drops the gradients of layers whose inputs need "
            "none; unset TIMM_REENTRANT_CKPT or call timm.layers.set_reentrant_ckpt(False)."
        )


def _without_presets_of_other_weights(model: MultiExitModel, state_dict: dict, prefix: str, *_) -> None:
    """Drop the presets that came with a model's weights if other weights are loaded in their place."""
    if (came := model._presets_that_came()) and any(
        _differs(value, state_dict.get(prefix + name)) for name, value in _deciding(model)
    ):
        model.drop_presets(came, "the weights they were fitted to were replaced")


def _deciding(model: MultiExitModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What decides a model's logits: parameters, and buffers but for the batches that norms counted."""
    yield from model.named_parameters()
    yield from ((name, value) for name, value in model.named_buffers() if not name.endswith("num_batches_tracked"))


def _differs(own: torch.Tensor, given: torch.Tensor | None) -> bool:
    if given is None or given.is_meta or own.is_meta or given.shape != own.shape:
        return False  # an error, or for the caller to know
    return not torch.equal(given.to(own.device, own.dtype), own)


def _without_strange_adapters(model: MultiExitModel, state_dict: dict, prefix: str, *_) -> None:
    """Fit a state dict's adapters, which serve training only, to the model's: remove them, or start with its own."""
    given = [key for key in state_dict if key.startswith(f"{prefix}adapters.")]
    if model.adapters is None:
        for key in given:
            del state_dict[key]
    elif not given and state_dict:
        state_dict.update((f"{prefix}adapters.{key}", value) for key, value in model.adapters.state_dict().items())
