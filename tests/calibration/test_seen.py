"""Data that a choice was made on are recognised and refused."""

import warnings

import pytest
import torch

from timm_dfs.calibration.seen import fingerprints, is_test, recorded, refuse_fitted_split, refuse_seen


def test_more_than_one_sample_in_a_hundred_that_was_seen_is_refused_with_the_counts():
    seen, other = torch.randn(2, 200, 4), torch.randn(2, 198, 4)
    refuse_seen(fingerprints(seen), torch.cat([other, seen[:, :2]], 1), "test", "the point")
    with pytest.raises(ValueError, match=r"3 of the 200 test samples .* the point was fitted or chosen on"):
        refuse_seen(fingerprints(seen), torch.cat([other[:, 1:], seen[:, :3]], 1), "test", "the point")


def test_samples_are_recognised_in_any_order_precision_and_number_of_exits():
    seen = torch.randn(3, 50, 4)
    again = seen[-1:, torch.randperm(50)].double().requires_grad_()
    with pytest.raises(ValueError, match="50 of the 50"):
        refuse_seen(fingerprints(seen), again, "test", "the point")


def test_a_preset_s_own_images_are_refused_by_the_names_of_splits():
    presets = dict(hand=dict(thresholds=[0.5]), fast=dict(fitted_on=dict(dataset="x", split="test[:9]", samples=9)))
    elsewhere = dict(fast=dict(fitted_on=dict(dataset="/site/a/images", split="val", samples=9)))
    refuse_fitted_split(elsewhere, "/site/b/images", "val")  # other images in a folder of the same name
    for dataset, split in [("x", "train"), ("x", "test[9:]"), ("y", "test[:9]")]:
        refuse_fitted_split(presets, dataset, split)
    with pytest.raises(ValueError, match="'fast' was fitted on"):  # a copy of the data set
        refuse_fitted_split(presets, "/data/X/", "test")
    with pytest.raises(ValueError, match="'fast' was fitted on"):  # export-hub keeps the last part of a path
        refuse_fitted_split(presets, "owner/x", "test")
    for split in ("test[:9]", "test", "test[8:]", "test[:1%]"):
        with pytest.raises(ValueError, match=r"'fast' was fitted on test\[:9\] of x"):
            refuse_fitted_split(presets, "x", split)


def test_a_preset_whose_data_set_is_not_told_is_warned_of_where_the_splits_may_share_images():
    presets = dict(fast=dict(fitted_on=dict(dataset="", split="train[45000:]", samples=9)))
    with pytest.warns(UserWarning, match=r"'fast' was fitted on a split 'train\[45000:\]' of a data set that"):
        refuse_fitted_split(presets, "uoft-cs/cifar100", "train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_fitted_split(presets, "uoft-cs/cifar100", "test")
        refuse_fitted_split(dict(hand=dict(thresholds=[0.5])), "uoft-cs/cifar100", "test")


@pytest.mark.parametrize(
    ("fitted", "dataset", "split"),
    [
        ("uoft-cs/cifar100", "torch/cifar100", "test"),
        ("uoft-cs/cifar100", "torch/cifar100", "validation[8:]"),
        ("uoft-cs/cifar100", "hfids/uoft-cs/cifar100", "test"),
        ("torch/cifar100", "uoft-cs/cifar100", "test"),
        ("torch/cifar100", "/data/cifar100", "test"),
        ("hfids/uoft-cs/cifar100", "uoft-cs/cifar100", "test[:1]"),
        ("tfds/cifar100", "torch/cifar100", "test"),
    ],
)
def test_a_data_set_is_the_same_however_it_is_read(fitted, dataset, split):
    presets = dict(fast=dict(fitted_on=dict(dataset=fitted, split="test[:9]", samples=9)))
    with pytest.raises(ValueError, match=f"'fast' was fitted on .* of {fitted}"):
        refuse_fitted_split(presets, dataset, split)
    refuse_fitted_split(presets, dataset, "train")
    refuse_fitted_split(presets, dataset, "test[9:]")


def test_the_validation_split_of_torchvision_that_thresholds_were_fitted_on_is_the_test_split():
    presets = dict(fast=dict(fitted_on=dict(dataset="torch/cifar100", split="validation", samples=9)))
    with pytest.raises(ValueError, match="'fast' was fitted on"):
        refuse_fitted_split(presets, "torch/cifar100", "test")


@pytest.mark.parametrize(
    ("fitted", "read"),
    [(("data", "val"), ("data/val", ".")), (("data/val", "."), ("data", "val")), (("val", "."), ("data/val", "."))],
)
def test_a_folder_of_class_folders_is_the_split_of_its_name(fitted, read, tmp_path, monkeypatch):
    for name in ("val", "test"):
        (tmp_path / "data" / name).mkdir(parents=True)
    presets = dict(fast=dict(fitted_on=dict(dataset=fitted[0], split=fitted[1], samples=9)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'fast' was fitted on"):
        refuse_fitted_split(presets, *read)
    refuse_fitted_split(presets, "data", "test")
    refuse_fitted_split(presets, "data/test", ".")
    assert is_test(".", "", "data/test") and not is_test(".", "", "data/val")
    assert is_test(".[:50%]", "", "data/test")
    with pytest.raises(ValueError, match="'fast' was fitted on"):
        refuse_fitted_split(presets, "data/val", ".[:50]")
    monkeypatch.chdir("data")
    assert recorded(".") == "data" and recorded("val") == "val"


@pytest.mark.parametrize(
    ("fitted", "read", "directory"),
    [
        ("data/pets", "data/../data/pets", "."),
        ("data/pets", "pets", "data"),
        ("data/pets", "../data/pets", "data"),
        ("data/pets", "link", "."),
        ("{here}/data/pets", "../data/pets", "data"),
        ("{here}/data/pets", "link", "."),
        ("pets", "data/pets", "."),  # of published results
    ],
)
def test_a_folder_is_the_same_by_each_of_its_paths(fitted, read, directory, tmp_path, monkeypatch):
    for folder in ("data/pets", "pets", "other/pets"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("data/pets")
    presets = dict(fast=dict(fitted_on=dict(dataset=fitted.format(here=tmp_path), split="validation", samples=9)))
    monkeypatch.chdir(tmp_path / directory)
    with pytest.raises(ValueError, match="'fast' was fitted on"):
        refuse_fitted_split(presets, read, "validation")
    monkeypatch.chdir(tmp_path)
    if "/" in fitted:
        refuse_fitted_split(presets, "other/pets", "validation")  # other images in a folder of the same name


@pytest.mark.parametrize(
    ("split", "test"),
    [
        ("test", True),
        ("test[:9]", True),
        ("train[9:]", False),
        ("tests", False),
        ("train+test", True),
        ("validation+test[:50%]", True),
        ("train[:10]+train[20:]", False),
    ],
)
def test_a_split_of_the_test_data_is_known_by_its_name(split, test):
    assert is_test(split) == test


@pytest.mark.parametrize("dataset", ["torch/image_folder", "torch/folder", "torch/imagenet"])
def test_torchvision_reads_the_validation_split_of_other_data_sets_as_such(dataset):
    assert not is_test("val", dataset) and not is_test("validation[:10]", dataset) and is_test("test", dataset)


def test_of_torchvisions_splits_only_train_is_not_test():
    assert is_test("validation", "torch/cifar10") and is_test("train+validation", "torch/cifar10")
    assert not is_test("train[:9]", "torch/cifar10") and not is_test("validation", "hfds/x")
