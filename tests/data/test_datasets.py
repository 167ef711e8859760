"""Data sets give the split, the classes and the preparation that were asked for, or say what there is."""

import argparse
import warnings

import numpy as np
import pytest
import timm
import torch
from helpers import tiny_vgg
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import CIFAR10

from timm_dfs.cli.source import DataOptions
from timm_dfs.data.datasets import (
    class_indices,
    class_names,
    dataset_loader,
    follow_run,
    open_dataset,
    training_classes,
)
from timm_dfs.data.images import labels_of, prepare
from timm_dfs.data.splits import read_by_train
from timm_dfs.training.run import TrainingRun

CLASSES = ("ant", "bee", "cat", "dog", "eel")


def write_folder(root, splits, classes=CLASSES, images=4):
    """Class folders with pictures whose red value is the class's place in the alphabet times 10, plus their number."""
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(images):
                colour = (10 * (ord(name[0]) - ord("a")) + i, 0, 0)
                Image.new("RGB", (32, 32), colour).save(folder / f"{i}.png")
    return str(root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"), ("train", "validation"))


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    """CIFAR-10 as torchvision stores it: 5 training images, 2 test images."""
    import hashlib
    import pickle

    root = tmp_path_factory.mktemp("torch")
    base = root / CIFAR10.base_folder
    base.mkdir()

    def write(name, labels):
        data = np.zeros((len(labels), 3072), np.uint8)
        content = pickle.dumps({"data": data, "labels": labels})
        (base / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    train = [write("data_batch_1", [0, 1, 2, 3, 4])]
    test = [write("test_batch", [8, 9])]
    meta = pickle.dumps({"label_names": [f"c{i}" for i in range(10)]})
    (base / "batches.meta").write_bytes(meta)
    md5 = hashlib.md5(meta).hexdigest()
    return root, dict(train_list=train, test_list=test, meta=dict(CIFAR10.meta, md5=md5))


@pytest.fixture
def cifar10(pickled, monkeypatch):
    root, lists = pickled
    for name, value in lists.items():
        monkeypatch.setattr(CIFAR10, name, value)
    return str(root)


# Splits.


@pytest.mark.parametrize(
    ("split", "chosen"),
    [
        ("train", range(20)),
        ("train[5:]", range(5, 20)),
        ("train[:5]", range(5)),
        ("train[2:4]", range(2, 4)),
        ("train[-3:]", range(17, 20)),
        ("train[:10%]", range(2)),
        ("train[90%:]", range(18, 20)),
        ("training[5:6]", range(5, 6)),
    ],
)
def test_a_slice_of_a_folder_is_those_samples(folder, split, chosen):
    whole, data = open_dataset("", folder, "train"), open_dataset("", folder, split)
    assert [np.asarray(image)[0, 0, 0] for image, _ in data] == [np.asarray(whole[i][0])[0, 0, 0] for i in chosen]


def test_a_slice_of_a_torchvision_data_set_is_of_the_split_that_it_names(cifar10):
    assert [target for _, target in open_dataset("torch/cifar10", cifar10, "train[3:]")] == [3, 4]
    assert [target for _, target in open_dataset("torch/cifar10", cifar10, "test[:1]")] == [8]
    assert len(open_dataset("torch/cifar10", cifar10, "validation")) == 2


def test_images_that_torchvision_does_not_convert_are_refused_where_the_model_takes_others(cifar10):
    with pytest.raises(ValueError, match=r"images of torch/cifar10 have 3 channels, but the model takes 1.*in_chans=3"):
        dataset_loader(tiny_vgg(in_chans=1), "torch/cifar10", cifar10, "test")


def test_a_split_that_does_not_exist_is_refused_with_those_that_do(folder, cifar10):
    for split in ("test", "tests", "train2", "trai[3:]"):
        with pytest.raises(ValueError, match=r"has no split '\w+'.*train, validation"):
            open_dataset("", folder, split)
    with pytest.raises(ValueError, match=r"torch/cifar10 has no split 'dev'.*train and test"):
        open_dataset("torch/cifar10", cifar10, "dev")


@pytest.mark.parametrize("split", ["train[2_0:]", "train[5: ]", "train[:0.5]", "train[5]", "train[5:", "train[1:9:2]"])
@pytest.mark.parametrize("dataset", ["", "torch/image_folder", "torch/cifar10"])
def test_what_is_no_slice_is_refused_and_not_taken_for_the_whole_split(folder, dataset, split):
    with pytest.raises(ValueError, match=r"split is .*; give a slice in whole numbers or percent"):
        open_dataset(dataset, folder, split)


def test_an_empty_slice_is_refused(folder):
    with pytest.raises(ValueError, match="20 samples; the slice is empty"):
        open_dataset("", folder, "train[500:]")


def test_a_slice_of_a_folder_that_lacks_classes_is_warned_of(folder, cifar10, recwarn):
    with pytest.warns(UserWarning, match=r"validation\[:50%\] has images of only 3 of the folder's 5 classes"):
        dataset_loader(tiny_vgg(), "", folder, "validation[:50%]", workers=0)
    with pytest.warns(UserWarning, match="only 1 of the folder's 5"):
        dataset_loader(tiny_vgg(), "torch/folder", folder, "validation[:2]", workers=0)
    recwarn.clear()
    dataset_loader(tiny_vgg(), "", folder, "validation[2:-2]", workers=0)  # of each class
    dataset_loader(timm.create_model("dfs_vgg7_cifar100", num_classes=10), "torch/cifar10", cifar10, "train[:2]")
    assert not [warning for warning in recwarn if "folder's" in str(warning.message)]


@pytest.mark.parametrize("split", ["train[:3]", "train", "training", "validation", "validation[1:]"])
@pytest.mark.parametrize("dataset", ["torch/cifar10", "", "torch/folder"])
def test_what_train_py_reads_of_a_split_is_what_timm_reads(dataset, split, folder, cifar10):
    root = cifar10 if dataset == "torch/cifar10" else folder
    read = open_dataset(dataset, root, read_by_train(dataset, split))
    assert [target for _, target in read] == [target for _, target in create_dataset(dataset, root, split)]


def test_a_run_with_slices_that_train_py_did_not_read_is_warned_of(folder, cifar10, recwarn):
    arguments = dict(dataset="torch/cifar10", data_dir=cifar10, train_split="train[:3]", val_split="train[3:]")
    with pytest.warns(
        UserWarning, match="--train-split train.:3., .* no slices of torch/cifar10: it trained on .* test"
    ):
        follow_run(tiny_vgg(num_classes=10), TrainingRun("dfs_vgg7_cifar100", arguments=arguments))
    arguments.update(dataset="", data_dir=folder)
    with pytest.warns(UserWarning, match="no slices of folders: it validated on all of train"):
        follow_run(tiny_vgg(), TrainingRun("dfs_vgg7_cifar100", arguments=arguments))
    recwarn.clear()
    for dataset in ("hfds/none", ""):
        arguments.update(dataset=dataset, **({} if dataset else dict(train_split="train", val_split="validation")))
        follow_run(tiny_vgg(), TrainingRun("dfs_vgg7_cifar100", arguments=arguments))
    assert not [warning for warning in recwarn if "no slices" in str(warning.message)]


def test_a_root_of_class_folders_is_a_split_when_asked_for(folder):
    assert len(open_dataset("", f"{folder}/train", ".")) == 20
    assert len(open_dataset("", f"{folder}/train", ".[5:]")) == 15
    with pytest.raises(ValueError, match=r"the split '\.'"):
        open_dataset("", f"{folder}/train", "test")


def test_a_stream_is_not_sliced():
    with pytest.raises(ValueError, match="cannot be sliced"):
        open_dataset("wds/x", "root", "train[5:]")


# Classes.


def test_an_image_that_cannot_be_read_is_named_not_replaced_by_the_next(tmp_path):
    root = write_folder(tmp_path, ("val",))
    broken = tmp_path / "val" / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"val/bee/1\.png cannot be read as an image"):
        list(dataset_loader(tiny_vgg(), "", root, "val", batch_size=3, workers=0))


def test_a_class_map_that_contradicts_the_models_names_is_warned_of(tmp_path):
    root = write_folder(tmp_path, ("val",))
    model = tiny_vgg()
    model.pretrained_cfg["label_names"] = CLASSES
    with pytest.warns(UserWarning, match="makes 'ant' class 4, of the model it is class 0"):
        dataset_loader(model, "", root, "val", workers=0, class_map={name: 4 - i for i, name in enumerate(CLASSES)})


def test_names_follow_the_folders_and_the_class_map(folder, tmp_path):
    assert class_names(class_indices(open_dataset("", folder, "train[3:]"))) == CLASSES
    (tmp_path / "map.txt").write_text("\n".join(reversed(CLASSES)))
    data = open_dataset("", folder, "train", class_map=str(tmp_path / "map.txt"))
    assert class_names(class_indices(data)) == tuple(reversed(CLASSES))
    assert class_names({"a": 0, "b": 2}) is None and class_names(None) is None


def test_a_root_that_holds_splits_is_none_itself(folder):
    with pytest.raises(ValueError, match=r"holds splits \(train, validation\), which the split '\.' would mix"):
        open_dataset("", folder, ".")


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    write_folder(tmp_path, ("here",), classes=("train", "test", "truck"))
    assert len(open_dataset("", str(tmp_path / "here"), ".")) == 12


def test_images_of_other_kinds_are_left_out_with_a_warning(tmp_path):
    root = write_folder(tmp_path, ("test",))
    for ending in ("webp", "bmp", "bmp2"):  # the last is no image's
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / "ant" / f"other.{ending}", ending.removesuffix("2"))
    (tmp_path / "test" / "ant" / "notes.txt").touch()
    with pytest.warns(UserWarning, match=r"left out \(1 \.bmp, 1 \.webp\): \.png, \.jpg, \.jpeg are read"):
        assert len(dataset_loader(tiny_vgg(), "", root, "test", workers=0).dataset) == 20


