"""``timm-dfs card``: what is published of a model."""

from pathlib import Path
from typing import Annotated

import typer

from ..card import write_card
from ..hub import RESULTS_FILE
from ..weights import packaged_folder
from .base import command

Model = Annotated[str, typer.Argument(help="A model with packaged weights, or its folder.", metavar="MODEL")]


def _folder(model: str) -> Path:
    """Where a model's published files are."""
    folder = Path(model) if Path(model).is_dir() else packaged_folder(model)
    if folder is None:
        raise ValueError(
            f"There is no folder {model!r} and no packaged model of that name; 'timm-dfs list' shows them."
        )
    if not (folder / RESULTS_FILE).is_file():
        raise ValueError(f"{folder} has no {RESULTS_FILE}; 'timm-dfs export-hub' makes a whole folder.")
    return folder.resolve()


@command("card")
def make_card(model: Model) -> None:
    """Make a model's card and curve, and the family's card, from what was measured."""
    for file in write_card(_folder(model)):
        typer.echo(f"wrote {file}")
