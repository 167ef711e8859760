"""``timm-dfs export-hub``, ``card`` and ``publish``: a model's folder for the Hub."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..base.model import MultiExitModel
from ..calibration.seen import is_test
from ..data.datasets import dataset_loader
from ..data.splits import overlap, standard
from ..evaluation.accuracy import collect_logits
from ..evaluation.flops import Costs
from ..hub.card import write_card
from ..hub.folder import RESULTS_FILE
from ..hub.from_checkpoint import base_model, data_name, export, trained_model, training_facts
from ..hub.publish import check_folder, files_of, publish
from ..pretrained.packaged import packaged_folder
from ..training.run import read_run
from .base import command, console
from .points import Budgets, By, ConfidenceLevel, MaxAccuracyDrops, Together, check_points
from .source import BatchSize, DataOptions, Workers, described, shared_with_training, tracked, with_data_options

Model = Annotated[str, typer.Argument(help="A model with packaged weights, or its folder.", metavar="MODEL")]


def _folder(model: str) -> Path:
    """Folder of a model's files for the Hub."""
    folder = Path(model) if Path(model).is_dir() else packaged_folder(model)
    if folder is None:
        raise ValueError(
            f"There is no folder {model!r} and no packaged model of that name; 'timm-dfs list' shows them."
        )
    if not (folder / RESULTS_FILE).is_file():
        raise ValueError(
            f"{folder} has no {RESULTS_FILE} (a folder of 'timm-dfs calibrate' has none): first run "
            "'timm-dfs export-hub CHECKPOINT --output FOLDER', which measures the model and makes a complete folder."
        )
    return folder.resolve()


@command("card")
def make_card(model: Model) -> None:
    """Write a model's card and plot, and the family's card, from its measured results."""
    for file in write_card(_folder(model)):
        typer.echo(f"wrote {file}")


@command("publish")
def publish_model(
    model: Model,
    repo: Annotated[str, typer.Option(help="Repository on the Hub, user/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created if it does not exist.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and list its files without uploading them.")
    ] = False,
) -> None:
    """Upload a model's folder to the Hub in one commit, and verify it. Log in first, with 'hf auth login'."""
    folder = _folder(model)
    if dry_run:
        check_folder(folder)
        for file in files_of(folder):
            console.print(f"{file}: {(folder / file).stat().st_size:,} bytes")
        console.print(f"{folder} is complete; nothing was uploaded to {repo}.")
        return
    done = publish(folder, repo, private, revision, report=console.print)
    console.print(f"{repo} holds {folder.name}, at commit {done.commit}" + ("" if done.changed else ", as before"))
    if done.others:
        console.print(f"It also has {', '.join(done.others)}, which are not part of the folder.")


@command("export-hub")
@with_data_options
def export_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of train.py, e.g. last.pth.tar.")],
    output: Annotated[Path, typer.Option(help="Folder to create.")],
    data: DataOptions,
    test: Annotated[str, typer.Option(help="Split to measure on.")] = "test",
    budget: Budgets = None,
    max_accuracy_drop: MaxAccuracyDrops = None,
    confidence_level: ConfidenceLevel = None,
    by: By = None,
    ensemble: Together = True,
    batch_size: BatchSize = 128,
    workers: Workers = 1,
) -> None:
    """Make a folder for the Hub from a checkpoint of train.py: weights, presets, results, card.

    Thresholds are fixed on --split, by default the run's validation split, and measured on --test.
    """
    run = read_run(checkpoint)
    where = data.where(str(checkpoint), default_split=None)
    held_out = where.pop("split")
    if shared_with := shared_with_training(str(checkpoint), where, test):
        raise ValueError(
            f"--test {test} {shared_with}, which the model was trained on; give a split that nothing "
            "was trained or chosen on."
        )
    shared = overlap(*(standard(where["dataset"], split) for split in (held_out, test)))
    if shared is not False or is_test(held_out, where["dataset"], where["root"]):
        raise ValueError(
            f"--split is {described(held_out, where)} and --test is {test}: thresholds must be fixed on a split held "
            "out of training and not on the test split, e.g. --split 'train[45000:]'."
        )

    def collect(model: MultiExitModel, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        loader = dataset_loader(model, **where, split=split, batch_size=batch_size, workers=workers)
        return collect_logits(model, tracked(loader, f"{run.model} on {split}"))

    facts = dict(
        dataset=data_name(where["dataset"], where["root"]),
        training=training_facts(run, checkpoint),
        **base_model(run, checkpoint),
    )
    model = trained_model(run, checkpoint)
    data.prepare(model)
    budgets = check_points(Costs(model), budget, max_accuracy_drop, confidence_level, by)
    export(
        model,
        output.resolve(),
        collect,
        held_out,
        test,
        facts,
        by=by,
        ensemble=ensemble,
        budgets=budgets,
        max_accuracy_drops=max_accuracy_drop or (),
        confidence_level=confidence_level,
    )
    console.print(f"{output} is complete; 'timm-dfs publish {output} --repo user/name' uploads it")
