"""Where exits can go in a backbone of timm's, and what every family's feature looks like there."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .taps import last_called

BATCH = 7  # of what is tried without data; prime, so that no other axis is taken for it


@dataclass(frozen=True)
class ExitPoint:
    """A module after which an exit can be attached.

    Attributes:
        module: Its name in the backbone.
        channels: Size of its output along the channel axis.
        layout: ``"NCHW"``, ``"NHWC"``, ``"NLC"`` (tokens) or ``"NCL"``.
        reduction: Size of the image over that of the feature; 0 where that says nothing.
    """

    module: str
    channels: int
    layout: str
    reduction: int = 0

    @property
    def dim(self) -> int:
        """The channel axis."""
        return 1 if self.layout in ("NCHW", "NCL") else -1


def _last_of_each(container: str) -> Callable[[nn.Module], list[str]]:
    """The last module of each numbered list, e.g. of ``blocks.0``, whose lists are never called themselves."""

    def find(backbone: nn.Module) -> list[str]:
        lists = [(name, list(module)) for name, module in backbone.named_modules() if re.fullmatch(container, name)]
        return [f"{name}.{len(modules) - 1}" for name, modules in lists if modules]

    return find


def _named(pattern: str) -> Callable[[nn.Module], list[str]]:
    """The modules whose name matches."""
    return lambda backbone: [name for name, _ in backbone.named_modules() if re.fullmatch(pattern, name)]


STAGES: dict[str, Callable[[nn.Module], list[str]]] = {
    "coat": _last_of_each(r"serial_blocks\d"),
    "gemma4_vit": _named(r"encoder\.blocks\.\d+"),
    "hrnet": _named(r"layer1|stage[234]"),
    "mvitv2": _named(r"stages\.\d+"),
    "nasnet": _named(r"cell_stem_1|cell_5|cell_11|cell_17"),
    "pnasnet": _named(r"cell_stem_1|cell_3|cell_7|cell_11"),
    "twins": _last_of_each(r"blocks\.\d+"),
    "xception": _named(r"block\d+"),
    "xception_aligned": _named(r"blocks\.\d+"),
}
"""By timm's module, where stages end, for families whose ``feature_info`` names what is never called, or a place inside
a block that a skip connection crosses."""

ELEMENT = {"crossvit": -1, "efficientvim": 1, "hrnet": -1, "tnt": 1}
"""By timm's module, which of several outputs is the feature: the coarsest scale, what the next stage reads, the
patches. Elsewhere the first."""


CATCH_UP: dict[str, Callable[[nn.Module], list[str]]] = {
    "coat": _named(r"patch_embed\d|cpe\d|parallel_blocks\.\d+"),
    "gemma4_vit": _named(r"encoder\.blocks\.\d+|encoder\.pooler"),
    "nasnet": _named(r"cell_\w+|reduction_cell_\d"),
    "pnasnet": _named(r"cell_\w+"),
    "twins": _named(r"patch_embeds\.\d+"),
}
"""By timm's module, what is given, beside the feature, something made before the last exit point: what an earlier cell
put out, rotary tables; or a feature that was made whole."""

WHOLE: dict[str, Callable[[nn.Module], list[str]]] = {
    "coat": _last_of_each(r"serial_blocks\d"),
    "deepseek_vit": _named(r"encoder\.norm"),
    "qwen3_vit": _last_of_each(r"encoder\.blocks"),
    "twins": _last_of_each(r"blocks\.\d+"),
}
"""By timm's module, after what the network reshapes to the batch size that it noted at its beginning."""


def family(backbone: nn.Module) -> str:
    """timm's name of the module that defines the backbone."""
    return type(getattr(backbone, "encoder", backbone)).__module__.rpartition(".")[2]


def stages(backbone: nn.Module) -> list[str]:
    """Names of the modules that end the backbone's feature stages, shallow to deep."""
    if family(backbone) in STAGES:
        return STAGES[family(backbone)](backbone)
    info = getattr(backbone, "feature_info", None)
    entries = list(info) if info is not None else []  # FeatureInfo or a list of dicts
    return list(dict.fromkeys(entry["module"] for entry in entries if entry.get("module")))


def spread(names: Sequence[str], exits: int) -> list[str]:
    """The early exit points of ``exits`` exits, evenly spread over stages of which the last is the last exit's."""
    return [names[math.ceil(len(names) * (k + 1) / exits) - 1] for k in range(exits - 1)]


def choose(backbone: nn.Module, exits: int | Sequence[str]) -> list[str]:
    """Names of the modules after which the early exits go.

    Args:
        backbone: A model of timm's.
        exits: How many exits, the last included, or the early exits' modules.

    Raises:
        ValueError: If there are not so many points, or a name is wrong.
    """
    names = stages(backbone)
    kind = type(backbone).__name__
    if isinstance(exits, int) and not isinstance(exits, bool):
        if exits < 2:
            raise ValueError(f"exits is {exits}; give at least 2, the last included.")
        if not names:
            raise ValueError(f"{kind} does not say where its stages end; give the names of modules as exits.")
        if exits > len(names):
            raise ValueError(
                f"exits is {exits}, but {kind} has {len(names)} stages ({', '.join(names)}); give at most so many, or "
                "the names of modules."
            )
        return spread(names, exits)
    if isinstance(exits, str) or not isinstance(exits, Sequence) or not all(isinstance(name, str) for name in exits):
        raise ValueError(f"exits is {exits!r}; give how many, or the names of the modules after which they go.")
    if not exits:
        raise ValueError("exits is empty; give at least one module after which an early exit goes.")
    modules = dict(backbone.named_modules())
    unknown = [name for name in exits if name not in modules or not name]
    if unknown:
        raise ValueError(
            f"{kind} has no module {', '.join(unknown)} for an exit. Its stages end with {', '.join(names)}; other "
            f"modules have names such as {', '.join(list(modules)[1:6])}."
        )
    if len({last_called(modules[name]) for name in exits}) < len(exits):
        raise ValueError(f"exits is {tuple(exits)}, with one place twice; give every module once.")
    return list(exits)


