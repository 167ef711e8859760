"""Exit points of a timm backbone: the modules after which exits can be attached, and the features there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base.evaluating import BATCH, on_shapes
from .families import family_of
from .taps import last_called

_LAYOUTS = {4: {"NCHW": 1, "NHWC": -1}, 3: {"NLC": -1, "NCL": 1}}
"""Channel axis of each layout, by the number of axes."""


@dataclass(frozen=True)
class ExitPoint:
    """A module after which an exit can be attached.

    Attributes:
        module: Its name in the backbone.
        channels: Size of its output along the channel axis.
        layout: ``"NCHW"``, ``"NHWC"``, ``"NLC"`` (tokens) or ``"NCL"``.
        reduction: Height of the image over that of the feature; 0 for tokens.
        prefix_tokens: Number of class and register tokens before the image's tokens.
    """

    module: str
    channels: int
    layout: str
    reduction: int = 0
    prefix_tokens: int = 0

    @property
    def dim(self) -> int:
        """The channel axis."""
        return 1 if self.layout in ("NCHW", "NCL") else -1


def stages(backbone: nn.Module) -> list[str]:
    """Names of the modules that end the backbone's feature stages, shallow to deep."""
    find = family_of(backbone).stages
    if find is not None:
        return find(backbone)
    info = getattr(backbone, "feature_info", None)
    entries = list(info) if info is not None else []  # FeatureInfo or a list of dicts
    return list(dict.fromkeys(entry["module"] for entry in entries if entry.get("module")))


def spread(names: Sequence[str], exits: int) -> list[str]:
    """Names of the stages after which ``exits`` - 1 early exits go, evenly spread; the last stage has the last exit."""
    return [names[math.ceil(len(names) * (k + 1) / exits) - 1] for k in range(exits - 1)]


def choose(backbone: nn.Module, exits: int | Sequence[str]) -> list[str]:
    """Names of the modules after which the early exits go.

    Args:
        backbone: A timm model.
        exits: Number of exits, the last included, or the names of the early exits' modules.

    Raises:
        ValueError: If the backbone has fewer stages, or a name is wrong.
    """
    names = stages(backbone)
    kind = type(backbone).__name__
    if isinstance(exits, int) and not isinstance(exits, bool):
        if exits < 2:
            raise ValueError(f"exits is {exits}; give at least 2, the last included.")
        if not names:
            raise ValueError(f"{kind} has no feature_info that names its stages; give the names of modules as exits.")
        if exits > len(names):
            raise ValueError(
                f"exits is {exits}, but {kind} has {len(names)} stages ({', '.join(names)}); give at most "
                f"{len(names)}, or the names of modules."
            )
        return spread(names, exits)
    if isinstance(exits, str) or not isinstance(exits, Sequence) or not all(isinstance(name, str) for name in exits):
        raise ValueError(f"exits is {exits!r}; give the number of exits, or the names of the early exits' modules.")
    if not exits:
        raise ValueError("exits is empty; give at least one module after which an early exit goes.")
    modules = dict(backbone.named_modules())
    unknown = [name for name in exits if name not in modules or not name]
    if unknown:
        raise ValueError(
            f"{kind} has no module {', '.join(unknown)} for an exit. Its stages end with {', '.join(names)}; other "
            f"modules are named {', '.join(list(modules)[1:6])} …"
        )
    if len({last_called(modules[name]) for name in exits}) < len(exits):
        raise ValueError(f"exits is {tuple(exits)}, which names one exit point twice; give every module once.")
    return list(exits)


class _Probe:
    """Forward hook that records the shape of a module's output."""

    def __init__(self, name: str, element: int, seen: list[tuple[str, torch.Size]]):
        self.name, self.element, self.seen = name, element, seen

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        feature = output[self.element] if isinstance(output, (list, tuple)) and output else output
        if not isinstance(feature, torch.Tensor):
            raise ValueError(f"{self.name} returns a {type(feature).__name__}, not a tensor; give another module.")
        self.seen.append((self.name, feature.shape))


