"""Parts that the commands share: the app, creation of models, options of several values, tables and errors."""

import ast
import difflib
import functools
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import typer
from rich.console import Console
from rich.table import Table
from timm.models import get_pretrained_cfg
from typer.core import TyperCommand

from ..base.model import MultiExitModel
from ..data.datasets import follow_run
from ..inference.policy import ExitPolicy
from ..inference.prediction import resolve_policy
from ..pretrained import sources
from ..pretrained.packaged import CONFIG_FILE
from ..pretrained.runs import complete_args, first_images
from ..pretrained.sources import PREFIXES, check_named
from ..training.run import read_run


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


MULTIPLE = {"--model-kwargs": lambda text: "=" in text, "--mean": _is_number, "--std": _is_number}
"""Options that take several values, as in ``train.py``, and what is a value of theirs."""


class Command(TyperCommand):
    """Command whose options in :data:`MULTIPLE` take several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_options(args))


def repeat_options(args: list[str]) -> list[str]:
    """``--mean 0 0 0`` as ``--mean 0 --mean 0 --mean 0``, which click can parse, for options in :data:`MULTIPLE`."""
    repeated: list[str] = []
    option = None
    for index, text in enumerate(args):
        if text == "--":
            return repeated + args[index:]
        if option is not None and repeated[-1] != option and MULTIPLE[option](text):
            repeated.append(option)
        elif option is None or repeated[-1] != option:
            option = text if text in MULTIPLE else None
        repeated.append(text)
    return repeated


app = typer.Typer(
    help="Networks with exits for timm: list, inspect, try and evaluate them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
console = Console()

ModelName = Annotated[
    str,
    typer.Argument(
        help="A dfs_* name, a checkpoint of train.py, a model's folder, or hf-hub:user/name.", metavar="MODEL"
    ),
]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights to use instead of the model's own.")]
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option(help="Arguments of the model, as in train.py: --model-kwargs exits=4 beta=0.3."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DEFAULT_PRESET = "balanced"


def one_line_errors(command: Callable) -> Callable:
    """A user's mistake ends with one clear line and exit code 2; anything else keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            print(f"timm-dfs: {' '.join(_reason(error).split())}", file=sys.stderr)
            raise typer.Exit(2) from None

    return wrapped


def _reason(error: Exception) -> str:
    """An error's message; of an error in a process of a data loader its last line, without the traceback."""
    text = str(error)
    if "in DataLoader worker process" not in text:
        return text
    return text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")


def command(name: str) -> Callable:
    """Register a command of the command line."""
    return lambda function: app.command(name, cls=Command)(one_line_errors(function))


def create(
    name: str, pretrained: bool, checkpoint: Path | None = None, model_kwargs: list[str] | None = None
) -> MultiExitModel:
    """Create a model in eval mode.

    Args:
        name: A registered name, perhaps with a tag; a checkpoint of ``train.py``; a folder with ``config.json``; or a
            name of timm's with ``hf-hub:`` or ``local-dir:``.
        pretrained: Whether to load weights.
        checkpoint: File with other weights than the model's own.
        model_kwargs: ``NAME=VALUE`` pairs.

    Raises:
        ValueError: If there is no such model, or the weights or arguments do not fit it.
    """
    kwargs: dict[str, Any] = {}
    images: dict[str, Any] = {}
    run = None
    if Path(name).is_file():
        run = read_run(Path(name))
        run.check_reproducible()
        if checkpoint is not None:
            raise ValueError(f"Both {name} and --checkpoint {checkpoint} are given; give one checkpoint.")
        name, checkpoint, kwargs, images = run.model, Path(name), complete_args(run), first_images(run)
    kwargs.update(_parse(model_kwargs or []))
    name = as_source(name)
    ours = name.startswith(PREFIXES) or (name.startswith("dfs_") and timm.is_model(name.split(".")[0]))
    if not ours:
        known = timm.list_models("dfs_*")
        longer = [other for other in known if other.startswith(name)]
        near = longer[:3] or difflib.get_close_matches(name, known, n=3)
        similar = f"similar names are {', '.join(near)}; " if near else ""
        raise ValueError(f"There is no model {name!r}; {similar}'timm-dfs list' shows those there are.")
    overlay = dict(images, file=str(checkpoint)) if checkpoint else None
    check_named(name)
    try:
        model = timm.create_model(
            name, pretrained=pretrained or checkpoint is not None, pretrained_cfg_overlay=overlay, **kwargs
        )
    except (RuntimeError, AssertionError) as error:  # timm's words for a name, tag or folder that is not there
        raise ValueError(f"Cannot create {name}: {error}") from error
    except TypeError as error:  # an argument that the class does not have
        if not model_kwargs:
            raise
        raise ValueError(f"Cannot create {name} with --model-kwargs {' '.join(model_kwargs)}: {error}") from error
    if not isinstance(model, MultiExitModel):
        raise ValueError(f"{name} is a network without exits.")
    if run is not None:
        follow_run(model, run)
    return model.eval()


