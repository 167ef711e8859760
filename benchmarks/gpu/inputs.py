"""What networks see: batches of bytes as their input, in training and in validation."""

import argparse

import numpy as np
import torch
from device_augment import crop, cutout, erase, flip, normalise
from torch import nn

import timm_dfs


class Inputs:
    """From bytes to a network's input, as a recipe says.

    Args:
        args: The recipe.
        mean: Mean of each channel, between 0 and 1.
        std: Standard deviation of each channel.
        device: Where batches are.
    """

    def __init__(self, args: argparse.Namespace, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device):
        self.args = args
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (mean, std))

    def plain(self, images: torch.Tensor) -> torch.Tensor:
        """Bytes (B, C, H, W) normalised, in the recipe's memory format."""
        x = normalise(images, self.mean, self.std)
        return x.contiguous(memory_format=torch.channels_last) if self.args.channels_last else x

    def augmented(self, images: torch.Tensor) -> torch.Tensor:
        """As :meth:`plain`, with what of the recipe's augmentation the device does before and after."""
        if self.args.pad is not None:
            images = flip(crop(images, self.args.pad, self.args.pad_value), self.args.hflip)
        return erase(cutout(self.plain(images), self.args.cutout), self.args.reprob)


class Validation:
    """Top-1 of every exit on images that are not trained on.

    Args:
        images: Bytes (N, C, H, W).
        labels: Labels (N,).
        inputs: What makes networks' input of them.
        device: Where networks are.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, inputs: Inputs, device: torch.device):
        self.images, self.labels, self.inputs, self.device = images, labels, inputs, device

    def __call__(self, network: nn.Module) -> list[float]:
        """Percent by exit, shallow to deep."""
        args = self.inputs.args
        images, labels = torch.from_numpy(self.images), torch.from_numpy(self.labels)
        parts = zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True)
        loader = ((self.inputs.plain(part.to(self.device)), targets) for part, targets in parts)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp):
            logits, targets = timm_dfs.collect_logits(network, loader)
        return timm_dfs.anytime_accuracy(logits, targets).tolist()
