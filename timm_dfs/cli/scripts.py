"""``timm-dfs timm``: timm's own scripts, run with the plugin imported."""

import os
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from .base import app, one_line_errors

SCRIPTS = "TIMM_SCRIPTS"


@app.command("timm", context_settings=dict(allow_extra_args=True, ignore_unknown_options=True, help_option_names=[]))
def run_script(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help=f"Path of the script, or its name in the folder ${SCRIPTS}.")],
) -> None:
    """Run one of timm's scripts (validate.py, inference.py, benchmark.py, onnx_export.py) with this plugin imported."""
    if script == "--help":  # after a script's name, --help belongs to the script
        typer.echo(context.get_help())
        raise typer.Exit()
    file = find_script(script, context.args)
    sys.argv = [str(file), *context.args]
    runpy.run_path(str(file), run_name="__main__")


@one_line_errors
def find_script(script: str, args: list[str]) -> Path:
    """Path of a script of timm.

    Raises:
        ValueError: If it does not exist, or its arguments ask for something that cannot work with exits.
    """
    folder = os.environ.get(SCRIPTS)
    candidates = [Path(script), *([Path(folder) / script] if folder else [])]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise ValueError(
            f"There is no {' or '.join(map(str, candidates))}. timm's scripts are in its repository, not in its "
            f"package: give the path of one, or name their folder in the environment variable {SCRIPTS}."
        )
    if file.name == "benchmark.py" and not {"infer", "profile"} & set(args):
        raise ValueError(
            "benchmark.py would time the training of the first exit alone. Give it --bench infer; for training, see "
            "benchmarks/train_step.py."
        )
    return file
