"""``timm-dfs space``: a web page to try a model."""

from typing import Annotated

import typer

from .. import demo
from ..space import launch, page
from .base import Checkpoint, ModelKwargs, command, create, refuse_new_classifiers


@command("space")
def serve(
    model_name: Annotated[str, typer.Argument(help="Model with weights.", metavar="MODEL")] = demo.MODEL,
    port: Annotated[int | None, typer.Option(help="Port; by default the first free one from 7860 on.")] = None,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
) -> None:
    """Serve a page where you drop an image and see the exit that it takes. No data leave this machine."""
    model = create(model_name, True, checkpoint, model_kwargs)
    refuse_new_classifiers(model)
    launch(page(model, model_name), port)
