"""``timm-dfs export``: what it writes, prints and refuses."""

import json

import numpy as np
import pytest
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


def test_int8_is_calibrated_on_a_folder_of_images(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / label / f"{i}.png")
    int8 = ("--int8", "--calibration", tmp_path / "images")
    result = run(*TINY, "--thresholds", "0.5,0", "--output", tmp_path / "out", *int8, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["quantization"]["samples"] == 8


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
    ],
)
def test_mistakes_end_with_one_line(tmp_path, options, message):
    result = run(*TINY, "--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("timm-dfs: ")]
    assert message in line
    assert not list(tmp_path.iterdir())
