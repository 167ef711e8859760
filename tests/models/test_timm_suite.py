"""timm's own model tests, from its source distribution, on our models."""

import subprocess
import sys
import tarfile
from importlib.metadata import version

import pytest
from helpers import NATIVE

# TorchScript cannot script a visitor, and torch has deprecated it; see docs/decisions.md.
# FX traces no ViT, and its tokens are no map of pool_size: timm leaves out vit_* by name, too.
EXCLUDED = "torchscript and not (vit and (fx or default_cfgs))"

TWINS = ["dfs_test_resnet", "dfs_test_mambaout", "dfs_test_vit"]  # one for each layout of features


@pytest.mark.slow
def test_timm_s_own_model_tests_pass(tmp_path):
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "timm"]
    got = subprocess.run([*download, "-d", str(tmp_path), f"timm=={version('timm')}"], capture_output=True, text=True)
    if got.returncode != 0:
        pytest.skip(f"timm's source distribution cannot be downloaded: {got.stderr.strip()[-200:]}")
    (archive,) = tmp_path.glob("timm-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")

    selection = f"({' or '.join([*sorted(NATIVE), *TWINS])}) and not {EXCLUDED}"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "timm_dfs", "tests/test_models.py", "-q", "-k", selection],
        cwd=tmp_path / archive.name.removesuffix(".tar.gz"),
        capture_output=True,
        text=True,
    )
    summary = run.stdout.strip().splitlines()[-1]
    assert run.returncode == 0, run.stdout[-5000:]
    passed = int(summary.split(" passed")[0].split()[-1])
    assert passed >= 3 * (len(NATIVE) + len(TWINS)), summary  # forward, backward and default_cfgs of each
