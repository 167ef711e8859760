"""timm's real, unmodified train.py trains every exit. It is in timm's repository, not in its wheel."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_dfs  # noqa: F401  registers the models

SCRIPTS = os.environ.get("TIMM_SCRIPTS")
NETWORK = dict(exits=3, base=2, step=1, stem_width=4, growth_rate=4, head_width=8)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SCRIPTS is None, reason="TIMM_SCRIPTS does not name a folder with timm's train.py"),
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data set in folders: train and validation, three classes of flat colours."""
    root = tmp_path_factory.mktemp("pictures")
    for split in ("train", "validation"):
        for label in range(3):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(8):
                colour = np.full((32, 32, 3), 20 * i, np.uint8)
                colour[..., label] = 255
                Image.fromarray(colour).save(root / split / str(label) / f"{i}.png")
    return root


def train(pictures, output, *flags):
    # A script's folder comes first on Python's path, and timm's repository also holds the package: run a copy.
    script = output / "train.py"
    script.write_text((Path(SCRIPTS) / "train.py").read_text())
    command = [sys.executable, str(script), str(pictures), "--device-modules", "timm_dfs", "--device", "cpu"]
    command += [
        "--model",
        "dfs_msdnet_cifar100",
        "--model-kwargs",
        *(f"{key}={value}" for key, value in NETWORK.items()),
    ]
    command += ["--num-classes", "3", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "0", "--workers", "0"]
    command += ["--output", str(output), "--experiment", "run", "--lr", "0.05", *flags]
    run = subprocess.run(command, capture_output=True, text=True, cwd=output)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(output / "run" / "last.pth.tar", weights_only=False)["state_dict"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--smoothing", "0"),
        ("--smoothing", "0.1"),
        ("--mixup", "0.2", "--cutmix", "0.5"),
        ("--bce-loss",),
        ("--amp", "--amp-dtype", "bfloat16", "--channels-last"),
        ("--model-kwargs", *(f"{key}={value}" for key, value in NETWORK.items()), "beta=None"),
    ],
    ids=lambda flags: flags[0] if flags[-1] != "beta=None" else "joint",
)
def test_every_exit_learns_with_the_criterion_that_the_flags_choose(pictures, tmp_path, flags):
    trained = train(pictures, tmp_path, *flags)
    start = timm.create_model("dfs_msdnet_cifar100", num_classes=3, **NETWORK).state_dict()
    for k in range(NETWORK["exits"]):
        bias = trained[f"heads.{k}.fc.bias"]  # starts at zero
        assert (start[f"heads.{k}.fc.bias"] == 0).all()
        assert (bias != 0).any(), f"exit {k} was not trained"