class _Probe:
    """Forward hook that notes what a module puts out."""

    def __init__(self, name: str, element: int, seen: list[tuple[str, torch.Size]]):
        self.name, self.element, self.seen = name, element, seen

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        feature = output[self.element] if isinstance(output, (list, tuple)) and output else output
        if not isinstance(feature, torch.Tensor):
            raise ValueError(f"{self.name} puts out a {type(feature).__name__}, not a tensor; take another module.")
        self.seen.append((self.name, feature.shape))


def probe(backbone: nn.Module, names: Sequence[str], input_size: Sequence[int]) -> list[ExitPoint]:
    """What an image's feature looks like at each of these modules, found by a forward pass without data.

    Args:
        backbone: A model of timm's.
        names: Modules after which early exits are to go, shallow to deep.
        input_size: (channels, height, width) of an image.

    Raises:
        ValueError: If a module is not an exit point: never called, called twice, out of order, or no tensor.
    """
    kind = type(backbone).__name__
    seen = _run(backbone, names, input_size)
    order = [name for name, _ in seen]
    wrong = [f"{name} ({order.count(name)} times)" for name in names if order.count(name) != 1]
    if wrong:
        raise ValueError(f"A forward pass of {kind} calls {', '.join(wrong)}; exits go after modules called once.")
    if order != list(names):
        raise ValueError(f"exits is {tuple(names)}, but {kind} gets to them in the order {tuple(order)}; give that.")
    unbatched = [name for name, shape in seen if shape[0] != BATCH]
    if unbatched:
        raise ValueError(f"The first axis of {', '.join(unbatched)} of {kind} is not the batch; take other modules.")
    told = family(backbone) not in STAGES and family(backbone) not in ELEMENT  # else it is of something else
    info = list(getattr(backbone, "feature_info", None) or []) if told else []
    known = {entry["module"]: entry["num_chs"] for entry in info if entry.get("module")}
    return [_describe(backbone, name, shape, known, input_size) for name, shape in seen]


@contextmanager
def without_data(backbone: nn.Module, input_size: Sequence[int]) -> Iterator[torch.Tensor]:
    """Evaluate on a batch of images that has a shape only; nothing is computed, and what modules note is undone."""
    parameter = next(backbone.parameters())
    before = [(module.__dict__, module.__dict__.copy(), _copies(module)) for module in backbone.modules()]
    backbone.eval()
    _LOG.addFilter(_never)  # what does not fit is told by an error, and logged on the way
    try:
        # Parameters on the meta device are without data as they are, and much faster so.
        shapes_only = nullcontext() if parameter.is_meta else FakeTensorMode(allow_non_fake_inputs=True)
        with shapes_only, torch.no_grad():
            yield torch.empty(BATCH, *input_size, device=parameter.device, dtype=parameter.dtype)
    finally:
        _LOG.removeFilter(_never)
        for attributes, values, tables in before:
            attributes.clear()
            attributes.update(values)
            for table, entries in tables:
                table.clear()
                table.update(entries)


def _copies(module: nn.Module) -> list[tuple[dict, dict]]:
    """A module's buffers and other tables, where some keep what they computed for the last size, and their entries."""
    return [(value, value.copy()) for value in module.__dict__.values() if isinstance(value, dict)]


_LOG = logging.getLogger("torch._subclasses.fake_tensor")


def _never(record: logging.LogRecord) -> bool:
    return False


def _run(backbone: nn.Module, names: Sequence[str], input_size: Sequence[int]) -> list[tuple[str, torch.Size]]:
    """Shapes at the exit points, in the order in which a forward pass gets to them."""
    seen: list[tuple[str, torch.Size]] = []
    modules = dict(backbone.named_modules())
    element = ELEMENT.get(family(backbone), 0)
    handles = [modules[name].register_forward_hook(_Probe(name, element, seen)) for name in names]
    try:
        with without_data(backbone, input_size) as images:
            backbone.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _describe(
    backbone: nn.Module, name: str, shape: torch.Size, known: dict[str, int], input_size: Sequence[int]
) -> ExitPoint:
    channels_last = getattr(backbone, "output_fmt", "NCHW") in ("NHWC", "NLC")
    layout = {4: "NHWC" if channels_last else "NCHW", 3: "NLC"}.get(len(shape))
    if name in known:
        channels = known[name]
        matching = [kind for kind in _LAYOUTS.get(len(shape), {}) if shape[_LAYOUTS[len(shape)][kind]] == channels]
        if layout not in matching:
            layout = matching[0] if matching else None
    if layout is None:
        raise ValueError(f"{name} of {type(backbone).__name__} puts out {tuple(shape)}, in no layout known for exits.")
    channels = shape[_LAYOUTS[len(shape)][layout]]
    height = {"NCHW": 2, "NHWC": 1}.get(layout)
    return ExitPoint(name, channels, layout, input_size[1] // shape[height] if height else 0)


_LAYOUTS = {4: {"NCHW": 1, "NHWC": -1}, 3: {"NLC": -1, "NCL": 1}}
