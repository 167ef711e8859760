"""Streams are evaluated to the last image, with the figures of the same images in a folder."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from helpers import settled, tiny_vgg
from test_datasets import CLASSES, write_folder

from timm_dfs import anytime_accuracy, calibration_error, collect_logits
from timm_dfs.data.datasets import dataset_loader, open_dataset

SHARDS = ((0, 8), (8, 13), (13, 20))
"""First and last image of each tar file, of unequal sizes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"), ("train", "validation"))


@pytest.fixture(scope="module")
def tars(folder, tmp_path_factory):
    """The images of the folder's validation split as a WebDataset."""
    pytest.importorskip("webdataset")
    root = tmp_path_factory.mktemp("tars")
    samples = open_dataset("", folder, "validation").reader.samples
    names = [f"validation-{number:04d}.tar" for number in range(len(SHARDS))]
    for name, (first, end) in zip(names, SHARDS, strict=True):
        with tarfile.open(root / name, "w") as tar:
            for i in range(first, end):
                path, label = samples[i]
                with open(path, "rb") as image:
                    parts = {"png": image.read(), "cls": str(label).encode()}
                for extension, content in parts.items():
                    entry = tarfile.TarInfo(f"{i:05d}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    lengths = [end - first for first, end in SHARDS]
    split = dict(name="validation", num_samples=sum(lengths), filenames=names, shard_lengths=lengths)
    (root / "_info.json").write_text(json.dumps(dict(splits=dict(validation=split))))
    return str(root)


@pytest.fixture(scope="module")
def parquet(folder, tmp_path_factory):
    """The same images as a parquet file that the datasets library streams."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("parquet")
    data = datasets.load_dataset(
        "imagefolder", data_dir=f"{folder}/validation", split="train", cache_dir=str(root / "cache")
    )
    (root / "set").mkdir()
    data.to_parquet(root / "set" / "validation-0.parquet")
    return str(root / "set")


def evaluated(model, dataset, root, workers, **kwargs):
    return collect_logits(
        model, dataset_loader(model, dataset, root, "validation", batch_size=3, workers=workers, **kwargs)
    )


def same_samples(found, expected):
    """Whether both hold the same logits and targets, in whatever order."""
    rows = [
        torch.cat([logits.movedim(1, 0).flatten(1), targets[:, None]], 1).tolist()
        for logits, targets in (found, expected)
    ]
    first, second = (torch.tensor(sorted(each)) for each in rows)
    return first.shape == second.shape and torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_web_dataset_has_the_figures_of_its_images_in_a_folder(folder, tars, workers):
    model = settled(tiny_vgg())
    expected = evaluated(model, "", folder, 0)
    found = evaluated(model, "wds/x", tars, workers)
    assert len(found[1]) == len(CLASSES) * 4
    assert same_samples(found, expected)
    assert torch.equal(anytime_accuracy(*found), anytime_accuracy(*expected))
    assert torch.allclose(calibration_error(*found), calibration_error(*expected), atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_of_the_hubs_library_has_the_figures_of_its_images_in_a_folder(folder, parquet, workers):
    model = settled(tiny_vgg())
    expected = evaluated(model, "", folder, 0)
    columns = dict(input_key="image", target_key="label")
    found = evaluated(model, f"hfids/{parquet}", None, workers, num_samples=20, **columns)
    assert same_samples(found, expected)
    assert torch.equal(anytime_accuracy(*found), anytime_accuracy(*expected))


def test_a_slice_of_a_web_dataset_is_refused(tars):
    with pytest.raises(ValueError, match="a stream cannot be sliced"):
        dataset_loader(tiny_vgg(), "wds/x", tars, "validation[:5]", workers=0)


def test_a_split_that_a_web_dataset_lacks_is_refused_by_name(tars):
    with pytest.raises(ValueError, match=r"split 'test'.*not found in info"):
        dataset_loader(tiny_vgg(), "wds/x", tars, "test", workers=0)


def test_samples_that_a_web_dataset_leaves_out_are_counted_in_a_warning(tars, tmp_path):
    for file in Path(tars).iterdir():
        shutil.copy(file, tmp_path)
    with tarfile.open(tmp_path / "validation-0001.tar", "w") as tar:  # 1 broken sample in place of 5
        for extension, content in {"png": b"no image", "cls": b"0"}.items():
            entry = tarfile.TarInfo(f"00008.{extension}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.warns(UserWarning, match="gave 15 samples but states 20"):
        _, targets = evaluated(tiny_vgg(), "wds/x", str(tmp_path), 0)
    assert len(targets) == 15


def test_a_stream_that_is_read_whole_gives_no_warning(tars, recwarn):
    evaluated(tiny_vgg(), "wds/x", tars, 2)
    assert not [warning for warning in recwarn if "samples but states" in str(warning.message)]


def test_the_hubs_library_slices_its_own_splits_and_names_those_there_are(parquet):
    columns = dict(input_key="image", target_key="label", workers=0, batch_size=20)
    ((_, targets),) = dataset_loader(tiny_vgg(), f"hfds/{parquet}", None, "validation[15:]", **columns)
    assert targets.tolist() == [3, 4, 4, 4, 4]
    with pytest.raises(ValueError, match="validation"):
        dataset_loader(tiny_vgg(), f"hfds/{parquet}", None, "test", **columns)


def test_a_stream_of_the_hubs_library_refuses_a_split_that_it_lacks_and_a_slice(parquet):
    columns = dict(input_key="image", target_key="label", workers=0, num_samples=20)
    with pytest.raises(ValueError, match="test"):
        dataset_loader(tiny_vgg(), f"hfids/{parquet}", None, "test", **columns)
    with pytest.raises(ValueError, match="a stream cannot be sliced"):
        dataset_loader(tiny_vgg(), f"hfids/{parquet}", None, "validation[:5]", **columns)


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_classes_of_the_hubs_library_are_numbered_by_the_models_names(parquet, kind):
    columns = dict(input_key="image", target_key="label", num_samples=20 if kind == "hfids" else None)
    model = tiny_vgg()
    for names in (CLASSES, tuple(reversed(CLASSES))):
        model.pretrained_cfg["label_names"] = names
        loader = dataset_loader(model, f"{kind}/{parquet}", None, "validation", workers=1, batch_size=3, **columns)
        found = torch.cat([targets for _, targets in loader]).tolist()
        assert sorted(map(names.__getitem__, found)) == sorted(CLASSES * 4)
        assert found[0] == names.index("ant")
