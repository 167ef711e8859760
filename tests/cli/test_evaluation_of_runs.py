"""A checkpoint of train.py is evaluated as train.py validated it, under every flag that decides what that is."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from timm_dfs import collect_logits
from timm_dfs.cli.base import create
from timm_dfs.cli.source import data_of
from timm_dfs.data.datasets import dataset_loader
from timm_dfs.data.images import labels_of

SCRIPTS = os.environ.get("TIMM_SCRIPTS")
CLASSES = ("apple", "boat", "cloud", "door")
MSDNET = ("exits=3", "base=2", "step=1", "stem_width=4", "growth_rate=4", "head_width=8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SCRIPTS is None, reason="TIMM_SCRIPTS does not name a folder with timm's train.py"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of images of several sizes, in noise that leaves some doubt; ``dev`` lacks no class either."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, images in (("train", 12), ("validation", 10), ("dev", 9)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                height, width = random.integers(30, 60, 2)
                pixels = random.integers(0, 256, (height, width, 3))
                pixels[:, : width // 2, label % 3] //= 2 + label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    (root / "map.txt").write_text("\n".join(reversed(CLASSES)))
    return root


FLAGS = {
    "nothing": (),
    "mean and std": ("--mean", "0", "0", "0", "--std", "1", "1", "1"),
    "one mean for all channels": ("--mean", "0.3", "--std", "0.1"),
    "class map": ("--class-map", "map.txt"),
    "input size": ("--input-size", "3", "48", "48"),
    "image size": ("--img-size", "24"),
    "crop": ("--crop-pct", "0.5"),
    "interpolation": ("--interpolation", "nearest"),
    "one channel": ("--in-chans", "1", "--img-size", "32", "--mean", "0.5", "--std", "0.5"),
    "one channel by input size": ("--input-size", "1", "32", "32", "--mean", "0.5", "--std", "0.5"),
    "image mode": ("--input-img-mode", "HSV"),
    "pooling": ("--gp", "max"),
    "another split": ("--val-split", "dev"),
    "batch size of validation": ("--validation-batch-size", "7"),
    "EMA": ("--model-ema", "--model-ema-decay", "0.5"),
    "split batch norm": ("--aug-splits", "2", "--split-bn", "--aa", "rand-m3"),
    "compiled": ("--torchcompile", "eager"),
    "channels last": ("--channels-last",),
    "epsilon of batch norm": ("--model", "dfs_test_efficientnet", "--model-kwargs", "exits=3", "--bn-eps", "0.1"),
    "chained exits": ("--model-kwargs", *MSDNET, "chain=0.5", "beta=[0.5,0.9]"),
    "chained exits of a twin": ("--model", "dfs_test_resnet", "--model-kwargs", "exits=3", "chain=0.5", "--model-ema"),
    "twin of another size": ("--model", "dfs_test_resnet", "--model-kwargs", "exits=2", "--img-size", "64"),
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_the_last_exit_has_the_accuracy_and_loss_of_train_pys_validation(folder, tmp_path, flags):
    script = tmp_path / "train.py"  # a copy: beside the original lies timm's own package
    script.write_text((Path(SCRIPTS) / "train.py").read_text())
    flags = [str(folder / "map.txt") if flag == "map.txt" else flag for flag in flags]
    command = [sys.executable, str(script), "--data-dir", str(folder), "--device-modules", "timm_dfs"]
    command += ["--device", "cpu", "--model", "dfs_msdnet_cifar100", "--num-classes", "4", "--batch-size", "12"]
    command += ["--epochs", "2", "--warmup-epochs", "0", "--workers", "0", "--lr", "0.05", "--no-aug"][
        : None if "--aa" not in flags else -1
    ]
    command += [
        "--output",
        str(tmp_path),
        "--experiment",
        "run",
        *([] if "--model" in flags else ["--model-kwargs", *MSDNET]),
    ]
    trained = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr[-2000:]
    last = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))[-1]

    checkpoint = str(tmp_path / "run" / "last.pth.tar")
    model = create(checkpoint, pretrained=True)
    logits, targets = collect_logits(model, dataset_loader(model, **data_of(checkpoint), workers=0))
    right = (logits[-1].argmax(-1) == targets).sum().item()
    assert right == round(float(last["eval_top1"]) * len(targets) / 100)
    assert F.cross_entropy(logits[-1], targets).item() == pytest.approx(float(last["eval_loss"]), rel=1e-3)
    assert labels_of(model) == (tuple(reversed(CLASSES)) if "--class-map" in flags else CLASSES)


def test_a_data_set_of_the_hubs_library_is_read_by_the_runs_columns(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset("imagefolder", data_dir=str(folder / "train"), split="train")
    data = data.rename_columns(dict(image="picture", label="kind"))
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "train-0.parquet")
    script = tmp_path / "train.py"
    script.write_text((Path(SCRIPTS) / "train.py").read_text())
    command = [sys.executable, str(script), "--dataset", f"hfds/{tmp_path / 'set'}", "--device-modules", "timm_dfs"]
    command += ["--train-split", "train[:36]", "--val-split", "train[36:]", "--input-key", "picture"]
    command += ["--target-key", "kind", "--device", "cpu", "--model", "dfs_msdnet_cifar100", "--num-classes", "4"]
    command += ["--batch-size", "12", "--epochs", "1", "--warmup-epochs", "0", "--workers", "0", "--output"]
    command += [str(tmp_path), "--experiment", "run", "--model-kwargs", *MSDNET]
    trained = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr[-2000:]
    last = list(csv.DictReader((tmp_path / "run" / "summary.csv").open()))[-1]
    checkpoint = str(tmp_path / "run" / "last.pth.tar")
    model = create(checkpoint, pretrained=True)
    logits, targets = collect_logits(model, dataset_loader(model, **data_of(checkpoint), workers=0))
    assert len(targets) == 12 and labels_of(model) == CLASSES
    assert 100 * (logits[-1].argmax(-1) == targets).float().mean().item() == pytest.approx(
        float(last["eval_top1"]), abs=0.01
    )
    assert torch.isfinite(logits).all()