def refuse_new_classifiers(model: MultiExitModel) -> None:
    """Raise ``ValueError`` if the weights that were loaded have no classifiers for the model's classes."""
    trained = model.pretrained_cfg["num_classes"]  # of the weights
    if trained != model.num_classes:
        raise ValueError(
            f"The weights have {trained} classes and the model {model.num_classes}, so its classifiers are new and "
            "predict at random; leave num_classes out, or give weights of that many classes with --checkpoint."
        )


def as_source(name: str) -> str:
    """A model's folder by timm's name of it, ``local-dir:``; other names as they are.

    Raises:
        ValueError: If the folder holds no model.
    """
    if name.startswith(PREFIXES) or not Path(name).is_dir():
        return name
    if _is_registered(name):
        if (Path(name) / CONFIG_FILE).is_file():
            warnings.warn(
                f"{name} is the name of a model and of a folder here; the model is taken, ./{name} is the folder.",
                stacklevel=2,
            )
        return name
    if not (Path(name) / CONFIG_FILE).is_file():
        raise ValueError(
            f"The folder {name} has no {CONFIG_FILE}, so it holds no model; 'timm-dfs calibrate' and "
            "'timm-dfs export-hub' make such folders."
        )
    return f"local-dir:{name}"


def has_weights(name: str) -> bool:
    """Whether a model of that name, or a checkpoint, comes with trained exits."""
    if Path(name).is_file():
        return True
    name = as_source(name)
    ours = name.startswith(PREFIXES) or (name.startswith("dfs_") and _is_registered(name))
    return ours and sources.has_weights(name)


def _is_registered(name: str) -> bool:
    """Whether timm knows an architecture of this name and, if the name has a tag, the tag."""
    if not timm.is_model(name.split(".")[0]):
        return False
    try:
        return get_pretrained_cfg(name) is not None
    except RuntimeError:  # no such tag
        return False


def _parse(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs, values as Python literals or else text, as ``train.py`` reads them."""
    kwargs = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--model-kwargs is {pair!r}; give NAME=VALUE.")
        try:
            kwargs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            kwargs[key] = text
    return kwargs


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


def millions(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def saving(share: float) -> str:
    """Share of the compute saved, compared with the last exit alone; negative where early heads cost more."""
    if share >= 0:
        return f"{share:.0%} of the compute saved"
    return f"{-share:.0%} more compute than the last exit alone"


def make_table(*headers: str, title: str | None = None) -> Table:
    """A table whose columns of numbers (all but those with words) are flush right."""
    table = Table(title=title)
    words = {"layer", "preset", "model", "weights", "input", "after", "answer", "prediction", "photograph", "is a"}
    for header in headers:
        table.add_column(header, justify="left" if header in words else "right")
    return table


def choose_policy(
    model: MultiExitModel, preset: str | None, thresholds: str | None, option: str = "--preset"
) -> ExitPolicy:
    """The policy that a command was given by ``option`` or ``--thresholds``; else the preset ``balanced``."""
    if thresholds is not None:
        if preset is not None:
            raise ValueError(f"Both {option} and --thresholds are given; give one of them.")
        try:
            values = [None if value.strip().lower() == "none" else float(value) for value in thresholds.split(",")]
        except ValueError:
            raise ValueError(
                f"--thresholds is {thresholds!r}; give numbers with commas between, one per exit, or none for an exit "
                "that is switched off."
            ) from None
        return resolve_policy(model, ExitPolicy(values))
    if preset is None and DEFAULT_PRESET not in model.presets:
        known = ", ".join(model.presets)
        raise ValueError(
            f"This model has {f'the presets {known}; choose one by {option}, or' if known else 'no presets;'} say when "
            "to answer with --thresholds 0.9,0.9,…, one per exit."
        )
    return resolve_policy(model, preset or DEFAULT_PRESET)
