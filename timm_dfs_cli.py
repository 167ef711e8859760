"""Entry point of ``timm-dfs``: the list of commands, each imported only when it runs.

This module lies beside the package because importing anything from the package imports torch and timm, which takes
seconds; ``timm-dfs --help`` needs neither.
"""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

COMMANDS = {  # name: (module of timm_dfs.cli, summary), in the order of the help text
    "list": ("models", "List the models and say which have trained weights."),
    "info": ("models", "Show a model's exits, settings, size and presets."),
    "flops": ("models", "Count the multiply-adds up to each exit."),
    "predict": ("images", "Classify images; show every exit's prediction and the exit taken."),
    "demo": ("images", "Show early exit on photographs and measure its speed."),
    "space": ("space", "Serve a page to try a model on your own images."),
    "eval": ("data", "Measure every exit's accuracy on a data set."),
    "calibrate": ("calibrate", "Fit temperatures and presets to held-out data."),
    "bench": ("bench", "Measure the speed and latency of early exit on this machine."),
    "report": ("report", "Measure a model and write the results as an HTML page."),
    "conflict": ("data", "Measure the conflict between the exits' gradients."),
    "timm": ("scripts", "Run one of timm's scripts with this plugin imported."),
    "export": ("export", "Write ONNX files that exit early without PyTorch."),
    "export-hub": ("hub", "Make a folder for the Hub from a checkpoint of train.py."),
    "card": ("hub", "Write a model's card and plot from its measured results."),
    "publish": ("hub", "Upload a folder to the Hub in one commit."),
}


class LazyGroup(TyperGroup):
    """Group that imports the command that runs, and no other."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else load(name), rest


def load(name: str) -> Any:
    """Import a command's module and return the command."""
    import_module(f"timm_dfs.cli.{COMMANDS[name][0]}")
    registered = import_module("timm_dfs.cli.base").app
    return get_group(registered).commands[name]


app = typer.Typer(
    cls=LazyGroup,
    help="Multi-exit networks for timm: list, inspect, try, calibrate and evaluate them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for _name, (_, _summary) in COMMANDS.items():
    app.command(_name, short_help=_summary)(lambda: None)  # a place in the list; `load` returns what runs


def main() -> None:
    """Run ``timm-dfs``."""
    app()
