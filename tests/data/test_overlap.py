"""Overlap of splits is found from their names, or reported as unknown."""

import argparse

import pytest
import torch

from timm_dfs.cli.source import DataOptions
from timm_dfs.data.overlap import overlap


@pytest.mark.parametrize(
    "first, second, shared",
    [
        ("train", "train", True),
        ("train", "training", True),
        ("train", "validation", False),
        ("val", "validation[:50%]", True),
        ("train", "train[45000:]", True),
        ("train[:45000]", "train[45000:]", False),
        ("train[:45000]", "train[44000:]", True),
        ("train[:45000]", "train[44999:45000]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train[:90%]", "train[80%:]", True),
        ("train[:-5000]", "train[-5000:]", False),
        ("train[:-5000]", "train[-6000:]", True),
        ("train[:45000]", "train[90%:]", None),
        ("train[:45000]", "train[-5000:]", None),
        ("train[:10]+train[20:]", "train[10:20]", None),
    ],
)
def test_splits_share_samples_or_not(first, second, shared):
    assert overlap(first, second) is shared
    assert overlap(second, first) is shared


@pytest.mark.parametrize("split, warned", [("train[30:]", True), ("train[36:]", False)])
def test_a_split_to_calibrate_on_that_the_run_was_trained_on_is_warned_of(tmp_path, recwarn, split, warned):

    arguments = argparse.Namespace(model="dfs_vgg7_cifar100", dataset="", data_dir="images", train_split="train[:36]")
    torch.save(dict(args=arguments, arch="dfs_vgg7_cifar100", state_dict={}), tmp_path / "last.pth.tar")
    DataOptions(split=split).where(str(tmp_path / "last.pth.tar"), default_split=None)
    assert any("shares images with train[:36]" in str(warning.message) for warning in recwarn) is warned
