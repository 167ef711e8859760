"""A network with exits around any timm backbone."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import nn

from ..base.caches import forget_after_loading
from ..base.evaluating import BATCH, on_shapes
from ..base.heads import Classifiers, check_num_classes
from ..base.model import MultiExitModel, Reader, Visitor, refuse_reentrant
from ..base.partition import Betas, Onward, Partition, beta_of_each, changes_values
from ..base.rows import take
from .active_samples import ActiveSamples
from .exit_points import choose, probe, stages
from .families import family_of
from .feature_heads import PoolTokens, feature_head
from .recorded_points import compare_exit_points, note_exit_points
from .taps import ForwardState, RestoreBatch, SelectActive, Stop, Tap, is_tapped, last_called
from .with_classifier import WithClassifier, below, is_encoder

DEFAULT_EXITS = 4
"""Number of exits, the last included, of a backbone with at least as many stages."""


class MultiExit(MultiExitModel):
    """A timm backbone with partitioned early exits; its own classifier is the last exit.

    The backbone keeps its weights and its code: hooks read the outputs of its modules. In eval mode ``forward`` is the
    backbone's own, unless exits are chained or referencing is off. An encoder without a classifier gets one, see
    :class:`~timm_dfs.wrapped.with_classifier.WithClassifier`.

    Args:
        backbone: A timm model, with its weights.
        exits: Number of exits, the last included, spread evenly over the backbone's stages; or the names of the modules
            after which the early exits are attached, shallow to deep. By default 4, or as many as there are stages.
        beta: Partition ratio in [0, 1], or a sequence with one for each early exit; ``"joint"`` for joint training.
        referencing: ``"two_sided"``, ``"one_sided"`` or ``"off"``, which hides the channels of an exit from the deeper
            layers, so that the last exit's logits are no longer the backbone's.
        head: ``"auto"``, ``"linear"``, ``"conv"`` or ``"wide"``, see
            :func:`~timm_dfs.wrapped.feature_heads.feature_head`.
        drop_rate: Dropout rate before the early exits' classifiers.
        presets: Named operating points fitted to these weights.
        chain: Share in [0, 1] of the previous exit's logits that an exit adds to its own (BoostNet); 0: none. Above 0,
            the last exit's logits are no longer the backbone's.

    Raises:
        ValueError: If the backbone is not a timm model or has exits already, an exit cannot be attached at a given
            module, or another value is not one of those listed above.

    Example:
        >>> import timm, torch, timm_dfs
        >>> model = timm_dfs.MultiExit(timm.create_model("test_resnet", num_classes=5), exits=3)
        >>> model.exit_points
        ('backbone.layer1', 'backbone.layer3')
        >>> images = torch.zeros(2, 3, 64, 64)
        >>> [tuple(logits.shape) for logits in model.train()(images)]  # training: the logits of all exits
        [(2, 5), (2, 5), (2, 5)]
        >>> tuple(model.eval()(images).shape)  # evaluation: the last exit's
        (2, 5)
    """

    def __init__(
        self,
        backbone: nn.Module,
        exits: int | Sequence[str] | None = None,
        beta: Betas | None = 0.5,
        referencing: str = "two_sided",
        head: str = "auto",
        drop_rate: float = 0.0,
        presets: dict[str, dict] | None = None,
        chain: float = 0.0,
    ):
        _check_backbone(backbone)
        if is_encoder(backbone):
            backbone = WithClassifier(backbone)
        traits: Any = backbone  # timm's models have no class in common
        in_chans = getattr(backbone, "in_chans", None) or traits.pretrained_cfg["input_size"][0]
        super().__init__(traits.num_classes, in_chans, drop_rate, beta, referencing, presets, chain)
        size = (in_chans, *_image_size(backbone))
        if exits is None:
            exits = max(2, min(DEFAULT_EXITS, len(stages(backbone))))
        points = probe(backbone, choose(backbone, exits), size)
        parameter = next(backbone.parameters())
        self.backbone = traits
        traits.register_load_state_dict_post_hook(forget_after_loading)
        self.pretrained_cfg = dict(traits.pretrained_cfg)
        self.pretrained_cfg["input_size"] = (self.pretrained_cfg["input_size"][0], *size[1:])
        self.heads = nn.ModuleList(
            feature_head(
                head,
                point,
                self.num_classes,
                getattr(backbone, "global_pool", "avg"),
                drop_rate,
                parameter.device,
                parameter.dtype,
            )
            for point in points
        )
        self.partitions = nn.ModuleList(
            Partition(point.channels, of_exit, referencing, point.dim)
            for point, of_exit in zip(points, beta_of_each(self.beta, len(points)))
        )
        self.feature_info = [
            dict(module=f"backbone.{point.module}", num_chs=point.channels, reduction=point.reduction)
            for point in points
        ]
        self.register_load_state_dict_pre_hook(compare_exit_points)
        self.register_state_dict_post_hook(note_exit_points)
        self.forward_state = ForwardState(self._replay)
        modules = dict(backbone.named_modules())
        family = family_of(backbone)
        for k, point in enumerate(points):
            last_called(modules[point.module]).register_forward_hook(Tap(k, self.forward_state, family.element))
        for name in family.select_active(backbone):
            modules[name].register_forward_pre_hook(SelectActive(self.forward_state), with_kwargs=True)
        for name in family.restore_batch(backbone):
            modules[name].register_forward_hook(RestoreBatch(self.forward_state))
        self.output_fmt = getattr(backbone, "output_fmt", "NCHW")
        self.num_features = traits.num_features
        self.head_hidden_size = self.pooled_widths()[-1]
        self.training = backbone.training  # the backbone's modules keep their modes
        self.heads.train(self.training)
        self.shrinks = self._can_shrink(size)

    backbone: Any

    shrinks: bool
    """Whether the batch can shrink during a forward pass. Where it cannot, because a tensor bypasses an exit point or
    the backbone stores the batch size, samples that have exited are still computed."""

    def _can_shrink(self, input_size: tuple[int, int, int]) -> bool:
        def sizes_of(images: torch.Tensor) -> list[int]:
            sizes = []

            def visit(exit_index: int, logits: torch.Tensor) -> torch.Tensor | None:
                sizes.append(len(logits))
                rows = torch.arange(1, len(logits), device=logits.device)
                return rows if exit_index < self.num_exits - 1 else None

            self.walk(images, visit)
            return sizes

        self.shrinks = True
        try:
            sizes = on_shapes(self, input_size, sizes_of)
        except Exception:  # any error that a smaller batch raises in the deeper layers
            return False
        return sizes == [max(BATCH - k, 1) for k in range(self.num_exits)]

    @property
    def default_cfg(self) -> dict[str, Any]:
        """Alias of ``pretrained_cfg``, timm's older name for it."""
        return self.pretrained_cfg

    @property
    def num_exits(self) -> int:
        return len(self.heads) + 1

    @property
    def _hides_channels(self) -> bool:
        """Whether the deeper layers read zeros for a part of the channels, unlike those of the backbone alone."""
        return changes_values(self.referencing, self.beta)

    def walk(
        self,
        x: torch.Tensor,
        visit: Visitor,
        exits: Collection[int] | None = None,
        read: Reader | None = None,
    ) -> list[torch.Tensor]:
        if isinstance(x, Mapping):
            raise ValueError(
                f"x is a {type(x).__name__}; exits are not supported for NaFlex patches. Give images "
                f"(B, {self.in_chans}, H, W)."
            )
        visit, exits, deepest = self.visits(visit, exits)
        if self.grad_checkpointing and torch.is_grad_enabled():
            refuse_reentrant()
        read = read or self.answer
        last = self.num_exits - 1
        state: list[torch.Tensor] = []
        active = ActiveSamples()
        active_rows: torch.Tensor | None = None  # rows of the active samples in a batch that cannot shrink
        points = 0

        def at_exit(k: int, feature: torch.Tensor):  # torch.compile before 2.11 takes no return type with |
            nonlocal active_rows, points
            if k != points:
                raise self._missed(points)
            points += 1
            if k > deepest:  # a trace or an export cannot stop early; it drops layers whose outputs are not used
                return feature, None
            state[:] = [feature]
            onward, exit_feature = self.split(k, feature)
            rows = None
            if k in exits:
                rows = visit(k, read(k, exit_feature if active_rows is None else take(exit_feature, active_rows)))
                if rows is not None and rows.numel() == 0:
                    raise Stop
            if k == deepest and not torch.jit.is_tracing() and not torch.compiler.is_exporting():
                raise Stop
            if rows is None:
                return onward, None
            if self.shrinks:
                active.keep(feature.shape[0], rows)
                return take(onward, rows), rows
            active_rows = rows if active_rows is None else active_rows[rows]
            return onward, None

        try:
            with self.forward_state.running(at_exit, active):
                feature = active.select(self.backbone.forward_features(x))
        except Stop:
            return state
        if points < len(self.heads):
            raise self._missed(points)
        if deepest == last:
            state[:] = [feature]
        if last in exits:
            logits = read(last, feature)
            visit(last, logits if active_rows is None else logits[active_rows])
        return state

    def _missed(self, exit_index: int) -> ValueError:
        missed = (
            f"This forward pass of {type(self.backbone).__name__} did not reach the exit point "
            f"{self.exit_points[exit_index]} in its turn, so that logits would be wrong. "
        )
        if self.grad_checkpointing and torch.is_grad_enabled():  # compiled code leaves it, and passes by the hooks
            return ValueError(
                f"{missed}Gradient checkpointing of a wrapped backbone does not work in compiled code: train without "
                "--torchcompile, or without --grad-checkpointing."
            )
        layer = last_called(self.get_submodule(self.exit_points[exit_index]))
        if not is_tapped(layer):
            return ValueError(
                f"{missed}Its {type(layer).__name__} was put in after the exit was attached, as train.py's --split-bn "
                "and --sync-bn do with every batch norm: choose other modules for the exits, or leave these options "
                "out; in Python, replace layers of the backbone before it gets exits."
            )
        return ValueError(
            f"{missed}If modules of the backbone "
            "are compiled on their own (module.compile()), which skips exit points, compile the whole network instead "
            "(torch.compile(model)); else choose other modules for the exits."
        )

    def _replay(self, exit_index: int, feature: torch.Tensor) -> tuple[Onward, None]:
        """Repeat the computation at an exit point, as gradient checkpointing requires in the backward pass."""
        onward, exit_feature = self.split(exit_index, feature)
        self.heads[exit_index](exit_feature)
        return onward, None

    def answer(self, exit_index: int, feature: torch.Tensor) -> torch.Tensor:
        if exit_index < len(self.heads):
            return self.heads[exit_index](feature)
        return self.backbone.forward_head(feature)

    def pool_and_answer(self, exit_index: int, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if exit_index < len(self.heads):
            return super().pool_and_answer(exit_index, feature)
        return self.backbone.forward_head(feature, pre_logits=True), self.backbone.forward_head(feature)

    def pooled_widths(self) -> list[int]:
        return [*super().pooled_widths(), getattr(self.backbone, "head_hidden_size", self.backbone.num_features)]

    def head_parameters(self, exit_index: int) -> Iterator[nn.Parameter]:
        if exit_index < len(self.heads):
            yield from super().head_parameters(exit_index)
        else:
            for classifier in self.get_classifier()[len(self.heads) :]:
                yield from classifier.parameters()

    pool_type = None  # the backbone defines its own pooling

    # timm's model interface.

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Logits: of all exits in training mode, of the last exit in eval mode, see :meth:`MultiExitModel.forward`.

        In eval mode they are the backbone's own, unless exits are chained or referencing is off.

        Args:
            x: Images (B, in_chans, H, W).
        """
        return super().forward(x) if self.training or self.is_chained or self._hides_channels else self.backbone(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        if self._hides_channels:
            return self.walk(x, lambda *_: None, exits=())[0]
        return self.backbone.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        self._check_forward_head(pre_logits)
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own ``forward_intermediates``.

        Raises:
            ValueError: If referencing is off: this network's features are not the backbone's.
        """
        if self._hides_channels:
            raise ValueError(
                "referencing is 'off', so that the deeper layers read zeros for a part of the channels, which the "
                "backbone's forward_intermediates does not; call forward_features for the last exit's feature."
            )
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    def get_classifier(self) -> Classifiers:
        own = self.backbone.get_classifier()
        return Classifiers([*super().get_classifier(), *(own if isinstance(own, (tuple, list)) else (own,))])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        check_num_classes(num_classes)
        self._check_every_exit_is_trained()
        with self._keeping_changes():
            self.backbone.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))
        super().reset_classifier(num_classes)  # without the pooling, which is the backbone's
        if global_pool is None:
            return
        for module in self.heads.modules():
            if isinstance(module, PoolTokens):
                module.follow(global_pool)
        if not isinstance(self.backbone, WithClassifier):  # which has one pooling only
            self._given_args["global_pool"] = global_pool

    @property
    def set_input_size(self) -> Callable[..., None]:
        """The backbone's own ``set_input_size``, which changes the image size; only where there is one, as in timm."""
        if not hasattr(self.backbone, "set_input_size"):
            raise AttributeError(f"{type(self.backbone).__name__} has no set_input_size.")
        return self._set_input_size

    @property
    def _traits(self) -> dict[str, Any]:
        """The image size for which timm built the backbone, and whether it takes others; timm saves both."""
        traits = getattr(self._timm_model, "_traits", {})
        return {key: value for key, value in traits.items() if key != "first_conv"}  # pretrained_cfg has it by our name

    @property
    def built_for(self) -> tuple[tuple[int, int], ...]:
        sizes = (self._traits.get("img_size"), _built_size(self.backbone))
        return tuple(dict.fromkeys(to_2tuple(size) for size in sizes if size is not None))

    @property
    def _timm_model(self) -> nn.Module:
        return self.backbone.encoder if isinstance(self.backbone, WithClassifier) else self.backbone

    @contextmanager
    def _keeping_changes(self) -> Iterator[None]:
        """Keep what timm notes on the backbone of a change, which rebuilding this model needs."""
        before = dict(getattr(self._timm_model, "_model_args", {}))
        yield
        noted = getattr(self._timm_model, "_model_args", {})
        for key in before.keys() - noted.keys():
            self._given_args.pop(key, None)
        self._given_args.update((key, value) for key, value in noted.items() if value != before.get(key))

    def _set_input_size(self, *args: Any, **kwargs: Any) -> None:
        before = self._sizes()
        with self._keeping_changes():
            self.backbone.set_input_size(*args, **kwargs)
        size = self._traits.get("img_size") or _image_size(self.backbone)
        self.pretrained_cfg["input_size"] = (self.pretrained_cfg["input_size"][0], *size)
        if self._sizes() != before:
            self.drop_presets(self.presets, "the input size they were fitted to was changed")

    def _sizes(self) -> dict[str, Any]:
        """What ``set_input_size`` changes: the size of images, and of patches and windows where they were set."""
        return dict(self._given_args, img_size=self.pretrained_cfg["input_size"])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            refuse_reentrant()
        self.backbone.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """The backbone's parameter groups, with the heads in the last one."""
        return below("backbone", self.backbone.group_matcher(coarse=coarse))

    def no_weight_decay(self) -> set[str]:
        own: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in own}


