"""Names of splits tell what train.py reads, and whether two of them overlap."""

import argparse

import pytest
import torch

from timm_dfs.cli.source import DataOptions
from timm_dfs.data.splits import overlap, read_by_train, standard


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
        ("train[:10]+train[20:]", "train[10:20]", False),
        ("train[:10] + validation", "train[10:20]+val[3:]", True),
        ("train[:10]+test[:5]", "train[20:]+test[-5:]", None),
    ],
)
def test_splits_share_samples_or_not(first, second, shared):
    assert overlap(first, second) is shared
    assert overlap(second, first) is shared


@pytest.mark.parametrize(
    ("dataset", "split", "read"),
    [
        ("hfds/uoft-cs/cifar100", "train[:36]", "train[:36]"),
        ("tfds/cifar100", "train[:36]", "train[:36]"),
        ("", "train[:36]", "train"),
        ("torch/folder", "train[:36]", "train"),
        ("torch/cifar100", "train[:36]", "test"),
        ("Torch/CIFAR100", "training", "train"),
        ("torch/cifar100", "validation", "test"),
    ],
)
def test_train_py_reads_slices_of_some_data_sets_only(dataset, split, read):
    assert read_by_train(dataset, split) == read


def test_splits_of_torchvision_have_two_standard_names():
    names = ("training[:5]", "validation[5:]", "test", "train+test")
    assert [standard("torch/mnist", name) for name in names] == ["train[:5]", "test[5:]", "test", "train+test"]
    assert [standard("hfds/mnist", name) for name in names] == [*names]


@pytest.mark.parametrize(
    ("dataset", "trained_on", "split", "shared"),
    [
        ("hfds/x", "train[:36]", "train[30:]", "train[:36]"),
        ("hfds/x", "train[:36]", "train[36:]", None),
        ("", "train[:36]", "train[36:]", "train"),
        ("torch/mnist", "train[:36]", "train[36:]", None),
        ("torch/mnist", "train[:36]", "validation", "test"),
    ],
)
def test_a_split_to_calibrate_on_that_the_run_was_trained_on_is_warned_of(
    tmp_path, recwarn, dataset, trained_on, split, shared
):
    arguments = argparse.Namespace(
        model="dfs_vgg7_cifar100", dataset=dataset, data_dir="images", train_split=trained_on
    )
    torch.save(dict(args=arguments, arch="dfs_vgg7_cifar100", state_dict={}), tmp_path / "last.pth.tar")
    DataOptions(split=split).where(str(tmp_path / "last.pth.tar"), default_split=None)
    warned = [str(warning.message) for warning in recwarn if "shares images with" in str(warning.message)]
    assert len(warned) == (shared is not None)
    assert all(f"shares images with {shared}, which" in words for words in warned)
