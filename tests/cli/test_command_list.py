"""The list of commands is complete, is shown without importing torch, and leads to the commands themselves."""

import subprocess
import sys
from importlib import import_module
from pkgutil import iter_modules

import pytest
from typer.testing import CliRunner

import timm_dfs.cli
from timm_dfs.cli.base import app as registered
from timm_dfs_cli import COMMANDS, app


def test_help_imports_neither_torch_nor_timm_nor_a_command():
    code = """
import sys
sys.argv = ["timm-dfs", "--help"]
import timm_dfs_cli
try:
    timm_dfs_cli.main()
finally:
    loaded = {name.partition(".")[0] for name in sys.modules}
    print("imported:", sorted(loaded & {"torch", "timm", "timm_dfs", "matplotlib", "datasets", "gradio"}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Commands:" in run.stdout and run.stdout.endswith("imported: []\n"), run.stderr


def test_every_command_of_every_module_is_listed():
    for module in iter_modules(timm_dfs.cli.__path__):
        if module.name != "__main__":
            import_module(f"timm_dfs.cli.{module.name}")
    assert {command.name for command in registered.registered_commands} == set(COMMANDS)


def test_commands_are_listed_in_order_with_whole_summaries():
    shown = CliRunner().invoke(app, ["--help"]).stdout
    words = " ".join(shown.split("Commands:")[1].split())
    assert words == " ".join(f"{name} {summary}" for name, (_, summary) in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_listed_command_has_its_own_help(name):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0 and f" {name} [OPTIONS]" in result.stdout


def test_a_misspelt_command_is_answered_with_the_right_one():
    result = CliRunner().invoke(app, ["evla"])
    assert result.exit_code == 2 and "eval" in result.stderr
