"""``timm-dfs predict`` and ``demo``: early exit on photographs."""

import csv
import glob
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from .. import demo
from ..base.evaluating import evaluating
from ..base.model import MultiExitModel
from ..data.images import labels_of, open_image, prepare, warn_of_other_images
from ..evaluation.flops import Costs
from ..inference.policy import ExitPolicy
from ..inference.prediction import resolve_policy
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
    make_table,
    millions,
    print_json,
    refuse_new_classifiers,
    saving,
)


@command("predict")
def predict_images(
    model_name: ModelName,
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, folders of them, or patterns such as 'photos/*.jpg'.", metavar="IMAGE..."),
    ],
    preset: Annotated[str | None, typer.Option(help=f"Preset; by default {DEFAULT_PRESET!r}.")] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="Instead of a preset: 0.9,0.9,…, one per exit on its largest probability.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write instead, one image a line: .csv, or .jsonl for JSON lines.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 64,
    checkpoint: Checkpoint = None,
    model_kwargs: ModelKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Classify images; show every exit's prediction, confidence and cost, and the exit taken.

    Confidence is the prediction's probability, calibrated where the policy has temperatures. An image that
    cannot be read gets its error, the others their predictions; the exit code is then 2.
    """
    if output is not None and output.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--output is {output}; give a file that ends with .csv or .jsonl.")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output is {output}, but there is no folder {output.parent}; make it first.")
    files = find_images(images)
    if not any(file.is_file() for file in files):
        open_image(files[0])  # says so before a model is built
    model = create(model_name, pretrained=True, checkpoint=checkpoint, model_kwargs=model_kwargs)
    refuse_new_classifiers(model)
    policy = choose_policy(model, preset, thresholds)
    counted = Costs(model)
    costs, whole = counted.of_exits(lazy=True, heads=policy.answering), counted.of_last_exit_alone()
    predictions, errors = [], {}
    for start in range(0, len(files), batch_size):
        opened: list[tuple[str, Image.Image]] = []
        for file in files[start : start + batch_size]:
            try:
                opened.append((str(file), open_image(file)))
            except (ValueError, OSError) as error:
                errors[str(file)] = str(error)
        predictions += _predictions(model, opened, policy, costs, whole) if opened else []
    if not predictions:
        raise ValueError(" ".join(errors.values()))
    if output is not None:
        _write(output, predictions, errors)
    elif as_json:
        print_json(dict(model=model_name, last_exit_alone=whole, images=predictions, errors=errors))
    else:
        for prediction in predictions:
            _show(prediction)
    if errors:
        raise ValueError(" ".join(errors.values()))


def find_images(places: Sequence[str]) -> list[Path]:
    """Image files that files, folders and patterns name, in order.

    Raises:
        ValueError: If a place is an address on the web, or has no image.
    """
    files: list[Path] = []
    for place in places:
        if "://" in place:
            raise ValueError(f"{place} is an address on the web, which is not read; download the image first.")
        if Path(place).is_dir():
            inside = (path for path in Path(place).rglob("*") if path.suffix.lower() in get_img_extensions(as_set=True))
            found = sorted(path for path in inside if path.is_file())
            if found:
                warn_of_other_images(place, "Name the others one by one, or by a pattern.")
        elif not Path(place).exists() and glob.has_magic(place):
            found = sorted(map(Path, glob.glob(place, recursive=True)))
        else:
            found = [Path(place)]
        if not found:
            kinds = f" of the kinds {', '.join(get_img_extensions())}" if Path(place).is_dir() else ""
            raise ValueError(
                f"There is no image{kinds} in {place}; check the path{', or name the files' if kinds else ''}."
            )
        files += found
    return files


def _write(file: Path, predictions: list[dict[str, Any]], errors: dict[str, str]) -> None:
    """Write one line an image; the file is there whole or not at all."""
    rows = [
        dict(
            image=prediction["image"],
            label=prediction["label"],
            confidence=prediction["exits"][prediction["exit"]]["confidence"],
            exit=prediction["exit"],
            flops=prediction["flops"],
            error=None,
        )
        for prediction in predictions
    ]
    rows += [dict.fromkeys(rows[0]) | dict(image=image, error=error) for image, error in errors.items()]
    text = io.StringIO(newline="")
    if file.suffix == ".csv":
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        text.writelines(json.dumps(row) + "\n" for row in rows)
    new = file.with_name(f".{file.name}.new")
    new.write_text(text.getvalue(), encoding="utf-8")
    new.replace(file)
    console.print(f"{len(predictions)} predictions written to {file}")


def _show(prediction: dict[str, Any]) -> None:
    table = make_table("exit", "prediction", "confidence", "multiply-adds, M", title=prediction["image"])
    for row in prediction["exits"]:
        table.add_row(
            str(row["exit"]),
            row["label"],
            f"{row['confidence']:.3f}",
            millions(row["flops"]),
            style="bold green" if row["exit"] == prediction["exit"] else None,
        )
    console.print(table)
    console.print(f"exit {prediction['exit']} is taken: [bold]{prediction['label']}[/], {saving(prediction['saved'])}")


def _predictions(
    model: MultiExitModel, images: list[tuple[str, Image.Image]], policy: ExitPolicy, costs: list[int], whole: int
) -> list[dict[str, Any]]:
    """Every exit's prediction for each image with its probability, by the exit's temperature, and the exit taken."""
    with evaluating(model), torch.inference_mode():
        logits = torch.stack(model.forward_exits(prepare(model, [image for _, image in images])))
    confidence, label = policy.probabilities(logits).max(-1)
    labels = labels_of(model)
    broken = logits.isnan().any(-1).any(0)
    if broken.any():
        names = ", ".join(name for (name, _), is_broken in zip(images, broken.tolist()) if is_broken)
        raise ValueError(f"The network's logits for {names} hold NaN; check its weights.")
    predictions = []
    for i, ((name, _), k) in enumerate(zip(images, policy.exit_index(logits).tolist(), strict=True)):
        exits = [
            dict(exit=j, label=labels[label[j, i]], confidence=confidence[j, i].item(), flops=costs[j])
            for j in range(model.num_exits)
        ]
        predictions.append(
            dict(image=name, exit=k, label=exits[k]["label"], flops=costs[k], saved=1 - costs[k] / whole, exits=exits)
        )
    return predictions


@command("demo")
def run_demo(
    model_name: ModelName = demo.MODEL,
    preset: Annotated[str, typer.Option(help="Preset.")] = DEFAULT_PRESET,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the timed batch.")] = 64,
    save: Annotated[Path | None, typer.Option(help="PNG to write: the photographs with their predictions.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show early exit on photographs: predictions, exits taken, costs, and the measured speed-up."""
    if save is not None and save.suffix.lower() != ".png":
        raise ValueError(f"--save is {save}; give a file that ends with .png.")
    if save is not None and not save.parent.is_dir():
        raise ValueError(f"--save is {save}, but there is no folder {save.parent}; make it first.")
    images = demo.photographs()
    model = create(model_name, pretrained=True)
    policy = resolve_policy(model, preset)
    counted = Costs(model)
    costs, whole = counted.of_exits(lazy=True, heads=policy.answering), counted.of_last_exit_alone()
    predictions = _predictions(model, [*images.items()], policy, costs, whole)
    speed = demo.measure(model, [*images.values()], policy, batch_size)
    mean_cost = sum(count * cost for count, cost in zip(speed.exit_counts, costs, strict=True)) / batch_size
    labels = labels_of(model)
    data: dict[str, Any] = dict(
        model=model_name,
        preset=preset,
        last_exit_alone=whole,
        photographs=[dict(row, subject=demo.subject(row["image"], labels)) for row in predictions],
        batch_size=batch_size,
        exit_counts=speed.exit_counts,
        mean_flops=mean_cost,
        images_per_second=dict(last_exit_alone=speed.full, early_exit=speed.early),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    if save is not None:
        demo.strip(images, {row["image"]: _caption(row) for row in predictions}).save(save)
    if as_json:
        return print_json(data)
    table = make_table("photograph", "is a", "prediction", "exit", "confidence", "cost, M", "saved")
    for row in data["photographs"]:
        table.add_row(
            row["image"],
            " or ".join(row["subject"]) or "[dim]none[/]",
            row["label"],
            str(row["exit"]),
            f"{row['exits'][row['exit']]['confidence']:.3f}",
            millions(row["flops"]),
            f"{row['saved']:.0%}",
        )
    console.print(table)
    absent = [row["image"] for row in data["photographs"] if not row["subject"]]
    if len(absent) < len(images):
        console.print(f"{model_name} has no class for {', '.join(absent)}: every prediction for them is wrong.")
    console.print("Costs are multiply-adds; savings are relative to the last exit alone.")
    console.print(
        f"\n{batch_size} crops of them in one batch ({data['threads']} threads, torch {data['torch']}): "
        f"early exit {speed.early:,.0f} images/s, the last exit alone {speed.full:,.0f} images/s: "
        f"[bold]{speed.early / speed.full:.2f}×[/] as fast, with {whole / mean_cost:.2f}× fewer multiply-adds. "
        f"Exits 0 to {model.num_exits - 1} were taken by {', '.join(map(str, speed.exit_counts))} of them."
    )
    if save is not None:
        console.print(f"The photographs with their predictions: {save}")


def _caption(row: dict[str, Any]) -> list[str]:
    confidence = row["exits"][row["exit"]]["confidence"]
    return [
        row["label"],
        f"exit {row['exit']}, confidence {confidence:.2f}",
        f"{millions(row['flops'])} M multiply-adds",
    ]
