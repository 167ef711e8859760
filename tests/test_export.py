"""From a checkpoint of train.py's to a folder that publishing takes."""

import argparse
import json

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from timm_dfs import export
from timm_dfs.checkpoints import TrainingRun
from timm_dfs.cli import app
from timm_dfs.policy import CONFIDENCES
from timm_dfs.presets import NAMED, fit_presets
from timm_dfs.publish import check_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny data set with a split to hold out and one to test on."""
    folder = tmp_path_factory.mktemp("data")
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(num_classes=10)})
    for seed, split in enumerate(("validation", "test")):
        noise = np.random.default_rng(seed).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
        rows = {"img": [Image.fromarray(image) for image in noise], "fine_label": [i % 10 for i in range(12)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, data):
    torch.manual_seed(0)
    settings = dict(depths=(1, 2), widths=(6, 8), beta=0.25)
    model = timm.create_model("dfs_vgg7_cifar100", num_classes=10, **settings)
    args = argparse.Namespace(
        model="dfs_vgg7_cifar100",
        num_classes=10,
        in_chans=None,
        gp=None,
        model_kwargs=settings,
        dataset=f"hfds/{data}",
        data_dir=None,
        val_split="validation",
        input_key="img",
        target_key="fine_label",
    )
    folder = tmp_path_factory.mktemp("run")
    torch.save(dict(epoch=2, arch=args.model, args=args, state_dict=model.state_dict()), folder / "last.pth.tar")
    (folder / "args.yaml").write_text("seed: 7\nopt: sgd\nlr: 0.1\nconfig: recipes/mine.yaml\n")
    return folder / "last.pth.tar"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_a_checkpoint_becomes_a_folder_that_can_be_published(checkpoint, tmp_path):
    done = run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0)
    assert done.exit_code == 0, done.output
    model = check_folder(tmp_path / "mine")
    assert model.beta == 0.25 and model.num_classes == 10 and set(model.presets) == {"accurate", "balanced", "fast"}
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "Trained for 3 epochs" in card and "recipe `mine.yaml`, seed 7" in card and "| `lr` | 0.1 |" in card
    assert run("publish", tmp_path / "mine", "--repo", "me/mine", "--dry-run").exit_code == 0


def test_exporting_again_replaces_the_folder_by_the_same(checkpoint, tmp_path):
    for _ in range(2):
        assert run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0).exit_code == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]


def test_an_export_that_fails_leaves_the_old_folder(checkpoint, tmp_path):
    assert run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0).exit_code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()}
    failed = run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0, "--test", "absent")
    assert failed.exit_code == 2 and "absent" in failed.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()} == before


def test_thresholds_are_not_fixed_on_the_test_split(checkpoint, tmp_path):
    refused = run("export-hub", checkpoint, "--output", tmp_path / "mine", "--held-out", "test")
    assert refused.exit_code == 2 and "both test" in refused.stderr and not (tmp_path / "mine").exists()


def test_the_presets_results_are_what_the_shipped_network_does(checkpoint, tmp_path, data):
    assert run("export-hub", checkpoint, "--output", tmp_path / "mine", "--workers", 0).exit_code == 0
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    point = results["test"]["presets"]["balanced"]
    assert results["flops_lazy"][0] <= point["average_flops"] <= results["flops_lazy"][-1]
    assert sum(point["exit_shares"]) == pytest.approx(1) and results["test"]["samples"] == 12
    assert results["dataset"] == str(data)


@pytest.mark.parametrize(
    ("model", "started", "expected"),
    [
        ("dfs_resnet18", True, dict(base_model="timm/resnet18.a1_in1k")),
        ("dfs_resnet18", False, {}),
        ("dfs_vgg7_cifar100", True, {}),
    ],
)
def test_a_twin_that_started_from_timms_weights_names_them(model, started, expected, tmp_path):
    (tmp_path / "args.yaml").write_text(f"pretrained: {started}")
    assert export.base_model(TrainingRun(model), tmp_path / "last.pth.tar") == expected


def test_the_points_shipped_are_by_the_confidence_with_which_they_cost_least():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (400,), generator=generator)
    logits = torch.randn(3, 400, 5, generator=generator)
    logits += torch.tensor([1.0, 2.0, 3.0])[:, None, None] * torch.nn.functional.one_hot(targets, 5)
    found = export.operating_points((logits, targets), [1, 2, 4], dataset="made up", split="validation")
    costs = {
        name: [point.average_flops for point in fit_presets((logits, targets), [1, 2, 4], confidence=name).values()]
        for name in CONFIDENCES
    }
    assert [point.average_flops for point in found.values()] == min(costs.values(), key=sum)
    assert set(found) == set(NAMED) and all(point.fitted_on.dataset == "made up" for point in found.values())
