"""Importing the package is cheap and its parts agree."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import timm_dfs

ROOT = Path(__file__).parent.parent


def fresh(code):
    """Run code in a new interpreter and return what it prints."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_leaves_heavy_packages_for_later():
    heavy = "('fvcore', 'matplotlib', 'datasets', 'rich', 'typer', 'skimage')"
    code = f"""
import sys, timm
before = set(sys.modules)
import timm_dfs
print([module for module in {heavy} if module in sys.modules and module not in before])
"""
    assert fresh(code) == "[]"


def test_importing_takes_little_time_on_top_of_timm():
    code = """
import time, timm
start = time.process_time()
import timm_dfs
print(time.process_time() - start)
"""
    assert float(fresh(code)) < 0.3


def test_every_public_name_exists_and_is_documented():
    for name in timm_dfs.__all__:
        assert getattr(timm_dfs, name).__doc__, name


def test_registering_leaves_timm_s_own_lists_as_they_were():
    code = """
import timm
def lists():
    return timm.list_models(), timm.list_pretrained(), timm.list_modules()
before = lists()
import timm_dfs
after = lists()
for old, new in zip(before, after):
    assert set(new) - set(old) and all('dfs' in name for name in set(new) - set(old))
    assert set(old) <= set(new)
twins = {f"dfs_{name}" for name in before[0]}
assert twins <= set(after[0])
print(sorted(set(after[0]) - set(before[0]) - twins))
"""
    assert fresh(code) == str(
        [
            "dfs_msdnet_cifar100",
            "dfs_msdnet_imagenet",
            "dfs_resnet18_cifar100",
            "dfs_vgg16_imagenet",
            "dfs_vgg7_cifar100",
        ]
    )


@pytest.mark.parametrize("file", [".ci/run", "README.md"])
def test_ci_runs_the_command_that_the_readme_gives(file):
    command = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest -n 2\n"
    assert command in (ROOT / file).read_text()


def test_the_wheel_holds_the_module_of_the_command():
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python from 3.11 on")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, function = settings["project"]["scripts"]["timm-dfs"].partition(":")
    assert f"{module}.py" in settings["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert callable(getattr(import_module(module), function))