def test_a_folder_without_images_is_not_told_of_columns(tmp_path):
    (tmp_path / "test" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match="split 'test' \\(RuntimeError"):
        dataset_loader(tiny_vgg(), "", str(tmp_path), "test", workers=0)


def test_a_split_that_lacks_classes_keeps_the_others_numbers(tmp_path):
    root = write_folder(tmp_path, ["train"])
    write_folder(tmp_path, ["test"], classes=("bee", "eel"), images=1)
    model = tiny_vgg()
    ((_, targets),) = dataset_loader(model, "", root, "test", workers=0)  # by the training split beside it
    assert targets.tolist() == [1, 4]
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    model.pretrained_cfg["label_names"] = CLASSES
    ((_, targets),) = dataset_loader(model, "", root, "test", workers=0)  # by the model's names
    assert targets.tolist() == [1, 4]


def test_numbers_that_name_folders_are_not_taken_for_the_numbers_of_classes(tmp_path):
    root = write_folder(tmp_path, ["train"], classes="12345", images=1)
    write_folder(tmp_path, ["val"], classes="1234", images=1)
    ((_, targets),) = dataset_loader(tiny_vgg(), "", root, "val", workers=0)
    assert targets.tolist() == [0, 1, 2, 3]


def test_folders_that_the_training_split_lacks_are_named_in_a_warning(folder, tmp_path, recwarn):
    write_folder(tmp_path, ["train"])
    root = write_folder(tmp_path, ["val"], classes=("ant", "yak", "bee", "fox"), images=1)
    classes = training_classes(dict(data_dir=root))
    with pytest.warns(UserWarning, match="images of 'fox', 'yak' are left out"):
        ((_, targets),) = dataset_loader(tiny_vgg(), "", root, "val", workers=0, class_map=classes)
    assert targets.tolist() == [0, 1]
    recwarn.clear()
    dataset_loader(tiny_vgg(), "", folder, "validation", workers=0, class_map=classes)
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]