def probe(backbone: nn.Module, names: Sequence[str], input_size: Sequence[int]) -> list[ExitPoint]:
    """Exit points at these modules, described from a forward pass on shapes alone.

    Args:
        backbone: A timm model.
        names: Modules after which early exits are to go, shallow to deep.
        input_size: (channels, height, width) of an image.

    Raises:
        ValueError: If a module cannot be an exit point: it is never called, called twice, out of order, or its output
            is not a batch of maps or tokens.
    """
    kind = type(backbone).__name__
    seen, final = _run(backbone, names, input_size)
    order = [name for name, _ in seen]
    wrong = [f"{name} ({order.count(name)} times)" for name in names if order.count(name) != 1]
    if wrong:
        raise ValueError(f"A forward pass of {kind} calls {', '.join(wrong)}; exits go after modules called once.")
    if order != list(names):
        raise ValueError(f"exits is {tuple(names)}, but {kind} calls them in the order {tuple(order)}; give that.")
    unbatched = [name for name, shape in seen if shape[0] != BATCH]
    if unbatched:
        raise ValueError(f"The first axis of {', '.join(unbatched)} of {kind} is not the batch; give other modules.")
    family = family_of(backbone)
    described = family.stages is None and family.element == 0  # otherwise feature_info describes other tensors
    info = list(getattr(backbone, "feature_info", None) or []) if described else []
    known = {entry["module"]: entry["num_chs"] for entry in info if entry.get("module")}
    return [
        _describe(backbone, name, shape, known, input_size, _prefix_tokens(backbone, shape, final, input_size))
        for name, shape in seen
    ]


def _run(
    backbone: nn.Module, names: Sequence[str], input_size: Sequence[int]
) -> tuple[list[tuple[str, torch.Size]], torch.Size]:
    """Shapes of the features at the exit points, in the order of the forward pass, and of the last feature."""
    modules = dict(backbone.named_modules())
    element = family_of(backbone).element

    def shapes_of(images: torch.Tensor) -> tuple[list[tuple[str, torch.Size]], torch.Size]:
        seen: list[tuple[str, torch.Size]] = []
        handles = [modules[name].register_forward_hook(_Probe(name, element, seen)) for name in names]
        try:
            feature = backbone.forward_features(images)
        finally:
            for handle in handles:
                handle.remove()
        return seen, getattr(feature, "shape", torch.Size())  # CrossViT returns a list

    return on_shapes(backbone, input_size, shapes_of)


def _is_grid(tokens: int, input_size: Sequence[int]) -> bool:
    """Whether so many tokens can be a grid of patches of an image."""
    height = math.isqrt(tokens * input_size[1] // input_size[2])
    return height > 0 and tokens % height == 0 and height * input_size[2] == tokens // height * input_size[1]


def _prefix_tokens(backbone: nn.Module, shape: torch.Size, final: torch.Size, input_size: Sequence[int]) -> int:
    """Number of prefix tokens in a feature of this shape; 0 before they join the image's tokens, which may be late.

    CaiT's and XCiT's class token joins after all blocks, ConViT's between two of them.
    """
    prefix: int | None = getattr(backbone, "num_prefix_tokens", None)
    if prefix is None:
        known = family_of(backbone).prefix_tokens
        return known if len(shape) == 3 and not _is_grid(shape[1], input_size) else 0
    return 0 if len(shape) == len(final) == 3 and shape[1] + prefix == final[1] else prefix


def _describe(
    backbone: nn.Module,
    name: str,
    shape: torch.Size,
    known: dict[str, int],
    input_size: Sequence[int],
    prefix_tokens: int,
) -> ExitPoint:
    channels_last = getattr(backbone, "output_fmt", "NCHW") in ("NHWC", "NLC")
    if len(shape) == 4:  # a map has the shape of the image, which tells the axes if one order has it
        last, first = (shape[i] * input_size[2] == shape[i + 1] * input_size[1] for i in (1, 2))
        channels_last = last if last != first else channels_last
    layout = {4: "NHWC" if channels_last else "NCHW", 3: "NLC"}.get(len(shape))
    if name in known:
        channels = known[name]
        matching = [kind for kind in _LAYOUTS.get(len(shape), {}) if shape[_LAYOUTS[len(shape)][kind]] == channels]
        if layout not in matching:
            layout = matching[0] if matching else None
    if layout is None:
        raise ValueError(
            f"{name} of {type(backbone).__name__} returns {tuple(shape)}, which is neither a map nor tokens; give "
            "another module."
        )
    channels = shape[_LAYOUTS[len(shape)][layout]]
    height = {"NCHW": 2, "NHWC": 1}.get(layout)
    return ExitPoint(name, channels, layout, input_size[1] // shape[height] if height else 0, prefix_tokens)
