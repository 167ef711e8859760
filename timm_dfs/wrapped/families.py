"""Facts about families of timm's backbones that timm does not provide: one record for each family."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

Finder = Callable[[nn.Module], list[str]]
"""Function from a backbone to names of its modules."""


def nothing(backbone: nn.Module) -> list[str]:
    """No module."""
    return []


def named(pattern: str) -> Finder:
    """Finder of the modules whose whole name matches a regular expression."""
    return lambda backbone: [name for name, _ in backbone.named_modules() if re.fullmatch(pattern, name)]


def last_of_each(pattern: str) -> Finder:
    """Finder of the last module of each ``ModuleList`` whose name matches; the list itself is never called."""

    def find(backbone: nn.Module) -> list[str]:
        lists = [(name, list(module)) for name, module in backbone.named_modules() if re.fullmatch(pattern, name)]
        return [f"{name}.{len(modules) - 1}" for name, modules in lists if modules]

    return find


@dataclass(frozen=True)
class Family:
    """Facts about the backbones that one of timm's modules defines.

    Attributes:
        stages: Modules at which the feature stages end, shallow to deep. ``None``: those of timm's ``feature_info``.
            Given where ``feature_info`` names a module that is never called, or a place inside a block that a skip
            connection crosses.
        element: Index of the feature where a module at an exit point returns several tensors.
        catch_up: Modules that read, besides the feature, a tensor made before the last exit point (an earlier cell's
            output, a rotary table). Rows of samples that have left are removed from their inputs.
        whole: Modules after which the network reshapes to the batch size that it saw at its input. Their output is
            extended to that size.
    """

    stages: Finder | None = None
    element: int = 0
    catch_up: Finder = nothing
    whole: Finder = nothing


FAMILIES = {
    "coat": Family(
        stages=last_of_each(r"serial_blocks\d"),
        catch_up=named(r"patch_embed\d|cpe\d|parallel_blocks\.\d+"),
        whole=last_of_each(r"serial_blocks\d"),
    ),
    "crossvit": Family(element=-1),  # the branch with the coarser patches
    "deepseek_vit": Family(whole=named(r"encoder\.norm")),
    "efficientvim": Family(element=1),  # the tensor that the next stage reads
    "gemma4_vit": Family(
        stages=named(r"encoder\.blocks\.\d+"), catch_up=named(r"encoder\.blocks\.\d+|encoder\.pooler")
    ),
    "hrnet": Family(stages=named(r"layer1|stage[234]"), element=-1),  # the coarsest scale
    "mvitv2": Family(stages=named(r"stages\.\d+")),
    "nasnet": Family(
        stages=named(r"cell_stem_1|cell_5|cell_11|cell_17"), catch_up=named(r"cell_\w+|reduction_cell_\d")
    ),
    "pnasnet": Family(stages=named(r"cell_stem_1|cell_3|cell_7|cell_11"), catch_up=named(r"cell_\w+")),
    "qwen3_vit": Family(whole=last_of_each(r"encoder\.blocks")),
    "tnt": Family(element=1),  # patches, not the pixels inside them
    "twins": Family(
        stages=last_of_each(r"blocks\.\d+"),
        catch_up=named(r"patch_embeds\.\d+"),
        whole=last_of_each(r"blocks\.\d+"),
    ),
    "xception": Family(stages=named(r"block\d+")),
    "xception_aligned": Family(stages=named(r"blocks\.\d+")),
}
"""Records by timm's module name, for families that need one."""


def family_name(backbone: nn.Module) -> str:
    """Name of the module of ``timm.models`` that defines the backbone."""
    return type(getattr(backbone, "encoder", backbone)).__module__.rpartition(".")[2]


def family_of(backbone: nn.Module) -> Family:
    """Record of the backbone's family; all defaults where none is needed."""
    return FAMILIES.get(family_name(backbone), Family())
