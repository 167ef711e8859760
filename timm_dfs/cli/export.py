"""``timm-dfs export``: files that exit early without PyTorch."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..calibration.seen import is_test
from ..data.datasets import dataset_loader
from ..export import Export, export_executorch, export_onnx
from ..export.quantize import Quantization
from ..export.to_onnx import LAYOUTS
from ..inference.policy import ExitPolicy
from .base import (
    DEFAULT_PRESET,
    AsJson,
    Checkpoint,
    ModelKwargs,
    ModelName,
    choose_policy,
    command,
    console,
    create,
    has_weights,
    make_table,
    print_json,
    refuse_new_classifiers,
)
from .source import InputKey, TargetKey, data_of, described, tracked, warn_of_training_images

DYNAMIC = "dynamic"

FORMATS = {"onnx": "ONNX Runtime", "executorch": "ExecuTorch"}
"""Formats of files, and the runtimes that verify them."""

OPSET = 18


@command("export")
def export_model(
    model_name: ModelName,
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.")],
    policy: Annotated[str | None, typer.Option(help=f"Operating point; by default {DEFAULT_PRESET!r}.")] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Instead of a preset: 0.9,0.9,…, one per exit on its largest probability.")
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="graph: one file that exits early by itself; stages: one file for each exit, and a router; last: the "
            "network without early exits."
        ),
    ] = LAYOUTS[0],
    file_format: Annotated[
        str,
        typer.Option(
            "--format", help="onnx; or executorch, only with --layout stages: programs that take one image at a time."
        ),
    ] = next(iter(FORMATS)),
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.")] = OPSET,
    batch_size: Annotated[str, typer.Option(help=f"{DYNAMIC}, or the only number of images it takes.")] = DYNAMIC,
    softmax: Annotated[bool, typer.Option("--softmax", help="Put out probabilities instead of logits.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Quantize to int8; needs --calibration.")] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="Data set for int8, as in timm's train.py, e.g. hfds/uoft-cs/cifar100, or a folder."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Its split, held out of training; by default the checkpoint's validation split, or the folder itself."
        ),
    ] = None,
    input_key: InputKey = None,
    target_key: TargetKey = None,
    samples: Annotated[int, typer.Option(min=1, help="How many of its images to draw.")] = 512,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Export to ONNX or ExecuTorch with early exit, and verify the files against timm_dfs.predict."""
    if file_format not in FORMATS:
        raise ValueError(f"--format is {file_format!r}; choose one of {', '.join(FORMATS)}.")
    if batch_size != DYNAMIC and not batch_size.isdigit():
        raise ValueError(f"--batch-size is {batch_size!r}; give {DYNAMIC} or a number of images.")
    if int8 != (calibration is not None):
        raise ValueError("Give --int8 and --calibration together: int8 needs images to fit its ranges to.")
    if file_format == "executorch":
        _check_executorch(layout, opset, batch_size, softmax, int8)
    trained = has_weights(model_name)
    model = create(model_name, trained, checkpoint, model_kwargs)
    if trained or checkpoint is not None:
        refuse_new_classifiers(model)
    chosen: ExitPolicy | str | None = None
    if layout == "last":
        if policy is not None or thresholds is not None:
            raise ValueError("The layout 'last' has no early exits; leave --policy and --thresholds out.")
    elif thresholds is not None or (policy is None and DEFAULT_PRESET not in model.presets):
        chosen = choose_policy(model, policy, thresholds, "--policy")
    else:
        chosen = policy or DEFAULT_PRESET
    data = None
    if calibration is not None:
        folder = Path(calibration) if Path(calibration).is_dir() else None
        where = data_of(
            model_name,
            None,
            dataset="" if folder else calibration,  # "": a folder, though the run may name a data set
            root=folder,
            split=split or ("." if folder else None),
            input_key=input_key,
            target_key=target_key,
        )
        if is_test(where["split"], where["dataset"], where["root"]):
            raise ValueError(
                f"--split is {described(where['split'], where)}; the test split is for final figures, and int8's "
                "ranges and thresholds are chosen on these images: give one held out of training, e.g. 'train[45000:]'."
            )
        warn_of_training_images(model_name, where)
        loader = dataset_loader(model, **where, batch_size=64, workers=0, samples=samples)
        images, targets = (torch.cat(parts) for parts in zip(*tracked(loader, calibration)))
        data = images, targets
    start = time.perf_counter()
    if file_format == "executorch":
        result = export_executorch(model, output, chosen)
    else:
        result = export_onnx(
            model,
            output,
            chosen,
            layout,
            opset=opset,
            batch_size=None if batch_size == DYNAMIC else int(batch_size),
            softmax=softmax,
            calibration=data,
        )
    seconds = time.perf_counter() - start
    if as_json:
        return print_json(dict(asdict(result), folder=str(result.folder), seconds=seconds))
    _report(result, seconds, FORMATS[file_format])


def _check_executorch(layout: str, opset: int, batch_size: str, softmax: bool, int8: bool) -> None:
    """Raise ``ValueError`` for options that ExecuTorch's programs have not."""
    if layout != "stages":
        raise ValueError(f"--format executorch writes stages, not {layout!r}; give --layout stages.")
    others = {
        "--opset": opset != OPSET,
        "--batch-size": batch_size not in (DYNAMIC, "1"),
        "--softmax": softmax,
        "--int8": int8,
    }
    given = [name for name, is_given in others.items() if is_given]
    if given:
        raise ValueError(
            f"--format executorch writes float32 programs that take one image and put out logits; leave "
            f"{', '.join(given)} out."
        )


def _report(result: Export, seconds: float, runtime: str) -> None:
    table = make_table("thresholds", "batch", "left at each exit", "largest difference", "near a threshold")
    for check in result.checks:
        counts = " ".join(map(str, check.exit_counts))
        table.add_row(
            check.thresholds,
            str(check.batch_size),
            counts,
            f"{check.largest_difference:.1e}",
            str(check.near_threshold),
        )
    console.print(table)
    if result.quantization is not None:
        _report_quantization(result.quantization)
    size = sum(result.files.values())
    rival = "predict" if result.quantization is None else "the quantized network with all exits"
    console.print(
        f"Verified with {runtime}: the same exits as {rival}, images near a threshold excepted. Written to "
        f"{result.folder} in {seconds:.0f} s: {', '.join(result.files)}; {size / 1e6:.1f} MB."
    )
    whole = [str(k) for k, fewer in zip(result.exits, result.shrinks) if not fewer]
    if whole:
        console.print(
            f"The batch does not shrink behind exits {', '.join(whole)}: images that left there are computed on until "
            "all have left."
        )


def _report_quantization(found: Quantization) -> None:
    table = make_table("precision", "top-1, %", "last exit, %", "left at each exit")
    for i, name in enumerate(("float32", "int8")):
        counts = " ".join(map(str, found.exit_counts[i]))
        table.add_row(name, f"{found.accuracy[i]:.2f}", f"{found.last_exit_accuracy[i]:.2f}", counts)
    console.print(table)
    console.print(
        f"On the {found.samples} calibration images, on which int8's ranges and thresholds were chosen; expect "
        "somewhat less on others."
    )
