"""The registered architectures; importing a module registers its ``dfs_*`` names."""

from . import dfs_twins
from .dfs_msdnet import MSDNet
from .dfs_resnet_cifar import ExitResNetCifar
from .dfs_vgg import ExitVGG

__all__ = ["ExitResNetCifar", "ExitVGG", "MSDNet", "dfs_twins"]