def test_torchvisions_classes_are_numbered_by_the_models_names(cifar10):
    model = tiny_vgg(num_classes=10)
    model.pretrained_cfg["label_names"] = tuple(f"c{9 - i}" for i in range(10))
    ((_, targets),) = dataset_loader(model, "torch/cifar10", cifar10, "train", workers=0)
    assert targets.tolist() == [9, 8, 7, 6, 5]
    ((_, targets),) = dataset_loader(model, "torch/cifar10", cifar10, "train[3:]", workers=0)
    assert targets.tolist() == [6, 5]


def test_other_names_than_the_models_are_warned_of(folder, cifar10, recwarn):
    model = tiny_vgg(num_classes=10)
    model.pretrained_cfg["label_names"] = (*(f"c{i}" for i in range(9)), "ship")
    with pytest.warns(UserWarning, match="other names of classes than the model, e.g. 'c9' for 'ship', its class 9"):
        dataset_loader(model, "torch/cifar10", cifar10, "train", workers=0)
    model = tiny_vgg()
    model.pretrained_cfg["label_names"] = ("ant", "bee", "cow", "dog", "eel")
    with pytest.warns(UserWarning, match="e.g. 'cat' for 'cow', its class 2"):
        dataset_loader(model, "", folder, "validation", workers=0)
    recwarn.clear()
    dataset_loader(model, "", folder, "validation", workers=0, class_map={name: i for i, name in enumerate(CLASSES)})
    assert not [warning for warning in recwarn if "other names" in str(warning.message)]  # the numbers were given


