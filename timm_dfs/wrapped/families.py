"""Facts about families of timm backbones that timm does not provide, one record for each family."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from timm.models import is_model_in_modules
from torch import nn

Finder = Callable[[nn.Module], list[str]]
"""Function from a backbone to the names of some of its modules."""


def nothing(backbone: nn.Module) -> list[str]:
    """No module."""
    return []


def named(pattern: str) -> Finder:
    """Finder of the modules whose whole name matches a regular expression."""
    return lambda backbone: [name for name, _ in backbone.named_modules() if re.fullmatch(pattern, name)]


def last_of_each(pattern: str) -> Finder:
    """Finder of the last module of each ``ModuleList`` whose name matches, because hooks on a list never run."""

    def find(backbone: nn.Module) -> list[str]:
        lists = [(name, list(module)) for name, module in backbone.named_modules() if re.fullmatch(pattern, name)]
        return [f"{name}.{len(modules) - 1}" for name, modules in lists if modules]

    return find


@dataclass(frozen=True)
class Family:
    """Facts about the backbones that one module of ``timm.models`` defines.

    Attributes:
        stages: Modules at which the feature stages end, shallow to deep. ``None``: those of timm's ``feature_info``.
            Given where ``feature_info`` names a module that is never called, or a place inside a block that a skip
            connection bypasses.
        element: Index of the feature where a module at an exit point returns several tensors.
        prefix_tokens: Number of class tokens before the image's tokens, where the backbone has no
            ``num_prefix_tokens``.
        takes_drop_rate: Whether its models take ``drop_rate``, which ``train.py`` gives to every model.
        select_active: Modules that read, besides the feature, a tensor made before the last exit point (an earlier
            cell's output, a rotary table). The rows of samples that have exited are removed from their inputs.
        restore_batch: Modules after which the backbone reshapes to the batch size of its input. Their output is
            restored to that size.
    """

    stages: Finder | None = None
    element: int = 0
    prefix_tokens: int = 0
    takes_drop_rate: bool = True
    select_active: Finder = nothing
    restore_batch: Finder = nothing


FAMILIES = {
    "coat": Family(
        stages=last_of_each(r"serial_blocks\d"),
        prefix_tokens=1,
        select_active=named(r"patch_embed\d|cpe\d|parallel_blocks\.\d+"),
        restore_batch=last_of_each(r"serial_blocks\d"),
    ),
    "crossvit": Family(element=-1, prefix_tokens=1),  # the branch with the coarser patches
    "deepseek_vit": Family(restore_batch=named(r"encoder\.norm")),
    "efficientvim": Family(element=1),  # the tensor that the next stage reads
    "gemma4_vit": Family(
        stages=named(r"encoder\.blocks\.\d+"),
        takes_drop_rate=False,
        select_active=named(r"encoder\.blocks\.\d+|encoder\.pooler"),
    ),
    "hrnet": Family(stages=named(r"layer1|stage[234]"), element=-1),  # the coarsest scale
    "mvitv2": Family(stages=named(r"stages\.\d+")),
    "nasnet": Family(
        stages=named(r"cell_stem_1|cell_5|cell_11|cell_17"), select_active=named(r"cell_\w+|reduction_cell_\d")
    ),
    "pnasnet": Family(stages=named(r"cell_stem_1|cell_3|cell_7|cell_11"), select_active=named(r"cell_\w+")),
    "qwen3_vit": Family(restore_batch=last_of_each(r"encoder\.blocks")),
    "tnt": Family(element=1),  # patches, not the pixels inside them
    "twins": Family(
        stages=last_of_each(r"blocks\.\d+"),
        select_active=named(r"patch_embeds\.\d+"),
        restore_batch=last_of_each(r"blocks\.\d+"),
    ),
    "xception": Family(stages=named(r"block\d+")),
    "xception_aligned": Family(stages=named(r"blocks\.\d+")),
}
"""Records of the families that need one, by the name of timm's module."""


def family_name(backbone: nn.Module) -> str:
    """Name of the module of ``timm.models`` that defines the backbone."""
    return type(getattr(backbone, "encoder", backbone)).__module__.rpartition(".")[2]


def takes_drop_rate(name: str) -> bool:
    """Whether timm's model of this name takes ``drop_rate``."""
    return not any(
        is_model_in_modules(name, [module]) for module, family in FAMILIES.items() if not family.takes_drop_rate
    )


def family_of(backbone: nn.Module) -> Family:
    """Record of the backbone's family; the defaults where :data:`FAMILIES` has none."""
    return FAMILIES.get(family_name(backbone), Family())
