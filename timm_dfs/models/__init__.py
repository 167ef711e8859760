"""The registered architectures; importing a module registers its ``dfs_*`` names."""

from .dfs_msdnet import MSDNet
from .dfs_resnet_cifar import ExitResNetCifar
from .dfs_vgg import ExitVGG

__all__ = ["ExitResNetCifar", "ExitVGG", "MSDNet"]
