"""Any backbone of timm's with exits."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import nn

from ..base.evaluating import BATCH, without_data
from ..base.heads import Classifiers, check_num_classes
from ..base.model import MultiExitModel, Reader, Visitor, refuse_reentrant
from ..base.partition import Onward, Partition
from ..base.rows import take
from .exit_points import choose, probe
from .families import family_of
from .feature_heads import PoolTokens, feature_head
from .remaining import Remaining
from .taps import CatchUp, MakeWhole, Stop, Tap, Visit, is_tapped, last_called
from .with_classifier import WithClassifier, below, is_encoder


class MultiExit(MultiExitModel):
    """A backbone of timm's with partitioned early exits; its own end is the last exit.

    The backbone stays whole, with its weights and its code: exits tap the outputs of its modules. In eval mode
    ``forward`` is the backbone's own. Encoders without a classifier get one: :class:`timm_dfs.encoders.WithClassifier`.

    Args:
        backbone: A model of timm's, with its weights.
        exits: How many exits, the last included, evenly spread over the backbone's stages; or the names of the modules
            after which the early exits go, shallow to deep.
        beta: Partition ratio in [0, 1]; ``None`` for joint training.
        referencing: ``"two_sided"``, ``"one_sided"`` or ``"off"``.
        head: ``"auto"``, ``"linear"`` or ``"conv"``, see :func:`timm_dfs.feature_heads.feature_head`.
        drop_rate: Dropout before the early exits' classifiers.
        presets: Named operating points fitted to these weights.

    Raises:
        ValueError: If the backbone is none of timm's or has exits already, an exit cannot be where it is wanted, or
            another value is outside what is said above.
    """

    def __init__(
        self,
        backbone: nn.Module,
        exits: int | Sequence[str] = 4,
        beta: float | None = 0.5,
        referencing: str = "two_sided",
        head: str = "auto",
        drop_rate: float = 0.0,
        presets: dict[str, dict] | None = None,
    ):
        _check_backbone(backbone)
        if is_encoder(backbone):
            backbone = WithClassifier(backbone)
        traits: Any = backbone  # timm's models have no class in common
        in_chans = getattr(backbone, "in_chans", None) or traits.pretrained_cfg["input_size"][0]
        super().__init__(traits.num_classes, in_chans, drop_rate, beta, referencing, presets)
        size = (in_chans, *_image_size(backbone))
        points = probe(backbone, choose(backbone, exits), size)
        parameter = next(backbone.parameters())
        self.backbone = traits
        self.pretrained_cfg = dict(traits.pretrained_cfg)
        self.pretrained_cfg["input_size"] = (self.pretrained_cfg["input_size"][0], *size[1:])
        self.heads = nn.ModuleList(
            feature_head(
                head,
                point,
                self.num_classes,
                getattr(backbone, "num_prefix_tokens", 0),
                getattr(backbone, "global_pool", "avg"),
                drop_rate,
                parameter.device,
                parameter.dtype,
            )
            for point in points
        )
        self.partitions = nn.ModuleList(Partition(point.channels, beta, referencing, point.dim) for point in points)
        self.feature_info = [
            dict(module=f"backbone.{point.module}", num_chs=point.channels, reduction=point.reduction)
            for point in points
        ]
        self.visit = Visit(self._replay)
        modules = dict(backbone.named_modules())
        family = family_of(backbone)
        for k, point in enumerate(points):
            last_called(modules[point.module]).register_forward_hook(Tap(k, self.visit, family.element))
        for name in family.catch_up(backbone):
            modules[name].register_forward_pre_hook(CatchUp(self.visit), with_kwargs=True)
        for name in family.whole(backbone):
            modules[name].register_forward_hook(MakeWhole(self.visit))
        self.output_fmt = getattr(backbone, "output_fmt", "NCHW")
        self.num_features = traits.num_features
        self.head_hidden_size = self.pooled_widths()[-1]
        self.training = backbone.training  # the backbone's modules keep their own modes
        self.heads.train(self.training)
        self.shrinks = self._can_shrink(size)

    backbone: Any

    shrinks: bool
    """Whether the batch can get smaller on the way. Where it cannot, because something goes past an exit point or the
    batch's size is remembered, samples that have left are computed on."""

    def _can_shrink(self, input_size: tuple[int, int, int]) -> bool:
        self.shrinks = True
        sizes: list[int] = []

        def visit(exit_index: int, logits: torch.Tensor) -> torch.Tensor | None:
            sizes.append(len(logits))
            return torch.arange(1, len(logits)) if exit_index < self.num_exits - 1 else None

        try:
            with without_data(self, input_size) as images:
                self.walk(images, visit)
        except Exception:  # whatever a batch of another size makes the rest of the network stumble over
            return False
        return sizes == [max(BATCH - k, 1) for k in range(self.num_exits)]

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's older name of ``pretrained_cfg``."""
        return self.pretrained_cfg

    @property
    def num_exits(self) -> int:
        return len(self.heads) + 1

    def walk(
        self,
        x: torch.Tensor,
        visit: Visitor,
        exits: Collection[int] | None = None,
        read: Reader | None = None,
    ) -> list[torch.Tensor]:
        exits, deepest = self.exits_to_visit(exits)
        if self.grad_checkpointing and torch.is_grad_enabled():
            refuse_reentrant()
        read = read or self.answer
        last = self.num_exits - 1
        state: list[torch.Tensor] = []
        here: torch.Tensor | None = None  # rows that have not left a batch that cannot get smaller
        remaining = Remaining()
        points = 0

        def arrive(k: int, feature: torch.Tensor) -> tuple[Onward, torch.Tensor | None]:
            nonlocal here, points
            points += 1
            if k > deepest:  # tracing and export cannot stop on the way; they drop what nothing came of
                return feature, None
            state[:] = [feature]
            onward, exit_feature = self.split(k, feature)
            rows = None
            if k in exits:
                rows = visit(k, read(k, exit_feature if here is None else take(exit_feature, here)))
                if rows is not None and rows.numel() == 0:
                    raise Stop
            if k == deepest and not torch.jit.is_tracing() and not torch.compiler.is_exporting():
                raise Stop
            if rows is None:
                return onward, None
            if self.shrinks:
                remaining.leave(feature.shape[0], rows)
                return take(onward, rows), rows
            here = rows if here is None else here[rows]
            return onward, None

        try:
            with self.visit.by(arrive, remaining):
                feature = remaining.catch_up(self.backbone.forward_features(x))
        except Stop:
            return state
        if points < len(self.heads):
            raise RuntimeError(
                f"This forward pass of {type(self.backbone).__name__} called {points} of {len(self.heads)} exit "
                "points; the others' answers would be missing. Take other modules as exits."
            )
        if deepest == last:
            state[:] = [feature]
        if last in exits:
            logits = read(last, feature)
            visit(last, logits if here is None else logits[here])
        return state

    def _replay(self, exit_index: int, feature: torch.Tensor) -> tuple[Onward, None]:
        """What happened at an exit point in training, for gradient checkpointing, which does it again."""
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

    def head_parameters(self) -> Iterator[nn.Parameter]:
        yield from super().head_parameters()
        for classifier in self.get_classifier()[len(self.heads) :]:
            yield from classifier.parameters()

    pool_type = None  # the backbone's own affair

    # timm's verbs.

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return super().forward(x) if self.training else self.backbone(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone.forward_features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    def get_classifier(self) -> Classifiers:
        own = self.backbone.get_classifier()
        return Classifiers([*super().get_classifier(), *(own if isinstance(own, (tuple, list)) else (own,))])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        check_num_classes(num_classes)
        self.backbone.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))
        super().reset_classifier(num_classes)
        for module in self.heads.modules():
            if isinstance(module, PoolTokens) and global_pool is not None:
                module.follow(global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            refuse_reentrant()
        self.backbone.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """The backbone's groups; heads are in the last one."""
        return below("backbone", self.backbone.group_matcher(coarse=coarse))

    def no_weight_decay(self) -> set[str]:
        own: set[str] = getattr(self.backbone, "no_weight_decay", set)()
        return {f"backbone.{name}" for name in own}


def _image_size(backbone: nn.Module) -> tuple[int, int]:
    """What the backbone was built for, or its pretrained config's."""
    sizes = (getattr(module, "img_size", None) for module in backbone.modules())
    return to_2tuple(next((size for size in sizes if size is not None), backbone.pretrained_cfg["input_size"][1:]))


def _check_backbone(backbone: nn.Module) -> None:
    kind = type(backbone).__name__
    if isinstance(backbone, MultiExitModel):
        raise ValueError(f"{kind} has exits already; give the backbone alone.")
    if isinstance(backbone, nn.Module) and is_tapped(backbone):
        raise ValueError(f"{kind} has exits already: it is the backbone of a MultiExit; give another instance.")
    if isinstance(backbone, torch.jit.ScriptModule):
        raise ValueError(f"{kind} is scripted, which fixes its code; give the model before torch.jit.")
    wanted = ["forward_features", "forward_head", "num_classes", "pretrained_cfg"]
    if not is_encoder(backbone):
        wanted += ["get_classifier", "reset_classifier"]
    missing = [name for name in wanted if not hasattr(backbone, name)]
    if missing:
        raise ValueError(
            f"{kind} has no {', '.join(missing)}, so it is no model of timm's; make it with timm.create_model."
        )