def test_folders_of_imagenets_synsets_have_imagenets_numbers(tmp_path, recwarn):
    root = write_folder(tmp_path, ["validation"], classes=("n03000684", "n01440764"), images=1)
    model = timm.create_model("dfs_vgg7_cifar100", num_classes=1000)
    ((_, targets),) = dataset_loader(model, "", root, "validation", workers=0)
    assert targets.tolist() == [0, 491]  # tench and chainsaw
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
    with pytest.warns(UserWarning, match="predicts 100 classes.*has 2"):
        dataset_loader(timm.create_model("dfs_vgg7_cifar100"), "", root, "validation", workers=0)


def test_a_name_that_two_classes_have_numbers_no_folder(tmp_path):
    root = write_folder(tmp_path, ["test"], classes=("bee", "eel"), images=1)
    model = tiny_vgg()
    model.pretrained_cfg["label_names"] = ("bee", "ant", "eel", "dog", "eel")
    with pytest.warns(UserWarning, match="predicts 5 classes.*has 2"):
        dataset_loader(model, "", root, "test", workers=0)


def test_classes_that_are_known_by_name_need_no_warning(tmp_path, recwarn):
    root = write_folder(tmp_path, ["test"], classes=("bee", "ant"), images=1)
    model = tiny_vgg()
    model.pretrained_cfg["label_names"] = ("bee", "ant", "eel", "dog", "eel")
    ((_, targets),) = dataset_loader(model, "", root, "test", workers=0)
    assert targets.tolist() == [1, 0]
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def test_another_number_of_classes_is_warned_of(folder):
    with pytest.warns(UserWarning, match="predicts 100 classes.*has 5"):
        dataset_loader(timm.create_model("dfs_vgg7_cifar100"), "", folder, "validation", workers=0)


def test_a_model_with_other_classes_has_numbers_for_names():
    model = timm.create_model("dfs_vgg7_cifar100", num_classes=3)
    assert labels_of(model) == ("0", "1", "2")
    assert labels_of(timm.create_model("dfs_vgg7_cifar100"))[71] == "sea"


# A run's preparation.


def run(folder, **arguments):
    of_parser = dict(dataset="", data_dir=folder, train_split="train", class_map="", in_chans=None, input_size=None)
    return TrainingRun("dfs_vgg7_cifar100", arguments=dict(of_parser, **arguments))