def _image_size(backbone: nn.Module) -> tuple[int, int]:
    """Image size (height, width) that the backbone was built for, else that of its pretrained config."""
    return to_2tuple(_built_size(backbone) or backbone.pretrained_cfg["input_size"][1:])


def _built_size(backbone: nn.Module) -> int | tuple[int, int] | None:
    sizes = (getattr(module, "img_size", None) for module in backbone.modules())
    return next((size for size in sizes if size is not None), None)


def _check_backbone(backbone: nn.Module) -> None:
    kind = type(backbone).__name__
    if isinstance(backbone, MultiExitModel):
        raise ValueError(f"{kind} has exits already; give a backbone without exits.")
    if isinstance(backbone, nn.Module) and is_tapped(backbone):
        raise ValueError(f"{kind} has exits already: it is the backbone of a MultiExit; give another instance.")
    if isinstance(backbone, torch.jit.ScriptModule):
        raise ValueError(f"{kind} is scripted, which fixes its code; give the model before torch.jit.")
    if isinstance(backbone, torch._dynamo.OptimizedModule):
        raise ValueError("The backbone is compiled; give the model before torch.compile, then compile the MultiExit.")
    wanted = ["forward_features", "forward_head", "num_classes", "pretrained_cfg"]
    if not is_encoder(backbone):
        wanted += ["get_classifier", "reset_classifier"]
    missing = [name for name in wanted if not hasattr(backbone, name)]
    if missing:
        raise ValueError(
            f"{kind} has no {', '.join(missing)}, so it is not a timm model; create one with timm.create_model."
        )
