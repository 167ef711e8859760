"""``timm-dfs card`` and ``publish``: what is published of a model."""

from pathlib import Path
from typing import Annotated

import typer

from ..card import write_card
from ..hub import RESULTS_FILE
from ..publish import FILES, check_folder, publish
from ..weights import packaged_folder
from .base import command, console

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


@command("publish")
def publish_model(
    model: Model,
    repo: Annotated[str, typer.Option(help="The Hub repository, user/name; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Only you may see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it does not exist.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and say what there is to upload.")
    ] = False,
) -> None:
    """Upload a model's folder to the Hub in one commit, and read it back. Log in before, with 'hf auth login'."""
    folder = _folder(model)
    if dry_run:
        check_folder(folder)
        for file in FILES:
            console.print(f"{file}: {(folder / file).stat().st_size:,} bytes")
        console.print(f"{folder} is whole; nothing was uploaded to {repo}.")
        return
    done = publish(folder, repo, private, revision, report=console.print)
    console.print(f"{repo} holds {folder.name}, at commit {done.commit}" + ("" if done.changed else ", as before"))
    if done.others:
        console.print(f"It also has {', '.join(done.others)}, which are not the folder's.")
