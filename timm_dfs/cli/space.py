"""``timm-dfs space``: the page to try a model on, in a browser."""

from typing import Annotated

import typer

from .. import demo
from ..space import launch, page
from .base import Checkpoint, ModelKwargs, command, create


@command("space")
def serve(
    model_name: Annotated[str, typer.Argument(help="A model with weights.", metavar="MODEL")] = demo.MODEL,
    port: Annotated[int | None, typer.Option(help="Port; by default a free one from 7860 on.")] = None,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
) -> None:
    """Serve a page where you drop an image and see which exit answers it. Nothing leaves this machine."""
    launch(page(create(model_name, True, checkpoint, model_kwargs), model_name), port)
