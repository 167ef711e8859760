"""Every Python block of the README runs, in order, as one program."""

import re
import shlex
from pathlib import Path

import timm
from helpers import NATIVE
from typer.testing import CliRunner

from timm_dfs.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_blocks_run():
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    assert code.count("timm_dfs.") > 5
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["prediction"].logits.shape == (8, 100)
    assert names["prediction"].exit_index.shape == (8,)
    assert len(names["curve"]) == 40


def test_the_shell_examples_are_commands_that_exist():
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^timm-dfs .*$", README, re.M)]
    assert len(commands) >= 5
    for _, command, *_ in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


def test_the_models_named_are_the_models_there_are():
    named = set(re.findall(r"^\| `(dfs_\w+)`", README, re.M))
    assert NATIVE <= named <= set(timm.list_models("dfs_*"))