def test_a_runs_preparation_and_names_become_the_models(folder):
    model = tiny_vgg()
    follow_run(
        model,
        run(folder, input_size=[3, 48, 48], mean=[0.1], std=[0.2, 0.3, 0.4], crop_pct=0.5, interpolation="nearest"),
    )
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 48, 48) and config["mean"] == (0.1, 0.1, 0.1)
    assert config["std"] == (0.2, 0.3, 0.4) and config["crop_pct"] == 0.5 and config["interpolation"] == "nearest"
    assert labels_of(model) == CLASSES


def test_where_a_runs_data_are_gone_classes_have_numbers(tmp_path):
    model = tiny_vgg()
    follow_run(model, run(str(tmp_path / "gone")))
    assert labels_of(model) == tuple("01234")


def test_images_of_a_one_channel_model_are_grey(folder):
    model = tiny_vgg(in_chans=1)
    ((images, _),) = dataset_loader(model, "", folder, "validation", workers=0)
    assert images.shape == (20, 1, 32, 32)
    with pytest.raises(ValueError, match="image_mode is 'RGB', but the model takes 1 channels"):
        dataset_loader(model, "", folder, "validation", workers=0, image_mode="RGB")


@pytest.mark.parametrize(
    "prepared",
    [
        lambda model: None,
        lambda model: DataOptions(img_size=48).prepare(model),
        lambda model: follow_run(model, run(None, in_chans=1)),
        lambda model: follow_run(model, run(None, in_chans=1, img_size=48)),
    ],
)
def test_a_one_channel_model_gets_the_mean_of_three_channels(prepared, folder):
    model = tiny_vgg(in_chans=1)
    mean, std = (sum(model.pretrained_cfg[key]) / 3 for key in ("mean", "std"))
    prepared(model)
    picture = Image.new("RGB", (48, 48), (0, 0, 0))
    ((images, _),) = dataset_loader(model, "", folder, "validation", workers=0)
    for black in (images[0], prepare(model, [picture])[0]):  # ant/0.png is black
        assert black.shape[0] == 1 and torch.allclose(black, torch.tensor(-mean / std))
    assert torch.stack(model.eval().forward_exits(images)).isfinite().all()


def test_drawn_samples_are_the_same_each_time_and_of_the_slice(folder):
    def draw():
        loader = dataset_loader(tiny_vgg(), "", folder, "train[10:]", workers=0, samples=4)
        return torch.cat([targets for _, targets in loader]).tolist()

    assert draw() == draw() and len(draw()) == 4 and min(draw()) >= 2


def test_a_namespace_of_unknown_flags_is_no_error(folder):
    follow_run(tiny_vgg(), TrainingRun("dfs_vgg7_cifar100", arguments=vars(argparse.Namespace(data_dir=folder))))


def test_classes_of_a_training_split_that_is_not_here_are_none_without_a_warning(tmp_path):
    validation_only = write_folder(tmp_path / "images", ["validation"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert training_classes(dict(data_dir=str(tmp_path / "gone"))) is None
        assert training_classes(dict(data_dir=validation_only)) is None
        assert training_classes(dict(dataset="torch/cifar10", data_dir=str(tmp_path / "gone"))) is None
        assert training_classes(dict(dataset=f"hfds/{tmp_path / 'gone'}")) is None


def test_a_training_split_that_is_here_and_cannot_be_read_causes_a_warning_with_the_cause(folder, tmp_path):
    missing = str(tmp_path / "names.txt")
    with pytest.warns(UserWarning, match=r"Cannot read the names of the classes from split 'train' .*names\.txt"):
        assert training_classes(dict(data_dir=folder, class_map=missing)) is None
    empty = tmp_path / "empty"
    (empty / "train" / "ant").mkdir(parents=True)
    with pytest.warns(UserWarning, match="RuntimeError: Found 0 images"):
        assert training_classes(dict(data_dir=str(empty))) is None
    with pytest.warns(UserWarning, match="AssertionError"):
        assert training_classes(dict(dataset="torch/no_such_kind", data_dir=folder)) is None
