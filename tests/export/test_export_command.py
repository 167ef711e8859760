"""``timm-dfs export``: what it writes, prints and refuses."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from timm_dfs.cli import app

pytest.importorskip("onnx", reason="needs the extra deploy")
pytest.importorskip("onnxruntime", reason="needs the extra deploy")

TINY = ("dfs_vgg7_cifar100", "--model-kwargs", "depths=(1, 1)", "--model-kwargs", "widths=(6, 8)")
TINY += ("--model-kwargs", "num_classes=2")


def run(*args):
    return CliRunner().invoke(app, ["export", *map(str, args)])


def test_it_writes_the_file_and_reports_the_checks(tmp_path):
    result = run(*TINY, "--thresholds", "0.5,0", "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert "Verified with ONNX Runtime" in " ".join(result.stdout.split())


def test_the_report_for_scripts_names_files_and_checks(tmp_path):
    result = run(*TINY, "--thresholds", "0.5,0", "--layout", "stages", "--output", tmp_path / "out", "--json")
    data = json.loads(result.stdout)
    assert set(data["files"]) == {"stage_0.onnx", "stage_1.onnx", "router.json", "router.py"}
    assert {check["batch_size"] for check in data["checks"]} == {1, 8}


@pytest.fixture
def folder(tmp_path):
    """Eight images in class folders, in ``train``."""
    for label in ("cat", "dog"):
        (tmp_path / "images" / "train" / label).mkdir(parents=True)
        for i in range(4):
            noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / "train" / label / f"{i}.png")
    return tmp_path / "images"


def checkpoint(file, dataset, train_split):
    """A checkpoint as train.py writes one, of a tiny network."""
    settings = dict(depths=(1, 1), widths=(6, 8))
    arguments = argparse.Namespace(
        model="dfs_vgg7_cifar100", num_classes=2, model_kwargs=settings, dataset=dataset, data_dir=None, data=None,
        train_split=train_split, val_split="validation", input_key=None, target_key=None, class_map="", in_chans=None,
        input_size=None, img_size=None, mean=None, std=None, crop_pct=None, interpolation="", gp=None,
    )  # fmt: skip
    model = timm.create_model("dfs_vgg7_cifar100", num_classes=2, **settings)
    torch.save(dict(epoch=0, args=arguments, state_dict=model.state_dict()), file)
    return file


def calibrated(model, output, *calibration):
    options = ("--thresholds", "0.5,0", "--output", output, "--int8", "--json", "--calibration")
    return run(*model, *options, *calibration)


def test_int8_is_calibrated_on_a_folder_of_images(folder, tmp_path):
    result = calibrated(TINY, tmp_path / "out", folder / "train")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quantization"]["samples"] == 8


def test_int8_is_calibrated_on_the_folder_though_the_run_trained_on_a_named_data_set(folder, tmp_path):
    trained = checkpoint(tmp_path / "last.pth.tar", f"hfds/{tmp_path}/absent", "train")
    result = calibrated([trained], tmp_path / "out", folder / "train")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quantization"]["samples"] == 8


@pytest.mark.parametrize(
    ("calibration", "split"), [("hfds/made/up", "test[:500]"), ("images", "test"), ("torch/cifar100", "validation")]
)
def test_int8_is_not_calibrated_on_test_images(folder, tmp_path, monkeypatch, calibration, split):
    monkeypatch.chdir(tmp_path)
    result = calibrated(TINY, "out", calibration, "--split", split)
    assert result.exit_code == 2 and f"--split is {split}; the test split is for final figures" in result.stderr


def test_calibration_on_images_that_the_run_trained_on_is_warned_of(folder, tmp_path):
    trained = checkpoint(tmp_path / "last.pth.tar", "", "train")
    with pytest.warns(UserWarning, match="--split train shares images with train, which the model was trained on"):
        assert calibrated([trained], tmp_path / "out", folder, "--split", "train").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-size", "some", "--thresholds", "0.5,0"), "--batch-size is 'some'"),
        (("--layout", "last", "--thresholds", "0.5,0"), "has no early exits"),
        (("--thresholds", "0.5,0.5,0"), "3 thresholds, but there are 2 exits"),
        (("--policy", "fast"), "no preset 'fast'"),
        (("--int8", "--thresholds", "0.5,0"), "--int8 and --calibration together"),
        (("--opset", "11", "--thresholds", "0.5,0"), "opset is 11"),
        ((), "has no presets"),
        (("--policy", "fast", "--thresholds", "0.5,0"), "Both --policy and --thresholds"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, options, message):
    result = run(*TINY, "--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("timm-dfs: ")]
    assert message in line
    assert not list(tmp_path.iterdir())
