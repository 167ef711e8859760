"""The registered architectures; importing a module registers its ``dfs_*`` names.

Example:
    >>> import timm, timm_dfs
    >>> timm.list_models("dfs_msdnet*")
    ['dfs_msdnet_cifar100', 'dfs_msdnet_imagenet']
    >>> timm.create_model("dfs_resnet18_cifar100", device="meta").num_exits
    4
"""

from . import dfs_twins
from .dfs_msdnet import MSDNet
from .dfs_resnet_cifar import ExitResNetCifar
from .dfs_vgg import ExitVGG

__all__ = ["ExitResNetCifar", "ExitVGG", "MSDNet", "dfs_twins"]
